"""What one rank needs of a committed checkpoint, and the memory that it is read into.

First the part manifests, the names and shapes, and the lengths of the files; then memory, so that no manifest can make a
reader allocate more than the files justify; then the bytes, each chunk checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint import catalog, objects
from dtruntime_torch.checkpoint.loading.assembly import Assembled, Staged
from dtruntime_torch.checkpoint.loading.chunk_needs import Needs, needs_of, runs_of
from dtruntime_torch.checkpoint.loading.home_reader import read_home
from dtruntime_torch.checkpoint.loading.landings import Landings, find_landings
from dtruntime_torch.checkpoint.loading.load_plan import SavedState, index_parts, make_load_plan
from dtruntime_torch.checkpoint.loading.node_shares import Shares, divide
from dtruntime_torch.checkpoint.loading.placement import place
from dtruntime_torch.checkpoint.loading.share_reader import check_headers, check_sizes, explain, read_share
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
        parts: rank that saved -> its part; not all of them, if fewer tell everything.
        saved: all that it holds for this rank, though not each shard of it.
        wanted: what was asked for, and how it differs from what is held.
        plan: the boxes to read; none where anything differs.
        homes: fqn -> memory that a wanted shard is read straight into, as `Targets.homes` gives it.
        landings: how these are read.
        needs: the chunks that boxes of the other shards touch.
    """

    manifest: Manifest
    parts: dict[int, Part]
    saved: SavedState
    wanted: Wanted
    plan: LoadPlan
    homes: Mapping[str, torch.Tensor]
    landings: Landings
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
    world_size: int | None = None,
) -> Contents:
    """Reads what a checkpoint holds, and finds what is wanted of it; its data is not read.

    A rank of as many as saved reads its own part and those that complete it, which name all that there is; the others only
    if it wants more of it than it saved.

    Args:
        backend: where it lies.
        commit: names it.
        rank: whose leaves to take of those that differ by rank.
        want: chooses, given all that the checkpoint holds; asked again if more parts had to be read.
        find_homes: which of that has memory that it may be read straight into; asked if nothing differs.
        world_size: the number of ranks that load; None for one that wants everything.

    Raises:
        CorruptCheckpoint: a manifest is damaged, or a data file that is needed is missing or has another length.
    """
    manifest = await catalog.read_manifest(backend, commit)
    everyone = set(range(manifest.world_size))
    parts = await _read_parts(backend, manifest, {rank} if world_size == len(everyone) else everyone)
    if len(parts) < len(everyone):
        parts |= await _read_parts(backend, manifest, parts[rank].completed_by)
    try:
        saved, wanted, plan = _compare(parts, rank, want)
    except CorruptCheckpoint:
        # Not all that is wanted is in these, or they are damaged: then the other parts do not help.
        if len(parts) == len(everyone):
            raise
        parts |= await _read_parts(backend, manifest, everyone.difference(parts))
        saved, wanted, plan = _compare(parts, rank, want)
    if wanted.differences:
        return Contents(manifest, parts, saved, wanted, plan, {}, Landings(), {})
    runs = runs_of(parts, needs_of(plan, parts))
    refuse_damage(manifest, await check_sizes(backend, manifest.name, parts, runs))
    homes = find_homes()
    others = LoadPlan(tuple(item for item in plan.items if item.wanted.fqn not in homes))
    landings = find_landings(plan, homes.keys(), parts)
    return Contents(manifest, parts, saved, wanted, plan, homes, landings, needs_of(others, parts))


def _compare(
    parts: Mapping[int, Part], rank: int, want: Callable[[SavedState], Wanted]
) -> tuple[SavedState, Wanted, LoadPlan]:
    """What there is, what is wanted of it, and the boxes to read; none where anything differs.

    Raises:
        CorruptCheckpoint: the parts contradict each other, or lack something that is wanted.
    """
    saved = index_parts(parts, rank)
    wanted = want(saved)
    return saved, wanted, LoadPlan(()) if wanted.differences else make_load_plan(saved, parts, wanted.tensors)


async def _read_parts(backend: StorageBackend, manifest: Manifest, ranks: Iterable[int]) -> dict[int, Part]:
    """Reads the part manifests of ranks that saved: rank -> its part.

    Raises:
        CorruptCheckpoint: one is damaged.
    """
    chosen = sorted(ranks)
    read = await asyncio.gather(*(catalog.read_part(backend, manifest, rank) for rank in chosen))
    return dict(zip(chosen, read, strict=True))


async def with_parts_of(backend: StorageBackend, contents: Contents, needs: Iterable[Needs]) -> Contents:
    """The same, with all parts that these needs of any ranks are of.

    Raises:
        CorruptCheckpoint: one of them is damaged.
    """
    lacking = {part for one in needs for part, _ in one}.difference(contents.parts)
    more = await _read_parts(backend, contents.manifest, lacking)
    return replace(contents, parts={**contents.parts, **more})


async def read_alone(backend: StorageBackend, contents: Contents) -> Staged:
    """Reads all that this rank needs.

    Raises:
        CorruptCheckpoint: with every damaged range that was met.
    """
    return await read_shares(backend, contents, divide([contents.needs], contents.parts), 0)


async def check_home_headers(backend: StorageBackend, contents: Contents) -> None:
    """Compares the headers of the files that `read_homes` reads with the digests that were committed.

    Raises:
        CorruptCheckpoint: with all damage in what is to be read of a file whose header changed, or that cannot be read.
    """
    name, parts, runs = contents.manifest.name, contents.parts, contents.landings.runs(contents.parts)
    suspects = await check_headers(backend, name, parts, dict.fromkeys(run.path for run in runs))
    refuse_damage(contents.manifest, await explain(backend, name, parts, runs, suspects))


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
    damage = await read_home(
        backend, reader, contents.manifest.name, contents.parts, contents.landings, contents.homes, turn
    )
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
