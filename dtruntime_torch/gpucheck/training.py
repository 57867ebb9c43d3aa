"""What a save costs a training loop: steps with it beside steps without, and beside DCP's asynchronous save."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from dtruntime_torch.checkpoint.flatten import flatten_state
from dtruntime_torch.gpucheck.comparison import Comparison, compare
from dtruntime_torch.gpucheck.device import Device
from dtruntime_torch.gpucheck.sizes import MIB, Sizes
from dtruntime_torch.gpucheck.staging import TIMEOUT
from dtruntime_torch.gpucheck.timing import in_turns
from dtruntime_torch.manager import CheckpointManager

# Takes a snapshot for a step; what it returns waits for all that goes on in the background.
Save = Callable[[int], Callable[[], object]]


def measure_training(device: Device, sizes: Sizes) -> Iterator[Comparison]:
    """Times windows of steps that start with a save, each way to save in turns; both write to the same folder."""
    with _temporary_folder() as folder:
        loop = Loop(device, sizes)
        with CheckpointManager(folder / "ours") as manager:
            manager.prepare(loop.state())
            saves = {
                "none": lambda step: _nothing,
                "stager": _by_stager(device, loop),
                "manager": lambda step: manager.save_async(loop.state(), step).result,
                "dcp": _by_dcp(loop, folder / "dcp"),
            }
            with warnings.catch_warnings():
                # DCP says that it saves in one process, which is meant.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                seconds = in_turns(saves, loop.window, sizes.windows)
    for metric, ours, peer, peer_name in (
        ("step/save_async", "manager", "none", "no save"),
        ("step/save_async", "manager", "dcp", "dcp.async_save"),
        ("step/staging alone", "stager", "none", "no save"),
        ("step/staging alone", "stager", "dcp", "dcp.async_save"),
    ):
        yield compare(
            f"{metric}, one in {sizes.steps} steps, {loop.nbytes / 1e6:.0f} MB",
            seconds[ours],
            seconds[peer],
            peer_name=peer_name,
            unit="ms a step",
            figure=lambda taken: 1e3 * taken / sizes.steps,
        )


class Loop:
    """A model like a small transformer, an optimizer, and the same batch again and again.

    Attributes:
        nbytes: of the state that is saved.
    """

    def __init__(self, device: Device, sizes: Sizes) -> None:
        self._device = device
        self._steps = sizes.steps
        self._saved = 0
        torch.manual_seed(15)
        layers = [
            nn.TransformerEncoderLayer(
                sizes.width, sizes.width // 64, 4 * sizes.width, dropout=0.0, batch_first=True
            )
            for _ in range(sizes.layers)
        ]
        self._model = nn.Sequential(*layers).to(device.torch_device)
        self.optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._batch = torch.randn(sizes.samples, sizes.tokens, sizes.width, device=device.torch_device)
        # The optimizer makes its state in its first step.
        self._step()
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors())

    def state(self) -> dict[str, object]:
        """As one gives it to a manager."""
        return {"model": self._model, "optimizer": self.optimizer}

    def state_dict(self) -> dict[str, object]:
        """As one gives it to DCP."""
        return {"model": self._model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> list[torch.Tensor]:
        """All that is saved, by itself."""
        return list(flatten_state(self.state(), rank=0).tensors.values())

    def window(self, save: Save) -> float:
        """Seconds of a save and the steps after it; what the save still does then is waited for untimed."""
        self._saved += 1
        self._device.synchronize()
        start = self._device.clock()
        finish = save(self._saved)
        for _ in range(self._steps):
            self._step()
        self._device.synchronize()
        taken = self._device.clock() - start
        finish()
        return taken

    def _step(self) -> None:
        self.optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        self.optimizer.step()


def _nothing() -> None:
    """What is left to wait for when nothing was saved."""


def _by_stager(device: Device, loop: Loop) -> Save:
    """Staging goes on beside the steps; the optimizer waits for it, and nothing is written."""
    pairs, end = [], 0
    for tensor in loop.tensors():
        pairs.append((tensor, end))
        end += tensor.nbytes
    stager = device.stager(device.arena(end), MIB)

    def save(step: int) -> Callable[[], object]:
        staging = stager.start(pairs)
        door = loop.optimizer.register_step_pre_hook(lambda *_: staging.before_overwrite(timeout=TIMEOUT))

        def finish() -> None:
            door.remove()
            staging.wait(TIMEOUT)

        return finish

    return save


def _by_dcp(loop: Loop, folder: Path) -> Save:
    """DCP as it comes: its default stager, no process group."""

    def save(step: int) -> Callable[[], object]:
        saving = async_save(loop.state_dict(), checkpoint_id=folder / str(step), no_dist=True)

        def finish() -> None:
            (saving.upload_completion if isinstance(saving, AsyncSaveResponse) else saving).result()
            shutil.rmtree(folder / str(step))

        return finish

    return save


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dtruntime-gpucheck-") as folder:
        yield Path(folder)
