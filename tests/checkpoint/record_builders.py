"""Sound records, by hand and by hypothesis, for the tests of the format."""

from __future__ import annotations

import hashlib
from itertools import pairwise

from hypothesis import strategies as st

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.dtypes import itemsize
from dtruntime_torch.checkpoint.manifest import (
    Commit,
    FileRef,
    Generation,
    Manifest,
    ObjectEntry,
    Part,
    PartRef,
    TensorEntry,
    encode_manifest,
)
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.specs import Extent, Path, PathKey

ATTEMPT = "step-00000100/0007-1"
BASE = "step-00000090/0007-1"
CREATED = "2026-01-02T03:04:05+00:00"
RUN_ID = "00112233445566778899aabbccddeeff"
SHA = "0123456789abcdef" * 4


def digests(count: int) -> bytes:
    """That many different digests; of nothing in particular."""
    return b"".join(hashlib.md5(bytes([i % 256])).digest() for i in range(count))


def sample_part() -> Part:
    """A full save of rank 1 of 2: a sharded tensor, an empty one, two that differ by rank, and objects."""
    return Part(
        rank=1,
        world_size=2,
        generation=7,
        step=100,
        attempt=ATTEMPT,
        chunk_bytes=16,
        files=(FileRef(f"{ATTEMPT}/shard-00001-of-00002.safetensors", 128 + 45, 128, digests(1)),),
        tensors=(
            TensorEntry(
                fqn="model.weight",
                path=(PathKey("dict", "model"), PathKey("dict", "weight")),
                index=0,
                name="model.weight",
                dtype="float32",
                global_shape=(4, 5),
                offsets=(2, 0),
                shape=(2, 5),
                per_rank=False,
                alias=None,
                is_bytes=False,
                extents=(Extent(0, 128, 40),),
                digests=digests(3),
            ),
            TensorEntry(
                fqn="queue.0",
                path=(PathKey("dict", "queue"), PathKey("list", 0)),
                index=2,
                name="queue.0",
                dtype="complex64",
                global_shape=(0, 3),
                offsets=(0, 0),
                shape=(0, 3),
                per_rank=False,
                alias="queue.1",
                is_bytes=False,
                extents=(),
                digests=b"",
            ),
            TensorEntry(
                fqn="rng",
                path=(PathKey("dict", "rng"),),
                index=3,
                name="rng.rank-00001",
                dtype="uint8",
                global_shape=(5,),
                offsets=(0,),
                shape=(5,),
                per_rank=True,
                alias=None,
                is_bytes=True,
                extents=(Extent(0, 168, 5),),
                digests=digests(1),
            ),
        ),
        objects=(
            ObjectEntry("lr", (PathKey("dict", "lr"),), 4, False, 0.001),
            ObjectEntry(
                "groups.1",
                (
                    PathKey("dict", "groups"),
                    PathKey("tuple", 1),
                    PathKey("dict", (1, b"k")),
                    PathKey("ordered_dict", "n"),
                ),
                5,
                True,
                objects.encode({"a": (1, 2**70)}, "groups"),
            ),
        ),
        completed_by=(0,),
    )


def sample_delta() -> Part:
    """The changed chunks of one tensor in a pack of its own, the others where an earlier save put them."""
    extents = (Extent(0, 64, 16), Extent(1, 64, 16), Extent(0, 96, 8))
    return Part(
        rank=0,
        world_size=1,
        generation=7,
        step=100,
        attempt=ATTEMPT,
        chunk_bytes=16,
        files=(
            FileRef(f"{BASE}/shard-00000-of-00001.safetensors", 104, 64, digests(1)),
            FileRef(f"{ATTEMPT}/shard-00000-of-00001.delta", 80, 64, digests(1)),
        ),
        tensors=(
            TensorEntry(
                "w",
                (PathKey("dict", "w"),),
                0,
                "w",
                "int64",
                (5,),
                (0,),
                (5,),
                False,
                None,
                False,
                extents,
                digests(3),
            ),
        ),
        objects=(),
        completed_by=(),
    )


