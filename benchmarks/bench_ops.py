"""torch.ops.dtruntime on tensors of 1 KiB, where the call is all that counts, beside the same kernels as custom ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from benchmarks.harness import Case, main
from dtruntime_torch import ops

NBYTES = 1 << 10
CHUNK_BYTES = 1 << 20
CALLS = 2000


def cases() -> Iterator[Case]:
    """Each op by `Library.impl`, as it is, and by `torch.library.custom_op`."""
    for name, ours in (("digest", _digest), ("copy_digest_", _copy_digest)):
        yield Case(
            metric=f"ops/{name}/1KiB",
            ours=partial(_repeat, ours),
            peer=partial(_repeat, partial(_by_custom_op, name)),
            peer_name="custom_op",
            nbytes=NBYTES * CALLS,
        )


@cache
def _tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(NBYTES, dtype=torch.uint8), torch.zeros(NBYTES, dtype=torch.uint8)


def _digest() -> None:
    torch.ops.dtruntime.digest(_tensors()[0], CHUNK_BYTES)


def _copy_digest() -> None:
    source, target = _tensors()
    torch.ops.dtruntime.copy_digest_(target, source, CHUNK_BYTES)


@cache
def _custom_ops() -> dict[str, Callable[..., object]]:
    @torch.library.custom_op("dtruntime_bench::digest", mutates_args=())
    def digest(data: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
        return ops._digest_cpu(data, chunk_bytes)

    @torch.library.custom_op("dtruntime_bench::copy_digest_", mutates_args=("target",))
    def copy_digest(target: torch.Tensor, source: torch.Tensor, chunk_bytes: int) -> torch.Tensor:
        return ops._copy_digest_cpu(target, source, chunk_bytes)

    return {"digest": digest, "copy_digest_": copy_digest}


def _by_custom_op(name: str) -> None:
    source, target = _tensors()
    arguments = (source,) if name == "digest" else (target, source)
    _custom_ops()[name](*arguments, CHUNK_BYTES)


def _repeat(call: Callable[[], None]) -> None:
    for _ in range(CALLS):
        call()


if __name__ == "__main__":
    main(cases)
