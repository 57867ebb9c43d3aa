"""The ops where and when else they may be called: on a side stream, on a device that is not current, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dtruntime_torch import _C
from dtruntime_torch.gpucheck.device import Bench, on_host, random_bytes
from dtruntime_torch.gpucheck.findings import Check, Finding, NotRun, same_bytes, same_digests
from dtruntime_torch.gpucheck.sizes import Sizes

CHUNK_BYTES = 1 << 16
# Milliseconds of computation on an H100: what is enqueued behind it happens well after the call.
ROUNDS = 100
REPLAYS = 3


def check_streams(bench: Bench, sizes: Sizes) -> Iterator[Finding]:
    """Runs both ops in each of these places."""
    yield from on_a_side_stream(bench, sizes.chunked_bytes + 4321)
    yield from on_another_device(bench, sizes.chunked_bytes + 4321)
    yield from in_a_graph(bench, sizes.chunked_bytes + 4321)


def on_a_side_stream(bench: Bench, nbytes: int) -> Iterator[Check]:
    """The bytes come late, in the order of that stream: an op on any other would see what was there before."""
    fresh = random_bytes(bench, nbytes, seed=16)
    data, target = torch.zeros_like(fresh), torch.zeros_like(fresh)
    ready = bench.record()
    with bench.on_side_stream():
        bench.wait_for(ready)
        bench.compute(ROUNDS)
        bench.copy(data, fresh)
        digests = _both(bench, data, target)
        done = bench.record()
    bench.wait_for(done)
    yield same_digests("side stream/digests", digests, _expected(fresh))
    yield same_bytes("side stream/copy", target, fresh)


def on_another_device(bench: Bench, nbytes: int) -> Iterator[Finding]:
    """The current device is another one, and stays so."""
    other = bench.other_device()
    if other is None:
        yield NotRun("other device", "there is one device only")
        return
    before = bench.current_index()
    data = random_bytes(bench, nbytes, seed=17, where=other)
    target = torch.zeros_like(data)
    digests = _both(bench, data, target)
    after = bench.current_index()
    yield Check("other device/current device", after == before, f"it was {before} and is {after}")
    yield Check(
        "other device/result",
        digests.device == data.device,
        f"data on {data.device}, digests on {digests.device}",
    )
    yield same_digests("other device/digests", digests, _expected(data))
    yield same_bytes("other device/copy", target, data)


def in_a_graph(bench: Bench, nbytes: int) -> Iterator[Check]:
    """Captures them once and replays them on other bytes each time."""
    data = random_bytes(bench, nbytes, seed=18)
    target = torch.zeros_like(data)
    # What CUDA loads at a first call cannot be loaded while a graph is captured.
    _both(bench, data, target)
    replay, digests = bench.capture(lambda: _both(bench, data, target))
    for number in range(REPLAYS):
        fresh = random_bytes(bench, nbytes, seed=19 + number)
        bench.copy(data, fresh)
        replay()
        yield same_digests(f"graph/digests of replay {number}", digests, _expected(fresh))
        yield same_bytes(f"graph/copy of replay {number}", target, fresh)


def _both(bench: Bench, data: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The digests by one op, then those by the other."""
    return torch.cat([bench.digest(data, CHUNK_BYTES), bench.copy_digest_(target, data, CHUNK_BYTES)])


def _expected(data: torch.Tensor) -> bytes:
    return 2 * _C.digest(on_host(data), CHUNK_BYTES)
