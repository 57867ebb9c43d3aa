"""Specs, parts and the states of whole worlds, as short as a test of plans wants to write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from dtruntime_torch.checkpoint.format.records import ObjectEntry, Part, TensorEntry
from dtruntime_torch.checkpoint.saving.save_plan import make_save_plan
from dtruntime_torch.checkpoint.specs import FlatSpecs, ObjectSpec, PathKey, SavePlan, Shape, TensorSpec

Box = tuple[Shape, Shape]
State = dict[str, TensorSpec | ObjectSpec]
Maker = Callable[[st.DrawFn, str, Sequence[int]], Mapping[int, TensorSpec | ObjectSpec]]


def tensor(fqn: str, *shape: int, dtype: str = "float32", **more: object) -> TensorSpec:
    """A plain tensor."""
    spec = TensorSpec(fqn, (PathKey("dict", fqn),), 0, dtype, shape, (0,) * len(shape), shape)
    return replace(spec, **more)  # type: ignore[arg-type]


def obj(fqn: str, per_rank: bool = False) -> ObjectSpec:
    """A leaf that is no tensor."""
    return ObjectSpec(fqn, (PathKey("dict", fqn),), 0, per_rank)


def flat(*specs: TensorSpec | ObjectSpec) -> FlatSpecs:
    """A structure with these leaves in this order."""
    numbered = [replace(spec, index=index) for index, spec in enumerate(specs)]
    return FlatSpecs(
        tuple(spec for spec in numbered if isinstance(spec, TensorSpec)),
        tuple(spec for spec in numbered if isinstance(spec, ObjectSpec)),
    )


def plans_of(states: Sequence[FlatSpecs], representative: int = 0) -> list[SavePlan]:
    """What each rank computes alone when rank r holds states[r]."""
    members: dict[str, list[int]] = {}
    for rank, specs in enumerate(states):
        members.setdefault(_signature(specs), []).append(rank)
    plans = []
    for rank, specs in enumerate(states):
        # Whoever speaks for a group, and in whichever order the groups come, the plan is to be the same.
        order = sorted(members, key=lambda signature: (hash((signature, rank)), signature))
        speaks = {s: members[s][(representative + rank) % len(members[s])] for s in order}
        plans.append(
            make_save_plan(
                rank,
                len(states),
                specs,
                {s: states[speaks[s]] for s in order},
                {s: tuple(members[s]) for s in order},
            )
        )
    return plans


def _signature(specs: FlatSpecs) -> str:
    alike = [replace(spec, offsets=(), shape=(), holders=None) for spec in specs.tensors]
    kinds = [spec.holders is None for spec in specs.tensors]
    return repr((alike, kinds, specs.objects))


@dataclass(frozen=True)
class World:
    """What each rank holds, by rank and then by fqn."""

    states: tuple[FlatSpecs, ...]


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
dtypes = st.sampled_from(["uint8", "bfloat16", "float32", "float64", "complex128"])


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Ranks that hold plain tensors, DTensors on any mesh or on two, objects; each of them on some of the ranks."""
    world_size = draw(st.integers(1, 6))
    held: list[State] = [{} for _ in range(world_size)]
    for number in range(draw(st.integers(0, 8))):
        ranks = draw(st.lists(st.integers(0, world_size - 1), min_size=1, unique=True))
        makers: list[Maker] = [_plain, _sharded, _object]
        make = draw(st.sampled_from(makers))
        for rank, spec in make(draw, f"leaf{number}", ranks).items():
            held[rank][spec.fqn] = spec
    order = draw(st.permutations(range(8)))
    return World(tuple(flat(*(s[f"leaf{n}"] for n in order if f"leaf{n}" in s)) for s in held))


def _plain(draw: st.DrawFn, fqn: str, ranks: Sequence[int]) -> Mapping[int, TensorSpec]:
    kind = draw(st.sampled_from([{}, {"spread": True}, {"per_rank": True}]))
    spec = tensor(fqn, *draw(shapes), dtype=draw(dtypes), **kind)
    return dict.fromkeys(ranks, spec)


def _object(draw: st.DrawFn, fqn: str, ranks: Sequence[int]) -> Mapping[int, ObjectSpec]:
    return dict.fromkeys(ranks, obj(fqn, per_rank=draw(st.booleans())))


def _sharded(draw: st.DrawFn, fqn: str, ranks: Sequence[int]) -> Mapping[int, TensorSpec]:
    """A DTensor, of which some of the ranks may hold all on a mesh of their own."""
    shape, dtype, spread = (draw(st.integers(0, 7)), *draw(shapes)), draw(dtypes), draw(st.booleans())
    cut = draw(st.sampled_from([len(ranks), draw(st.integers(1, len(ranks)))]))
    meshes = [mesh for mesh in (ranks[:cut], ranks[cut:]) if mesh]
    return {
        rank: spec
        for mesh in meshes
        for rank, spec in _on_mesh(draw, fqn, mesh, shape, dtype=dtype, spread=spread).items()
    }


def _on_mesh(
    draw: st.DrawFn, fqn: str, ranks: Sequence[int], shape: Shape, **more: object
) -> Mapping[int, TensorSpec]:
    """On a mesh of shards times replicas, cut along dimension 0 as torch.chunk cuts."""
    n_shards = draw(st.sampled_from([n for n in range(1, len(ranks) + 1) if len(ranks) % n == 0]))
    rows = -(-shape[0] // n_shards)
    specs = {}
    for position, rank in enumerate(ranks):
        shard = position % n_shards
        start = min(shard * rows, shape[0])
        specs[rank] = tensor(
            fqn,
            *shape,
            layout=f"{ranks} {n_shards}",
            offsets=(start, *(0 for _ in shape[1:])),
            shape=(min(start + rows, shape[0]) - start, *shape[1:]),
            holders=tuple(sorted(ranks[shard::n_shards])),
            first_holders=tuple(sorted(ranks[::n_shards])),
            **more,
        )
    return specs


def part_of(rank: int, *entries: TensorEntry | ObjectEntry, chunk_bytes: int = 64) -> Part:
    """The part of a rank; its data file is of no interest."""
    return Part(
        rank=rank,
        world_size=99,
        generation=1,
        step=1,
        attempt="step-00000001/0001-1",
        chunk_bytes=chunk_bytes,
        files=(),
        tensors=tuple(entry for entry in entries if isinstance(entry, TensorEntry)),
        objects=tuple(entry for entry in entries if isinstance(entry, ObjectEntry)),
        completed_by=(),
    )


def stored(fqn: str, global_shape: Shape, box: Box | None = None, **more: object) -> TensorEntry:
    """A stored shard; its extents are of no interest."""
    offsets, shape = box or ((0,) * len(global_shape), global_shape)
    entry = TensorEntry(
        fqn=fqn,
        path=(PathKey("dict", fqn),),
        index=0,
        name=fqn,
        dtype="int64",
        global_shape=global_shape,
        offsets=offsets,
        shape=shape,
        per_rank=False,
        alias=None,
        is_bytes=False,
        extents=(),
        digests=b"",
    )
    return replace(entry, **more)  # type: ignore[arg-type]


def stored_object(fqn: str, value: int = 0, per_rank: bool = False) -> ObjectEntry:
    """A stored object."""
    return ObjectEntry(fqn, (PathKey("dict", fqn),), 0, per_rank, value)
