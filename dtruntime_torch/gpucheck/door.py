"""Saves that are late: what is loaded is the state at the call, though training went on at once."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from dtruntime_torch.checkpoint.door import DOOR
from dtruntime_torch.checkpoint.flatten import FlatState, flatten_state
from dtruntime_torch.checkpoint.saving.failures import tear_in
from dtruntime_torch.checkpoint.saving.handle import SaveHandle
from dtruntime_torch.checkpoint.staging.device import as_bytes
from dtruntime_torch.errors import SaveFailed
from dtruntime_torch.gpucheck import trainees
from dtruntime_torch.gpucheck.comparison import Comparison, compare, in_turns
from dtruntime_torch.gpucheck.device import Bench
from dtruntime_torch.gpucheck.findings import Check, NotRun
from dtruntime_torch.gpucheck.loop import Loop
from dtruntime_torch.gpucheck.saves import Save, by_manager, no_save
from dtruntime_torch.gpucheck.sizes import Sizes
from dtruntime_torch.gpucheck.staging import TIMEOUT, as_they_were
from dtruntime_torch.gpucheck.trainees import Averaged, InBackward, Scaled, Stepped, Trainee
from dtruntime_torch.gpucheck.training import lacks_room
from dtruntime_torch.manager import CheckpointManager

PREFIX = "dtruntime-gpucheck-"
SHARE = 4  # of the bytes of a staging, one in as many is a parameter: optimizers and averages have their own
MOST = 5  # times the parameters: what is saved of a trainee, at most

# Rounds of computation, of some ten microseconds each: until they are done the host has enqueued what comes next, so
# the device does that without a pause, and the copies of a save are behind the steps that follow it.
AHEAD = 1000

WAYS: dict[str, Callable[[Bench, int], Trainee]] = {
    "AdamW foreach": partial(Stepped, make=trainees.adamw_foreach),
    "AdamW fused": partial(Stepped, make=trainees.adamw_fused),
    "AdamW capturable": partial(Stepped, make=trainees.adamw_capturable),
    "SGD with momentum": partial(Stepped, make=trainees.sgd),
    "an optimizer for each parameter": InBackward,
    "a scaled loss": Scaled,
    "an average and a buffer": Averaged,
}
NEED_GRAPHS = {"AdamW capturable"}


def check_door(bench: Bench, sizes: Sizes) -> Iterator[Check | NotRun]:
    """Saves in each way to train; then behind the door's back, and behind a graph, where the next save is immediate."""
    nbytes = sizes.staging_bytes // SHARE
    with tempfile.TemporaryDirectory(prefix=PREFIX) as place:
        folder = Path(place)
        # A checkpoint is removed when the next is there.
        lacking = lacks_room(folder, 2 * MOST * nbytes)
        if lacking is not None:
            yield NotRun("door", f"{lacking}; set TMPDIR to a folder that has")
            return
        for number, (name, make) in enumerate(WAYS.items()):
            if name in NEED_GRAPHS and not _has_graphs(bench):
                yield NotRun(
                    f"door/{name}", "torch lets such an optimizer step only where there are CUDA graphs"
                )
                continue
            with bench.manager(folder / str(number)) as manager:
                rounds = Rounds(bench, manager, make(bench, nbytes))
                yield rounds.of_training(f"door/{name}", sizes.training_rounds)
        with bench.manager(folder / "torn") as manager:
            yield from behind_the_door(bench, manager, nbytes)
        with bench.manager(folder / "captured") as manager:
            yield behind_a_graph(bench, manager, nbytes)


class Rounds:
    """Saves of one trainee, one after another.

    Args:
        bench: where.
        manager: saves.
        trainee: has not stepped yet.
    """

    def __init__(self, bench: Bench, manager: CheckpointManager, trainee: Trainee) -> None:
        self._bench = bench
        self._manager = manager
        self._trainee = trainee
        self._saved = 0
        # The first step of an optimizer makes its state, and makes it known.
        trainee.train()
        manager.prepare(trainee.state)

    def start(self) -> tuple[SaveHandle, FlatState]:
        """Starts a save, with the device busy; gives it and what the state is at that moment."""
        self._saved += 1
        flat = flatten_state(self._trainee.state, rank=0)
        self._bench.compute(AHEAD)
        # Copies in stream order: they say what the state was, and wait for nothing.
        tensors = {name: tensor.clone() for name, tensor in flat.tensors.items()}
        handle = self._manager.save_async(self._trainee.state, self._saved)
        return handle, FlatState(flat.specs, tensors, flat.values)

    def differences(self, handle: SaveHandle, expected: FlatState) -> Iterator[str]:
        """What is wrong with a save, which is waited for here."""
        self._bench.synchronize()
        try:
            info = handle.result(TIMEOUT)
        except SaveFailed as failure:
            yield str(failure)
            return
        loaded = flatten_state(self._manager.load_checkpoint(step=info.step), rank=0)
        for name in loaded.tensors.keys() ^ expected.tensors.keys():
            yield f"{name} is in one of the two only"
        for name in loaded.tensors.keys() & expected.tensors.keys():
            if not _same_bytes(loaded.tensors[name], expected.tensors[name]):
                yield name
        # What groups of parameters are called is known to the state alone.
        for name in loaded.values.keys() & expected.values.keys():
            if loaded.values[name] != expected.values[name]:
                yield f"{name} is {loaded.values[name]!r} instead of {expected.values[name]!r}"

    def of_training(self, name: str, count: int) -> Check:
        """Each save is followed by training at once, which waits at the door for what is late."""
        torn, waited = [], 0.0
        for number in range(count):
            handle, expected = self.start()
            self._trainee.train()
            self._trainee.train()
            torn += [f"round {number}: {what}" for what in self.differences(handle, expected)]
            waited += handle.metrics.door_seconds
            now = flatten_state(self._trainee.state, rank=0).tensors
            alone = sum(_same_bytes(now[name], tensor) for name, tensor in expected.tensors.items())
            if 2 * alone > len(now):
                torn.append(f"round {number}: nothing, but training left {alone} alone, so this shows little")
        if not torn and not waited:
            torn.append("none, but no step came to the door before all was copied, so this shows little")
        return as_they_were(name, len(expected.tensors), torn)


