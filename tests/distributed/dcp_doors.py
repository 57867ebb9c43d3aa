"""Stock reader and writer beside ours: what a scenario does must come out the same through either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.distributed.tensor import DTensor

import dtruntime_torch as dt

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Doors:
    """Where a scenario saves and loads.

    Attributes:
        folder: of the scenario.
        ours: through our writer and reader, otherwise through stock ones.
        hugging_face: the one that reads what is written, or writes what is read, is that for safetensors files.
    """

    folder: Path
    ours: bool
    hugging_face: Literal["writes", "reads"] | None = None

    def writer(self, name: str = "one", *, overwrite: bool = False) -> StorageWriter:
        """Writes to a folder of that name."""
        place = self.folder / name
        if self.hugging_face == "writes":
            return HuggingFaceStorageWriter(str(place), save_distributed=True)
        if self.ours:
            return dt.StorageWriter(place, overwrite=overwrite)
        return FileSystemWriter(place, overwrite=overwrite)

    def reader(self, name: str = "one") -> StorageReader:
        """Reads what was written there."""
        place = self.folder / name
        if self.hugging_face == "reads":
            return HuggingFaceStorageReader(str(place))
        return dt.StorageReader(place) if self.ours else FileSystemReader(place)

    def save(self, state: State, name: str = "one", **options: Any) -> None:
        """Saves, on all ranks."""
        dcp_save(state, storage_writer=self.writer(name), **options)

    def load(self, state: State, name: str = "one", **options: Any) -> State:
        """Loads in place, on all ranks."""
        dcp_load(state, storage_reader=self.reader(name), **options)
        return state


Scenario = Callable[[Doors], None]


def through_both(*scenarios: Scenario) -> dict[str, Callable[[Path], None]]:
    """Each by its name, to be run through the stock doors, which shows that it is sound, and then through ours."""
    return {scenario.__name__: partial(_run, scenario) for scenario in scenarios}


def beside_hugging_face(*scenarios: Scenario) -> dict[str, Callable[[Path], None]]:
    """Each twice: what our writer wrote is read by the stock reader for safetensors files, and the other way round."""
    return {
        f"{scenario.__name__}_hugging_face_{side}": partial(_run_beside, scenario, side)
        for scenario in scenarios
        for side in ("writes", "reads")
    }


def _run_beside(scenario: Scenario, side: Literal["writes", "reads"], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    scenario(Doors(folder, True, side))


def _run(scenario: Scenario, folder: Path) -> None:
    for ours in (False, True):
        torch.manual_seed(0)
        scenario(Doors(folder / ("ours" if ours else "stock"), ours))
        dist.barrier()


def whole(value: Any) -> Any:
    """All of a state on every rank, however it is sharded."""
    if isinstance(value, ShardedTensor):
        gathered = torch.zeros(value.size(), dtype=value.dtype)
        for shard in value.local_shards():
            at = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
            gathered[tuple(slice(start, start + size) for start, size in at)] = shard.tensor
        dist.all_reduce(gathered)
        return gathered
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return value


def differences(left: Any, right: Any, at: str = "") -> list[str]:
    """The names under which two whole states differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        names = {**left, **right}
        return [
            found
            for key in names
            for found in differences(left.get(key, "missing"), right.get(key, "missing"), f"{at}.{key}")
        ]
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and torch.equal(left, right)
    else:
        same = type(left) is type(right) and bool(left == right)
    return [] if same else [at]


def assert_same(left: Any, right: Any) -> None:
    """The same, sharded as they may be; called by all ranks."""
    found = differences(whole(left), whole(right))
    assert not found, found
