"""What a save costs a training loop: steps with it beside steps without, and beside DCP's asynchronous saves."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from dtruntime_torch.gpucheck.comparison import Comparison, compare, in_turns
from dtruntime_torch.gpucheck.device import Bench
from dtruntime_torch.gpucheck.findings import NotRun
from dtruntime_torch.gpucheck.loop import Loop
from dtruntime_torch.gpucheck.saves import Save, by_dcp, by_manager, by_stager, no_save
from dtruntime_torch.gpucheck.sizes import Sizes
from dtruntime_torch.manager import CheckpointManager

# Where torch makes shared memory, into which DCP's fastest stager stages.
SHARED_MEMORY = Path("/dev/shm")
DCP = "dcp.async_save, DefaultStager()"
PEERS = {"none": "no save", "dcp": DCP, "dcp as it comes": "dcp.async_save as it comes"}


def measure_training(bench: Bench, sizes: Sizes) -> Iterator[Comparison | NotRun]:
    """Times windows of steps that start with a save, each way to save in turns; all write to the same folder."""
    loop = Loop(bench, sizes)
    with tempfile.TemporaryDirectory(prefix="dtruntime-gpucheck-") as name:
        folder = Path(name)
        # A checkpoint is removed before the next is written.
        lacking = lacks_room(folder, loop.nbytes)
        if lacking is not None:
            yield NotRun("step", f"{lacking}; set TMPDIR to a folder that has")
            return
        lacking = lacks_room(SHARED_MEMORY, loop.nbytes)
        if lacking is not None:
            # To write to memory that is not there would end this process.
            yield NotRun(f"step beside {DCP}", lacking)
        seconds = _in_windows(bench, sizes, loop, folder, with_shared_memory=lacking is None)
    for metric, ours in (("step/save_async", "manager"), ("step/staging alone", "stager")):
        for peer, peer_name in PEERS.items():
            if peer in seconds:
                yield compare(
                    f"{metric}, one in {sizes.steps} steps, {loop.nbytes / 1e6:.0f} MB",
                    seconds[ours],
                    seconds[peer],
                    peer_name=peer_name,
                    unit="ms a step",
                    figure=lambda taken: 1e3 * taken / sizes.steps,
                )


def lacks_room(folder: Path, nbytes: int) -> str | None:
    """Says how much room a folder lacks for a checkpoint of so many bytes and some more, or None."""
    needed, free = nbytes + nbytes // 4, shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return f"{folder} has {free / 1e6:.0f} MB free, and {needed / 1e6:.0f} MB are needed"


def _in_windows(
    bench: Bench, sizes: Sizes, loop: Loop, folder: Path, with_shared_memory: bool
) -> dict[str, list[float]]:
    """Seconds of the windows of each way to save."""
    with ExitStack() as stack:
        manager = stack.enter_context(CheckpointManager(folder / "ours", keep_last_n=None))
        manager.prepare(loop.state())
        saves = {
            "none": no_save,
            "stager": by_stager(bench, loop),
            "manager": by_manager(manager, loop, folder / "ours"),
            "dcp as it comes": by_dcp(loop, folder / "dcp", None),
        }
        if with_shared_memory:
            stager = bench.dcp_stager()
            stack.callback(stager.close)
            saves["dcp"] = by_dcp(loop, folder / "dcp", stager)
        # DCP says that it saves in one process, which is meant.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return in_turns(saves, _Windows(bench, sizes.steps, loop).seconds, sizes.windows)


class _Windows:
    """Counts the saves: each is of a later step than the one before it."""

    def __init__(self, bench: Bench, steps: int, loop: Loop) -> None:
        self._bench = bench
        self._steps = steps
        self._loop = loop
        self._saved = 0

    def seconds(self, save: Save) -> float:
        """Of a save and the steps after it; what the save still does then is waited for untimed."""
        self._saved += 1
        self._bench.synchronize()
        start = self._bench.clock()
        finish = save(self._saved)
        for _ in range(self._steps):
            self._loop.step()
        self._bench.synchronize()
        taken = self._bench.clock() - start
        finish()
        return taken
