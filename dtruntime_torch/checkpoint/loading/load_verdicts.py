"""What the leader makes of the reports of all ranks of a load: one verdict for all. Pure.

A report is a dict with a `kind`: "sound"; "damaged" with `message` and `damage`; "failed" with `type` and `message`. A
verdict has a `verdict`: "go", "older", "again", "differs" or "failed".
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dtruntime_torch.checkpoint.arguments import LoadOptions
from dtruntime_torch.checkpoint.loading.chunk_needs import Needs, unpack

MOST_LINES = 50

Report = dict[str, Any]
Verdict = dict[str, Any]


def encode(record: Report) -> bytes:
    """Packs a report or a verdict for the Store."""
    return zlib.compress(json.dumps(record, separators=(",", ":")).encode(), 1)


def decode(packed: bytes) -> dict[str, Any]:
    """Undoes `encode`."""
    record: dict[str, Any] = json.loads(zlib.decompress(packed))
    return record


def judge(what: str, reports: Sequence[Report], is_committed: Callable[[], bool]) -> Verdict:
    """Decides whether the load goes on.

    Args:
        what: is loaded, as "step 7 of model".
        reports: of all ranks.
        is_committed: asked where there is damage: what a prune took meanwhile is not damaged.
    """
    failed = [(rank, report) for rank, report in enumerate(reports) if report["kind"] == "failed"]
    damaged = [report for report in reports if report["kind"] == "damaged"]
    if failed:
        messages = "; ".join(f"rank {rank}: {report['message']}" for rank, report in failed)
        kinds = {(report["type"], report.get("errno")) for _, report in failed}
        kind, code = kinds.pop() if len(kinds) == 1 else ("", None)
        verdict = _verdict("failed", f"{what} could not be loaded: {messages}")
        return {**verdict, "type": kind, "errno": code}
    if damaged:
        if not is_committed():
            return _verdict("again")
        damage = list({json.dumps(d): d for report in damaged for d in report["damage"]}.values())
        return _verdict("older", damaged[0]["message"], damage)
    return _verdict("go")


def judge_surveys(
    what: str, reports: Sequence[Report], options: LoadOptions, is_committed: Callable[[], bool]
) -> Verdict:
    """Decides, once all have compared their states with the checkpoint, whether it is read, and who shares what.

    A sound report has `differences`, `missing` and `unexpected` as `Wanted` has them, `in_place`, `node` and `needs`. A
    verdict "go" has `missing`, `unexpected`; `in_place`: whether any rank reads straight into its tensors; `turns`: for
    each rank, which of how many of its node it is; and `nodes`: for each node whose ranks need something in common
    `ranks` and their `needs`, one entry if all have the same.
    """
    verdict = judge(what, reports, is_committed)
    if verdict["verdict"] != "go":
        return verdict
    missing = _named([report["missing"] for report in reports])
    unexpected = sorted(set.intersection(*(set(report["unexpected"]) for report in reports)))
    lines = _lines([report["differences"] for report in reports])
    # Where shapes differ or a key names nothing, to be less strict does not help.
    advice = [] if lines else ["to take what fits give strict=False"]
    if options.strict:
        lines += _lines(
            [
                [f"{fqn}: in the state, not in the checkpoint" for fqn in report["missing"]]
                for report in reports
            ]
        )
        lines += [f"{fqn}: in the checkpoint, not in the state" for fqn in unexpected]
    if lines:
        advice += ["to take a part of it give keys"] if options.keys is None else []
        told = f" ({', '.join(advice)})" if advice else ""
        return _verdict("differs", f"{what} does not fit the state{told}:\n  " + "\n  ".join(_capped(lines)))
    by_node: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        by_node.setdefault(report["node"], []).append(rank)
    turns = {rank: (turn, len(ranks)) for ranks in by_node.values() for turn, rank in enumerate(ranks)}
    return {
        **verdict,
        "missing": missing,
        "unexpected": unexpected,
        "in_place": any(report["in_place"] for report in reports),
        "turns": [turns[rank] for rank in range(len(reports))],
        "nodes": _nodes(by_node.values(), reports),
    }


def _lines(of_ranks: Sequence[Sequence[str]]) -> list[str]:
    """Each line once; with the ranks that have it, where not all do."""
    ranks: dict[str, list[int]] = {}
    for rank, lines in enumerate(of_ranks):
        for line in dict.fromkeys(lines):
            ranks.setdefault(line, []).append(rank)
    return [line if len(who) == len(of_ranks) else f"{line} ({_name(who)})" for line, who in ranks.items()]


def _name(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"


def _named(of_ranks: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in of_ranks for name in names))


def _capped(lines: Sequence[str]) -> list[str]:
    rest = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], *([f"and {rest} more"] if rest > 0 else [])]


def _nodes(of_nodes: Iterable[list[int]], reports: Sequence[Report]) -> list[dict[str, Any]]:
    nodes = []
    for ranks in of_nodes:
        packed = [reports[rank]["needs"] for rank in ranks]
        if _have_common([unpack(one) for one in packed]):
            same = all(one == packed[0] for one in packed)
            nodes.append({"ranks": ranks, "needs": packed[:1] if same else packed})
    return nodes


def _have_common(needs: Sequence[Needs]) -> bool:
    seen: set[tuple[int, int]] = set()
    for one in needs:
        # Of a tensor that two need it may be other chunks; then nothing is lost but a few meetings.
        if not seen.isdisjoint(one):
            return True
        seen.update(one)
    return False


def _verdict(verdict: str, message: str = "", damage: Sequence[dict[str, Any]] = ()) -> Verdict:
    return {"verdict": verdict, "message": message, "damage": list(damage)}
