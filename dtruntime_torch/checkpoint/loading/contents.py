"""What one rank needs of a committed checkpoint, and the memory that it is read into.

First the part manifests, the names and shapes, and the lengths of the files; then memory, so that no manifest can make a
reader allocate more than the files justify; then the bytes, each chunk checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint import catalog, objects
from dtruntime_torch.checkpoint.loading.assembly import Assembled, Staged
from dtruntime_torch.checkpoint.loading.chunk_needs import Needs, needs_of, runs_of
from dtruntime_torch.checkpoint.loading.home_reader import read_home
from dtruntime_torch.checkpoint.loading.landings import find_landings
from dtruntime_torch.checkpoint.loading.load_plan import SavedState, index_parts, make_load_plan
from dtruntime_torch.checkpoint.loading.node_shares import Shares, divide
from dtruntime_torch.checkpoint.loading.placement import place
from dtruntime_torch.checkpoint.loading.share_reader import check_sizes, read_share
from dtruntime_torch.checkpoint.loading.targets import Wanted
from dtruntime_torch.checkpoint.manifest import Commit, Manifest, Part
from dtruntime_torch.checkpoint.specs import LoadPlan
from dtruntime_torch.errors import CorruptCheckpoint, Damage
from dtruntime_torch.storage.backend import ReadsChunks, StorageBackend


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds, and what of it one rank needs.

    Attributes:
        manifest: of the checkpoint.
        parts: rank that saved -> its part.
        saved: all that it holds for this rank.
        wanted: what was asked for, and how it differs from what is held.
        plan: the boxes to read; none where anything differs.
        homes: fqn -> memory that a wanted shard is read straight into, as `Targets.homes` gives it.
        needs: the chunks that boxes of the other shards touch.
    """

    manifest: Manifest
    parts: dict[int, Part]
    saved: SavedState
    wanted: Wanted
    plan: LoadPlan
    homes: Mapping[str, torch.Tensor]
    needs: Needs

    def values(self) -> dict[str, object]:
        """The wanted objects: fqn -> value."""
        return {fqn: objects.decode(self.saved.objects[fqn].value, where=fqn) for fqn in self.wanted.objects}

    def tensors(self, staged: Staged) -> Assembled:
        """The wanted shards, on the host, where possible on the memory that they were read into."""
        return Assembled(self.plan, self.wanted.tensors, self.parts, staged, self.homes)


async def survey_contents(
    backend: StorageBackend,
    commit: Commit,
    rank: int,
    want: Callable[[SavedState], Wanted],
    find_homes: Callable[[], Mapping[str, torch.Tensor]] = dict,
) -> Contents:
    """Reads what a checkpoint holds, and finds what is wanted of it; its data is not read.

    Args:
        backend: where it lies.
        commit: names it.
        rank: whose leaves to take of those that differ by rank.
        want: chooses, given all that the checkpoint holds.
        find_homes: which of that has memory that it may be read straight into; asked if nothing differs.

    Raises:
        CorruptCheckpoint: a manifest is damaged, or a data file that is needed is missing or has another length.
    """
    manifest = await catalog.read_manifest(backend, commit)
    ranks = range(manifest.world_size)
    read = await asyncio.gather(*(catalog.read_part(backend, manifest, r) for r in ranks))
    parts = dict(zip(ranks, read, strict=True))
    saved = index_parts(parts, rank)
    wanted = want(saved)
    if wanted.differences:
        return Contents(manifest, parts, saved, wanted, LoadPlan(()), {}, {})
    plan = make_load_plan(saved, parts, wanted.tensors)
    runs = runs_of(parts, needs_of(plan, parts))
    refuse_damage(manifest, await check_sizes(backend, manifest.name, parts, runs))
    homes = find_homes()
    others = LoadPlan(tuple(item for item in plan.items if item.wanted.fqn not in homes))
    return Contents(manifest, parts, saved, wanted, plan, homes, needs_of(others, parts))


async def read_alone(backend: StorageBackend, contents: Contents) -> Staged:
    """Reads all that this rank needs.

    Raises:
        CorruptCheckpoint: with every damaged range that was met.
    """
    return await read_shares(backend, contents, divide([contents.needs], contents.parts), 0)


async def read_homes(
    backend: StorageBackend, reader: ReadsChunks, contents: Contents, turn: tuple[int, int]
) -> None:
    """Reads what has memory of its own straight into that.

    Args:
        backend: where the checkpoint lies.
        reader: the same, as what reads chunks.
        contents: of this rank.
        turn: which of how many ranks of the host this is.

    Raises:
        CorruptCheckpoint: with every damaged range that was met; the memory is undefined then.
    """
    landings = find_landings(contents.plan, contents.homes.keys(), contents.parts)
    name = contents.manifest.name
    damage = await read_home(backend, reader, name, contents.parts, landings, contents.homes, turn)
    refuse_damage(contents.manifest, damage)


async def read_shares(
    backend: StorageBackend,
    contents: Contents,
    shares: Shares,
    position: int,
    common: Sequence[_C.Arena] = (),
) -> Staged:
    """Reads what one rank of a node alone needs, and its share of what several of them do.

    Args:
        backend: where the checkpoint lies.
        contents: of this rank.
        shares: of the ranks of the node.
        position: of this rank among them.
        common: the memory of each rank for its share of what several need, none if nothing is.

    Returns:
        Where everything lies that this rank may need; what others read is there once they have said so.

    Raises:
        CorruptCheckpoint: with every damaged range that was met.
    """
    name, parts = contents.manifest.name, contents.parts
    staged = Staged()
    headers, damage = shares.files_of(position), []
    for reader, arena in enumerate(common):
        placement, memory = place(shares.common[reader]), memoryview(arena)
        staged.add(placement.runs, memory)
        if reader == position:
            damage += await read_share(backend, name, parts, placement, memory, headers)
            headers = []
    placement = place(shares.own[position])
    # A device takes from pinned memory what the driver would else copy once more.
    pin: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    memory = memoryview(_C.Arena(max(1, placement.nbytes), pin=pin))
    damage += await read_share(backend, name, parts, placement, memory, headers)
    staged.add(placement.runs, memory)
    refuse_damage(contents.manifest, damage)
    return staged


def refuse_damage(manifest: Manifest, damage: Sequence[Damage]) -> None:
    """Raises if there is damage.

    Raises:
        CorruptCheckpoint: naming all of it.
    """
    if damage:
        raise CorruptCheckpoint(
            f"step {manifest.step} of {manifest.name} is damaged: {'; '.join(map(str, damage))}", damage
        )
