"""What a check found, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dtruntime_torch.gpucheck.comparison import Comparison


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold.

    Attributes:
        name: what must hold, `what/where`.
        ok: whether it does.
        detail: how much was looked at, or what is wrong.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class NotRun:
    """Something that was neither checked nor measured here, which is no failure.

    Attributes:
        name: of the check or the metric, `what/where`.
        why: what was missing.
    """

    name: str
    why: str


Finding = Check | Comparison | NotRun


def same_digests(name: str, found: torch.Tensor, expected: bytes) -> Check:
    """Compares digests with those of the host.

    Args:
        name: of the check.
        found: (n_chunks, 2) int64, on any device; what is enqueued there is waited for.
        expected: 16 canonical bytes a chunk.
    """
    got = found.cpu().numpy().tobytes()
    if len(got) != len(expected):
        return Check(name, False, f"{len(got) // 16} digests instead of {len(expected) // 16}")
    wrong = [at for at in range(0, len(got), 16) if got[at : at + 16] != expected[at : at + 16]]
    if wrong:
        first = wrong[0]
        return Check(
            name,
            False,
            f"{len(wrong)} of {len(got) // 16} differ, first chunk {first // 16}: {got[first : first + 16].hex()} "
            f"instead of {expected[first : first + 16].hex()}",
        )
    return Check(name, True, f"{len(got) // 16} chunks")


def same_bytes(name: str, found: torch.Tensor, expected: torch.Tensor) -> Check:
    """Compares bytes, wherever they are.

    Args:
        name: of the check.
        found: uint8.
        expected: uint8 of the same shape.
    """
    differ = (found.cpu() != expected.cpu()).nonzero()
    if len(differ):
        return Check(name, False, f"{len(differ)} of {expected.numel()} bytes differ, first {int(differ[0])}")
    return Check(name, True, f"{expected.numel()} bytes")