def sample_manifest() -> Manifest:
    """Of a full save of two ranks."""
    return Manifest(
        name="model",
        generation=7,
        step=100,
        attempt=ATTEMPT,
        run_id=RUN_ID,
        parent=CommitKey(6, 90),
        world_size=2,
        full=True,
        uses=(ATTEMPT,),
        requires=(),
        created=CREATED,
        versions={"dtruntime_torch": "0.1.0", "torch": "2.13.0"},
        metadata={"loss": 2.5, "tags": ["a", None, True]},
        nbytes=90,
        written=346,
        parts=(
            PartRef(0, "shard-00000-of-00002.json", 1234, SHA, 173),
            PartRef(1, "shard-00001-of-00002.json", 1235, SHA[::-1], 173),
        ),
    )


def sample_commit() -> Commit:
    """Of `sample_manifest`."""
    return Commit("model", 7, 100, ATTEMPT, hashlib.sha256(encode_manifest(sample_manifest())).hexdigest())


def sample_void() -> Commit:
    """A step that was given up."""
    return Commit("model", 7, 100, "", "", void=True)


def sample_generation() -> Generation:
    """The record of generation 7."""
    return Generation(7, RUN_ID, "node-3.cluster", 4711, CREATED)


def plain_values(hashable: bool = False) -> st.SearchStrategy[object]:
    """Anything that `objects` encodes, nested; without NaN, which equals nothing."""
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(2**200), 2**200)
        | st.floats(allow_nan=False)
        | st.text(st.characters(exclude_categories=()), max_size=8)
        | st.binary(max_size=8)
        | st.complex_numbers(allow_nan=False)
    )
    # Two levels, not `st.recursive`: one of these in another makes hypothesis lose count now and then.
    flat = scalars | st.frozensets(scalars, max_size=3)
    pairs = st.lists(flat, max_size=2).map(tuple)
    keys = flat | st.lists(flat | pairs, max_size=3).map(tuple)
    if hashable:
        return keys
    return st.recursive(
        scalars | st.sets(keys, max_size=4),
        lambda inner: st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4),
        max_leaves=12,
    )


def json_values(allow_nan: bool = False) -> st.SearchStrategy[Json]:
    """Any JSON, and any float, that is kept exactly; much of it looks like a tag. NaN equals nothing."""
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(2**53) + 1, 2**53 - 1)
        | st.floats(allow_nan=allow_nan)
        | st.text(max_size=6)
        | st.sampled_from(["float", "dict", "7ff0000000000000"])
    )
    keys = st.text(max_size=4) | st.sampled_from(["~", "v"])
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=8,
    )


def paths() -> st.SearchStrategy[Path]:
    """Ways into nested dicts, lists and tuples."""
    steps = st.builds(
        PathKey, st.sampled_from(["dict", "ordered_dict"]), plain_values(hashable=True)
    ) | st.builds(PathKey, st.sampled_from(["list", "tuple"]), st.integers(0, 99))
    return st.lists(steps, max_size=4).map(tuple)


