"""The user's metadata to strict JSON and back: as it is, but for floats that JSON lacks.

A loss that became NaN must not cost a save, and `null` in its place would be another value. So NaN and the infinities
are tagged as `objects` tags them, and so is an object that could be taken for a tag. All else stays what it was, for
everybody who reads a manifest with `jq`.
"""

from __future__ import annotations

import math
import re
import struct
from typing import TypeGuard

from dtruntime_torch.checkpoint.format.strict_json import Refused
from dtruntime_torch.checkpoint.objects import MAX_DEPTH, Json

_NOT_FINITE = re.compile(r"[7f]ff[0-9a-f]{13}")


def metadata_to_json(value: Json) -> Json:
    """Encodes metadata as strict JSON.

    Raises:
        Refused: more than 64 containers lie in each other.

    Example:
        >>> metadata_to_json({"loss": float("inf"), "step": 3})
        {'loss': {'~': 'float', 'v': '7ff0000000000000'}, 'step': 3}
    """
    return _encode(value, 0)


def metadata_from_json(value: Json) -> Json:
    """Decodes what `metadata_to_json` gave. What has no tag of ours is taken as it is.

    Raises:
        Refused: it is nested too deep.

    Example:
        >>> metadata_from_json({"loss": {"~": "float", "v": "7ff0000000000000"}, "step": 3})
        {'loss': inf, 'step': 3}
    """
    try:
        return _decode(value)
    except RecursionError:
        raise Refused("its metadata is nested too deep") from None


def _encode(value: Json, depth: int) -> Json:
    if isinstance(value, float) and not math.isfinite(value):
        return {"~": "float", "v": struct.pack(">d", value).hex()}
    if not isinstance(value, (list, dict)):
        return value
    if depth == MAX_DEPTH:
        raise Refused(f"it has more than {MAX_DEPTH} containers in each other")
    if isinstance(value, list):
        return [_encode(item, depth + 1) for item in value]
    encoded = {key: _encode(item, depth + 1) for key, item in value.items()}
    return _tagged_dict(encoded) if "~" in encoded else encoded


def _tagged_dict(encoded: dict[str, Json]) -> Json:
    """Sorted like the keys of any object, so that equal metadata has equal bytes."""
    return {"~": "dict", "v": [[key, encoded[key]] for key in sorted(encoded)]}


def _decode(value: Json) -> Json:
    match value:
        case list():
            return [_decode(item) for item in value]
        case {"~": "float", "v": str(text), **rest} if not rest and _NOT_FINITE.fullmatch(text):
            return float(struct.unpack(">d", bytes.fromhex(text))[0])
        case {"~": "dict", "v": list(pairs), **rest} if not rest and _are_pairs(pairs):
            return {key: _decode(item) for key, item in pairs}
        case dict():
            return {key: _decode(item) for key, item in value.items()}
    return value


def _are_pairs(items: list[Json]) -> TypeGuard[list[tuple[str, Json]]]:
    """Whether each is a list of a key and a value."""
    return all(isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in items)
