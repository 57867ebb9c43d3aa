"""Who saves together: an incarnation of a manager, on one process or many."""

from __future__ import annotations

import os
import secrets
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from dtruntime_torch.barrier import Barrier
from dtruntime_torch.errors import InvalidArgument

RUN_ID_BYTES = 16

HashStore = dist.HashStore  # type: ignore[attr-defined]  # public, but torch's module does not list it


@dataclass(frozen=True, slots=True)
class Membership:
    """The ranks of one incarnation.

    Attributes:
        barrier: where they meet; its keys are this incarnation's alone.
        rank: this process among them.
        world_size: how many they are.
        run_id: what tells this incarnation from all others, 32 hex digits, the same on all ranks.
    """

    barrier: Barrier
    rank: int
    world_size: int
    run_id: str


def join(
    process_group: dist.ProcessGroup | None = None,
    store: Store | None = None,
    timeout: float = 600.0,
) -> Membership:
    """Founds an incarnation. Collective over the process group, if there is one.

    Its id is drawn anew each time, since torchrun's restart count is kept per agent and comes back.

    Args:
        process_group: the ranks that save together; None for all.
        store: a Store that these ranks share; None for the one that the process group was made with. A HashStore
            is in the memory of this process, so that nobody else can be with it there.
        timeout: seconds, as for `Barrier`.

    Returns:
        The ranks of the process group; this process alone where torch.distributed is not initialised, or with a
        HashStore.

    Raises:
        InvalidArgument: this process is not in the process group.

    Example:
        >>> members = join()
        >>> members.rank, members.world_size, len(members.run_id)
        (0, 1, 32)
    """
    if isinstance(store, HashStore):
        return _found(store, 0, 1, secrets.token_bytes(RUN_ID_BYTES), timeout)
    if not dist.is_initialized():
        _warn_if_launched_with_others()
        return _found(HashStore(), 0, 1, secrets.token_bytes(RUN_ID_BYTES), timeout)
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise InvalidArgument(
            f"rank {dist.get_rank()} is not in the process group; only its members may save together"
        )
    if store is None:
        store = _default_store()
    return _found(store, rank, dist.get_world_size(process_group), _agree_on_id(process_group), timeout)


def _found(store: Store, rank: int, world_size: int, drawn: bytes, timeout: float) -> Membership:
    run_id = drawn.hex()
    barrier = Barrier(PrefixStore(f"dtruntime/{run_id}", store), rank, world_size, timeout)
    return Membership(barrier, rank, world_size, run_id)


def _agree_on_id(group: dist.ProcessGroup | None) -> bytes:
    """Rank 0 draws, the others are told; as a tensor, for `broadcast_object_list` would pickle."""
    drawn = torch.frombuffer(bytearray(secrets.token_bytes(RUN_ID_BYTES)), dtype=torch.uint8)
    told = drawn.to(_device_of(group))
    dist.broadcast(told, group=group, group_src=0)
    return bytes(told.tolist())


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """A device that the group can communicate from, the host if it can."""
    devices = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    accelerator = torch.accelerator.current_accelerator()
    if "cpu" in devices or accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _default_store() -> Store:
    # The only private name of torch that we use. There is no public way to the Store that init_process_group made,
    # and one of our own would need a port and an address that we do not have.
    return dist.distributed_c10d._get_default_store()


def _warn_if_launched_with_others() -> None:
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != "1" and "TORCHELASTIC_RUN_ID" in os.environ:
        warnings.warn(
            f"torchrun started {launched} processes, but torch.distributed is not initialised: this one saves "
            f"alone. Call torch.distributed.init_process_group() first if they are to save together",
            RuntimeWarning,
            stacklevel=4,
        )
