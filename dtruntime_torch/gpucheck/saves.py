"""The ways to save whose cost is compared. Each takes the state as it is at the call and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from dtruntime_torch.gpucheck.device import Bench
from dtruntime_torch.gpucheck.loop import Loop
from dtruntime_torch.gpucheck.sizes import MIB
from dtruntime_torch.gpucheck.staging import TIMEOUT
from dtruntime_torch.manager import CheckpointManager

# Starts a save, of the step that it is given; what it returns waits for the rest of it, and removes what was written.
Save = Callable[[int], Callable[[], object]]


def no_save(step: int) -> Callable[[], object]:
    """Saves nothing."""
    return lambda: None


def by_stager(bench: Bench, loop: Loop) -> Save:
    """Staging goes on beside the steps; the optimizer waits for it, and nothing is written."""
    pairs, end = [], 0
    for tensor in loop.tensors():
        pairs.append((tensor, end))
        end += tensor.nbytes
    stager = bench.stager(bench.arena(end), MIB)

    def save(step: int) -> Callable[[], object]:
        staging = stager.start(pairs)
        door = loop.before_overwrite(lambda: staging.before_overwrite(timeout=TIMEOUT))

        def finish() -> None:
            door.remove()
            staging.wait(TIMEOUT)

        return finish

    return save


def by_manager(manager: CheckpointManager, loop: Loop, folder: Path) -> Save:
    """As users save: what the optimizer owns is copied late, and its next step waits at the door.

    What is saved is removed behind the manager's back, so it keeps all that it knows of: `keep_last_n=None`.
    """

    def save(step: int) -> Callable[[], object]:
        handle = manager.save_async(loop.state(), step)
        return lambda: shutil.rmtree(folder / handle.result().path)

    return save


def by_dcp(loop: Loop, folder: Path, stager: AsyncStager | None) -> Save:
    """DCP without a process group.

    Args:
        loop: whose state is saved.
        folder: where to.
        stager: None: the one that it makes for each save, which neither pins nor returns before all is copied.
    """

    def save(step: int) -> Callable[[], object]:
        place = folder / str(step)
        saving = async_save(loop.state_dict(), checkpoint_id=place, async_stager=stager, no_dist=True)
        if not isinstance(saving, AsyncSaveResponse):
            return lambda: _finish_dcp(saving.result, place)
        door = loop.before_overwrite(saving.staging_completion.result)

        def finish() -> None:
            door.remove()
            _finish_dcp(saving.upload_completion.result, place)

        return finish

    return save


def _finish_dcp(wait: Callable[[], object], place: Path) -> None:
    wait()
    shutil.rmtree(place)