def behind_the_door(bench: Bench, manager: CheckpointManager, nbytes: int) -> Iterator[Check]:
    """Another stream overwrites what is late: that save fails and names it, and the next is immediate."""
    trainee = Stepped(bench, nbytes, trainees.adamw_foreach)
    rounds = Rounds(bench, manager, trainee)
    name, victim = trainee.last_late()
    handle, _ = rounds.start()
    called = bench.record()
    with bench.on_side_stream():
        bench.wait_for(called)
        # By `data`, so that torch does not count it.
        victim.data.add_(1)
    yield _fails_with_a_tear(bench, handle, name)
    yield _immediate("door/the next save after a tear", rounds, trainee.train)


def _fails_with_a_tear(bench: Bench, handle: SaveHandle, name: str) -> Check:
    bench.synchronize()
    try:
        handle.result(TIMEOUT)
        tear, said = None, "nothing was noticed"
    except SaveFailed as failure:
        tear, said = tear_in(failure), str(failure)
    named = tear is not None and str(tear).startswith(f"{name} ")
    return Check("door/overwritten behind it", named, said)


def behind_a_graph(bench: Bench, manager: CheckpointManager, nbytes: int) -> Check | NotRun:
    """Where the step of an optimizer is captured its replay passes no door: the next save is immediate."""
    name = "door/the next save after a step was captured"
    if not _has_graphs(bench):
        return NotRun(name, "there are no CUDA graphs here")
    capturable = bench.torch_device.type == "cuda"
    trainee = Stepped(bench, nbytes, trainees.adamw_capturable if capturable else trainees.adamw_foreach)
    rounds = Rounds(bench, manager, trainee)

    def step() -> torch.Tensor:
        trainee.optimizer.step()
        return trainee.last_late()[1]

    bypassed = DOOR.bypassed
    try:
        replay, _ = bench.capture(step)
        return _immediate(name, rounds, replay)
    finally:
        # The graph is gone, and what is measured later is not to be slowed down by it.
        DOOR.bypassed = bypassed


def _immediate(name: str, rounds: Rounds, overwrite: Callable[[], object]) -> Check:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        handle, expected = rounds.start()
    staged = handle.staged()
    overwrite()
    wrong = [] if staged else ["something was still to be copied when the call returned"]
    if not any("saves now wait until all is staged" in str(one.message) for one in warned):
        wrong.append("no warning said that this save waited")
    wrong += rounds.differences(handle, expected)
    return as_they_were(name, len(expected.tensors), wrong)


def measure_door(bench: Bench, sizes: Sizes) -> Iterator[Comparison | NotRun]:
    """How long a call keeps the host, and how much longer the device then takes for the step after it."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as place:
        folder = Path(place)
        late, whole = folder / "late", folder / "immediate"
        with (
            CheckpointManager(late, keep_last_n=None) as ours,
            CheckpointManager(whole, consistency="immediate", keep_last_n=None) as peer,
        ):
            loop = Loop(bench, sizes)
            lacking = lacks_room(folder, loop.nbytes)
            if lacking is not None:
                yield NotRun("door/cost", f"{lacking}; set TMPDIR to a folder that has")
                return
            ours.prepare(loop.state())
            peer.prepare(loop.state())
            saves = {"ours": by_manager(ours, loop, late), "immediate": by_manager(peer, loop, whole)}
            costs = _Costs(bench, loop)
            calls = in_turns(saves, costs.call, sizes.repetitions)
            steps = in_turns({"ours": saves["ours"], "none": no_save}, costs.step, sizes.repetitions)
    for what, taken, other, peer_name in (
        ("call of save_async", calls, "immediate", "consistency='immediate'"),
        ("save_async and the step after it, on the device", steps, "none", "no save"),
    ):
        yield compare(
            f"door/{what}, {loop.nbytes / 1e6:.0f} MB",
            taken["ours"],
            taken[other],
            peer_name=peer_name,
            unit="ms",
            figure=lambda seconds: 1e3 * seconds,
        )


class _Costs:
    """Seconds of saves, each of a later step than the one before it; a save has ended when it is counted."""

    def __init__(self, bench: Bench, loop: Loop) -> None:
        self._bench = bench
        self._loop = loop
        self._saved = 0

    def call(self, save: Save) -> float:
        """Of the host, from a call to its return."""
        self._saved += 1
        self._bench.synchronize()
        start = self._bench.clock()
        finish = save(self._saved)
        taken = self._bench.clock() - start
        self._loop.step()
        finish()
        return taken

    def step(self, save: Save) -> float:
        """Of the device, for what a call and the step after it have it do, while the host is ahead."""
        self._saved += 1
        self._bench.synchronize()
        self._bench.compute(AHEAD)
        before = self._bench.record()
        finish = save(self._saved)
        # So that there is something also where only what goes through the bench takes time.
        self._bench.compute(1)
        self._loop.step()
        taken = self._bench.seconds_between(before, self._bench.record())
        finish()
        return taken


def _has_graphs(bench: Bench) -> bool:
    return bench.kind == "gpu"


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(as_bytes(one).cpu(), as_bytes(other).cpu())