@st.composite
def parts(draw: st.DrawFn) -> Part:
    """Parts of full saves: tensors one after the other in one file."""
    chunk_bytes = draw(st.integers(1, 40))
    fqns = draw(st.lists(st.text(st.characters(exclude_categories=()), max_size=6), max_size=6, unique=True))
    cut = draw(st.integers(0, len(fqns)))
    sizes = [draw(_boxes()) for _ in fqns[:cut]]
    ends = [128]
    entries = []
    for index, (fqn, (dtype, whole, offsets, shape)) in enumerate(zip(fqns, sizes, strict=False)):
        entry = TensorEntry(
            fqn=fqn,
            path=draw(paths()),
            index=index,
            name=f"tensor-{index}",
            dtype=dtype,
            global_shape=whole,
            offsets=offsets,
            shape=shape,
            per_rank=draw(st.booleans()),
            alias=draw(st.sampled_from([None, f"{fqn}.twin"])),
            is_bytes=dtype == "uint8" and len(shape) == 1 and draw(st.booleans()),
            extents=(),
            digests=b"",
        )
        entries.append(_placed(draw, entry, ends[-1], chunk_bytes))
        ends.append(ends[-1] + entry.nbytes)
    values = tuple(
        ObjectEntry(
            fqn, draw(paths()), cut + i, draw(st.booleans()), objects.encode(draw(plain_values()), fqn)
        )
        for i, fqn in enumerate(fqns[cut:])
    )
    world_size = draw(st.integers(1, 12))
    rank = draw(st.integers(0, world_size - 1))
    file = FileRef(
        f"{ATTEMPT}/shard-{rank:05}-of-{world_size:05}.safetensors",
        ends[-1],
        128,
        draw(st.binary(min_size=16, max_size=16)),
    )
    others = tuple(sorted(draw(st.sets(st.integers(0, world_size - 1))) - {rank}))
    return Part(rank, world_size, 7, 100, ATTEMPT, chunk_bytes, (file,), tuple(entries), values, others)


def _placed(draw: st.DrawFn, entry: TensorEntry, start: int, chunk_bytes: int) -> TensorEntry:
    """With extents in a row from `start`, cut at some borders of chunks."""
    chunks = -(-entry.nbytes // chunk_bytes)
    cuts = draw(st.sets(st.integers(1, chunks - 1), max_size=3)) if chunks > 1 else set()
    borders = [0, *sorted(cut * chunk_bytes for cut in cuts), entry.nbytes]
    extents = tuple(Extent(0, start + a, b - a) for a, b in pairwise(borders) if b > a)
    fields = {name: getattr(entry, name) for name in TensorEntry.__slots__}
    return TensorEntry(**{**fields, "extents": extents, "digests": digests(chunks)})


@st.composite
def _boxes(draw: st.DrawFn) -> tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    dtype = draw(st.sampled_from(["bool", "uint8", "bfloat16", "float32", "int64", "complex128"]))
    whole = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    offsets = tuple(draw(st.integers(0, size)) for size in whole)
    shape = tuple(draw(st.integers(0, size - start)) for size, start in zip(whole, offsets, strict=True))
    assert itemsize(dtype)
    return dtype, whole, offsets, shape


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Manifests of full saves and of deltas."""
    generation, step = draw(st.integers(0, 10**6)), draw(st.integers(1, 10**12))
    attempt = f"step-{step:08}/{generation:04}-{draw(st.integers(1, 12))}"
    parent = draw(st.none() | st.just(CommitKey(generation, step - 1)))
    full = parent is None or draw(st.booleans())
    others = () if full else tuple(f"step-00000000/0000-{n}" for n in range(draw(st.integers(0, 3))))
    world_size = draw(st.integers(1, 4))
    return Manifest(
        name=draw(st.text("aZ09_-", min_size=1, max_size=100)),
        generation=generation,
        step=step,
        attempt=attempt,
        run_id=RUN_ID,
        parent=parent,
        world_size=world_size,
        full=full,
        uses=(attempt, *others),
        requires=(),
        created=CREATED,
        versions=draw(
            st.dictionaries(st.text("abc", max_size=3), st.text("0123.+cu", max_size=8), max_size=3)
        ),
        metadata=draw(json_values()),
        nbytes=draw(st.integers(0, 2**53 - 1)),
        written=draw(st.integers(0, 2**53 - 1)),
        parts=tuple(
            PartRef(
                rank,
                f"shard-{rank:05}-of-{world_size:05}.json",
                draw(st.integers(1, 2**40)),
                SHA,
                draw(st.integers(0, 2**40)),
            )
            for rank in range(world_size)
        ),
    )
