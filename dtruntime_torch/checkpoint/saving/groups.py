"""Who holds what: ranks whose states are alike form a group, learned through the Store once per structure.

Every rank brings a signature; of each group the lowest rank shows its structure to the others. After that each
rank plans alone. One structure for each group travels, not one for each rank: with a thousand ranks of which all
hold the same, nothing but signatures does.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dtruntime_torch.barrier import Barrier
from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.dtypes import is_known
from dtruntime_torch.checkpoint.format import strict_json
from dtruntime_torch.checkpoint.format.part_json import path_from, path_to_json
from dtruntime_torch.checkpoint.format.strict_json import Fields, Refused
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.specs import FlatSpecs, Members, ObjectSpec, TensorSpec
from dtruntime_torch.errors import CorruptCheckpoint, DTRuntimeError, SaveFailed

MAX_STRUCTURE_BYTES = 256 << 20

_LENGTH = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Groups:
    """What every rank knows of all.

    Attributes:
        members: signature -> the ranks of that group, ascending. Every rank is in one of them.
        specs: signature -> the structure of one of them.
    """

    members: Members
    specs: dict[str, FlatSpecs]


def signature(specs: FlatSpecs) -> str:
    """Digests what is alike on all ranks of a group.

    Left out are offsets, shape and holders of a shard, and of the first one, and the shape of what may differ by rank: bytes and what is
    marked as `per_rank`. A plan that was made for one structure does not fit every other of the same signature.

    Example:
        >>> signature(FlatSpecs((), ()))[:16]
        '20cbc5d4982b7648'
    """
    alike: dict[str, Json] = {
        "tensors": [
            [
                spec.fqn,
                [[step.container, objects.encode(step.key, spec.fqn)] for step in spec.path],
                spec.index,
                spec.dtype,
                [] if spec.per_rank or spec.is_bytes else list(spec.global_shape),
                spec.layout,
                spec.holders is None,
                spec.spread,
                spec.per_rank,
                spec.alias,
                spec.is_bytes,
            ]
            for spec in specs.tensors
        ],
        "objects": [
            [
                leaf.fqn,
                [[step.container, objects.encode(step.key, leaf.fqn)] for step in leaf.path],
                leaf.index,
                leaf.per_rank,
                leaf.is_empty,
            ]
            for leaf in specs.objects
        ],
    }
    return hashlib.sha256(strict_json.dump(alike)).hexdigest()


def differ_only_in_size(one: FlatSpecs, other: FlatSpecs) -> bool:
    """Whether two structures of a rank differ at most in the size of what is its own: bytes, and what is `per_rank`.

    Then what was learnt of the others still holds, and the rank can plan anew by itself.

    Args:
        one: a structure.
        other: another of the same rank.
    """
    if one.objects != other.objects or len(one.tensors) != len(other.tensors):
        return False
    pairs = zip(one.tensors, other.tensors, strict=True)
    return all(a == b or _without_size(a) == _without_size(b) for a, b in pairs)


def _without_size(spec: TensorSpec) -> TensorSpec:
    if not (spec.per_rank or spec.is_bytes):
        return spec
    return replace(spec, global_shape=(), offsets=(), shape=())


def learn(barrier: Barrier, key: str, specs: FlatSpecs, busy_key: str | None = None) -> Groups:
    """Tells all ranks what this one holds, and learns what they hold. All ranks call it.

    Args:
        barrier: of these ranks.
        key: the same on all ranks, used once.
        specs: what this rank holds.
        busy_key: of the meeting to which a rank goes whose structure did not change.

    Raises:
        BarrierTimeout: ranks did not arrive in time.
        SaveFailed: other ranks went to `busy_key`, having seen no change; or they showed what cannot be read.
        SaveSkipped: a rank declared the meeting there void.
        DTRuntimeError: why a rank declined.
    """

    def interrupt() -> DTRuntimeError | None:
        return None if busy_key is None else _alone(barrier, key, busy_key)

    own = signature(specs)
    answer = barrier.meet(key, own.encode(), _group, None if busy_key is None else interrupt)
    members = _read_members(answer, barrier.world_size)
    known = {own: specs}
    if len(members) > 1:
        shown = _pack(specs) if members[own][0] == barrier.rank else b""
        answer = barrier.meet(f"{key}/specs", shown, _join)
        for theirs, packed in zip(members, _split(answer, len(members)), strict=True):
            if theirs != own:
                known[theirs] = _unpack(packed, members[theirs][0])
    return Groups(members, known)


def _alone(barrier: Barrier, key: str, busy_key: str) -> DTRuntimeError | None:
    """Why it is vain to wait for the others at `key`, if it is."""
    if not barrier.has_begun(busy_key):
        return None
    if (reason := barrier.voided(busy_key)) is not None:
        return reason
    here = barrier.arrivals(key)
    for arrival in here.values():
        if isinstance(arrival, DTRuntimeError):
            return arrival
    return SaveFailed(
        f"the structure of the state changed on ranks {sorted(here)} only; when it changes, change it on all "
        f"ranks and call manager.prepare(state) on all of them"
    )


def _group(signatures: Sequence[bytes]) -> bytes:
    members: dict[str, list[int]] = {}
    for rank, own in enumerate(signatures):
        members.setdefault(own.decode("ascii", "replace"), []).append(rank)
    return strict_json.dump({"groups": [[own, list(ranks)] for own, ranks in members.items()]})


def _read_members(answer: bytes, world_size: int) -> dict[str, tuple[int, ...]]:
    try:
        groups = [strict_json.items(pair, "a group", 2) for pair in strict_json.parse(answer).array("groups")]
        members = {
            str(own): tuple(strict_json.whole(rank, "a rank") for rank in strict_json.items(ranks, "ranks"))
            for own, ranks in groups
        }
    except Refused as error:
        raise _unreadable(0, error) from error
    if sorted(rank for ranks in members.values() for rank in ranks) != list(range(world_size)):
        raise _unreadable(0, "its groups are not all ranks")
    return members


def _join(values: Sequence[bytes]) -> bytes:
    """What the representatives brought, in the order of ranks, which is that of the groups."""
    return b"".join(_LENGTH.pack(len(value)) + value for value in values if value)


def _split(joined: bytes, count: int) -> list[bytes]:
    values = []
    position = 0
    while position < len(joined):
        start = position + _LENGTH.size
        position = start + _LENGTH.unpack(joined[position:start].rjust(_LENGTH.size, b"\xff"))[0]
        values.append(joined[start:position])
    if position != len(joined) or len(values) != count:
        raise _unreadable(0, "its answer is cut off")
    return values


def _pack(specs: FlatSpecs) -> bytes:
    structure: dict[str, Json] = {
        "tensors": [_tensor_to_json(spec) for spec in specs.tensors],
        "objects": [
            {
                "fqn": objects.encode(leaf.fqn, "a name"),
                "path": path_to_json(leaf.path),
                "index": leaf.index,
                "per_rank": leaf.per_rank,
                "is_empty": leaf.is_empty,
                "part_of": objects.encode(leaf.part_of, "a name"),
            }
            for leaf in specs.objects
        ],
    }
    return zlib.compress(strict_json.dump(structure), 1)


def _unpack(packed: bytes, rank: int) -> FlatSpecs:
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(packed, MAX_STRUCTURE_BYTES)
        if not inflater.eof:
            raise Refused(f"it is cut off, or larger than {MAX_STRUCTURE_BYTES} bytes")
        fields = strict_json.parse(data)
        return FlatSpecs(
            tuple(_tensor_from(Fields(value, "a tensor")) for value in fields.array("tensors")),
            tuple(_object_from(Fields(value, "an object")) for value in fields.array("objects")),
        )
    except (zlib.error, Refused, CorruptCheckpoint) as error:
        raise _unreadable(rank, error) from error


def _tensor_to_json(spec: TensorSpec) -> Json:
    return {
        "fqn": objects.encode(spec.fqn, "a name"),
        "path": path_to_json(spec.path),
        "index": spec.index,
        "dtype": spec.dtype,
        "global_shape": list(spec.global_shape),
        "offsets": list(spec.offsets),
        "shape": list(spec.shape),
        "layout": spec.layout,
        "holders": None if spec.holders is None else list(spec.holders),
        "first_holders": list(spec.first_holders),
        "spread": spec.spread,
        "per_rank": spec.per_rank,
        "alias": objects.encode(spec.alias, "a name"),
        "is_bytes": spec.is_bytes,
        "part_of": objects.encode(spec.part_of, "a name"),
    }


def _tensor_from(fields: Fields) -> TensorSpec:
    spec = TensorSpec(
        fqn=_text(fields.json("fqn")),
        path=path_from(fields),
        index=fields.integer("index"),
        dtype=fields.string("dtype"),
        global_shape=fields.integers("global_shape"),
        offsets=fields.integers("offsets"),
        shape=fields.integers("shape"),
        layout=fields.string("layout"),
        holders=None if fields.json("holders") is None else fields.integers("holders"),
        first_holders=fields.integers("first_holders"),
        spread=fields.boolean("spread"),
        per_rank=fields.boolean("per_rank"),
        alias=None if fields.json("alias") is None else _text(fields.json("alias")),
        is_bytes=fields.boolean("is_bytes"),
        part_of=_text(fields.json("part_of")),
    )
    if not is_known(spec.dtype):
        raise Refused(f"there is no dtype {spec.dtype[:40]!r}")
    if not len(spec.offsets) == len(spec.shape) == len(spec.global_shape):
        raise Refused(f"the shapes of {spec.fqn!r} differ in dimensions")
    return spec


def _object_from(fields: Fields) -> ObjectSpec:
    return ObjectSpec(
        fqn=_text(fields.json("fqn")),
        path=path_from(fields),
        index=fields.integer("index"),
        per_rank=fields.boolean("per_rank"),
        is_empty=fields.boolean("is_empty"),
        part_of=_text(fields.json("part_of")),
    )


def _text(encoded: Json) -> str:
    text = objects.decode(encoded, "a name")
    if type(text) is not str:
        raise Refused("a name is no string")
    return text


def _unreadable(rank: int, why: object) -> SaveFailed:
    return SaveFailed(
        f"rank {rank} showed a structure that cannot be read: {why}; do all ranks run one version?"
    )
