"""What the processes of a walk do: the real commit, delta, retention and sweep, as `publish` strings them together.

`publish` itself works in threads; what is here is its order for one rank, as coroutines. Where it waits for an answer
or for a time, these do not: nothing is parallel in a process, and its clock stands still.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint import catalog, names
from dtruntime_torch.checkpoint.flatten import flatten_state
from dtruntime_torch.checkpoint.manifest import Commit, decode_commit, decode_manifest, decode_part
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.checkpoint.saving import shard_file
from dtruntime_torch.checkpoint.saving.delta import Base, make_delta
from dtruntime_torch.checkpoint.saving.layout import Layout, make_layout
from dtruntime_torch.checkpoint.saving.save_plan import make_save_plan
from dtruntime_torch.checkpoint.specs import SavePlan
from dtruntime_torch.errors import CheckpointNotFound, CommitConflict, CorruptCheckpoint
from tests.checkpoint.commits import NAME, manifest_of
from tests.checkpoint.walk import Job, Judged, Memory
from tests.checkpoint.walk_code import Code
from tests.checkpoint.walk_storage import Scheduled

CHUNK = 4


def state_of(step: int) -> dict[str, torch.Tensor]:
    """Three chunks: one that no step changes, one that differs from step to step, one of each second step."""
    return {"w": torch.tensor([7.0, float(step), float(step // 2)])}


@dataclass(frozen=True)
class Image:
    plan: SavePlan
    layout: Layout
    data: bytes
    digests: bytes


@cache
def image_of(step: int) -> Image:
    flat = flatten_state(state_of(step), 0)
    plan = make_save_plan(0, 1, flat.specs, {"all": flat.specs}, {"all": (0,)})
    layout = make_layout(plan)
    (slot,) = layout.slots
    tensor = flat.tensors[slot.item.spec.fqn].numpy().tobytes()
    return Image(plan, layout, layout.header + tensor, _C.digest(tensor, CHUNK))


def save(code: Code, step: int, delta: bool = False, sweeps: bool = False, retains: bool = False) -> Job:
    """A save by one rank."""

    async def job(backend: Scheduled, me: Memory) -> None:
        cleaner = me.keep.setdefault("cleaner", code.cleaner())
        if sweeps:
            await cleaner.before_save(me.number)
        base = me.keep.get("base") or await load_base(backend, me.number) if delta else None
        outcome, attempt = await try_once(code, backend, me, Attempt(me.number, step, 1), base)
        if outcome.kind == "stale":
            await give_up(cleaner, me, attempt)
            outcome, attempt = await try_once(code, backend, me, Attempt(me.number, step, 2), None)
        if outcome.kind == "lost":
            await give_up(cleaner, me, attempt)
            raise CommitConflict("replaced")
        if outcome.kind == "committed" and retains:
            await take(cleaner, me, attempt, outcome)

    job.__name__ = f"{'delta' if delta else 'full'} save of step {step}"
    return job


async def load_base(backend: Scheduled, generation: int) -> Base | None:
    """What another incarnation committed, to save against; the format allows it, managers do not do it yet."""
    try:
        commit, _ = await catalog.pick(backend, NAME, None, {}, [])
        manifest = await catalog.read_manifest(backend, commit)
        part = await catalog.read_part(backend, manifest, 0)
    except (CheckpointNotFound, CorruptCheckpoint):
        return None
    if commit.generation > generation:
        return None  # nobody goes on from who came after
    return Base(commit, part, {}, 0, False, commit.key)


async def try_once(
    code: Code, backend: Scheduled, me: Memory, attempt: Attempt, base: Base | None
) -> tuple[Any, Attempt]:
    image = image_of(attempt.step)
    header = len(shard_file.DELTA_HEADER)
    delta = None if base is None else make_delta(base.part, image.layout, image.digests, header)
    shard = await shard_file.write_shard(
        backend,
        NAME,
        attempt,
        image.plan,
        image.layout,
        memoryview(image.data),
        image.digests,
        CHUNK,
        {},
        delta,
    )
    used = {file.path.rpartition("/")[0] for file in shard.part.files} - {attempt.path}
    manifest = replace(
        manifest_of(attempt.generation, attempt.step, attempt.number),
        full=base is None,
        uses=(attempt.path, *sorted(used)),
        parts=(shard.ref,),
        nbytes=12,
        written=shard.ref.data_length,
        parent=None if base is None else base.commit.key,
    )
    parent = None if base is None else base.commit
    outcome = await code.commit.commit(backend, manifest, code.patience(), parent)
    me.kinds |= {outcome.kind}
    if outcome.kind == "committed":
        me.reported |= {names.commit_path(NAME, attempt.key)}
        there = Commit(NAME, *attempt.key, attempt.path, outcome.manifest_sha256)
        me.keep["base"] = Base(there, shard.part, {}, 0, False, there.key)
    elif outcome.kind != "unknown":
        me.failed |= {attempt.path}
    return outcome, attempt


async def give_up(cleaner: Any, me: Memory, attempt: Attempt) -> None:
    cleaner.gave_up(attempt)
    await cleaner.before_save(me.number)


async def take(cleaner: Any, me: Memory, attempt: Attempt, outcome: Any) -> None:
    me.retains = True
    await cleaner.after_commit(attempt.key, outcome.answered)
    me.retains = False


def prune(code: Code) -> Job:
    """What the user's `prune` does: retention and sweep."""

    async def job(backend: Scheduled, me: Memory) -> None:
        cleaner = me.keep.setdefault("cleaner", code.cleaner())
        me.retains = True
        await cleaner.prune(me.number)
        me.retains = False

    job.__name__ = "prune"
    return job


def judge(files: dict[str, bytes]) -> Judged:
    """Looks whether all that is committed has what it names."""
    commits = [_commit(path, data) for path, data in files.items() if names.parse_commit(path)]
    live = [commit for commit in commits if not commit.void]
    broken = next((why for commit in live if (why := _missing(files, commit))), None)
    paths = (names.commit_path(NAME, commit.key) for commit in live)
    return Judged(frozenset(paths), frozenset(commit.attempt for commit in live), broken)


def _missing(files: dict[str, bytes], commit: Commit) -> str | None:
    folder = f"{NAME}/{commit.attempt}"
    data = files.get(f"{folder}/{names.MANIFEST}")
    if data is None or hashlib.sha256(data).hexdigest() != commit.manifest_sha256:
        return f"I1: {commit.key} is committed and its manifest is gone"
    for ref in _manifest(data).parts:
        part = files.get(f"{folder}/{ref.path}")
        if part is None:
            return f"I1: {commit.key} is committed and its part {ref.path} is gone"
        gone = [file.path for file in _part(part).files if f"{NAME}/{file.path}" not in files]
        if gone:
            return f"I1: {commit.key} is committed and uses what is gone: {gone}"
    return None


@cache
def _commit(path: str, data: bytes) -> Commit:
    return decode_commit(data, path)


@cache
def _manifest(data: bytes) -> Any:
    return decode_manifest(data, "")


@cache
def _part(data: bytes) -> Any:
    return decode_part(data, "")
