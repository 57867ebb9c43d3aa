"""A reader of checkpoints written from docs/FORMAT.md alone: the standard library, NumPy and xxhash, nothing of ours.

It is what somebody with another language would write first, so it is also the page's proof.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

KNOWN_FEATURES: set[str] = set()


def read_newest(root: Path, name: str, rank: int) -> dict[str, Any]:
    """Everything of the newest checkpoint by fqn, as rank `rank` sees it; NumPy has no bfloat16."""
    manifest = read_manifest(root / name)
    parts = [read_part(root / name, manifest, ref) for ref in manifest["parts"]]
    found: dict[str, Any] = {}
    for part in parts:
        for leaf in part["objects"]:
            if not leaf["per_rank"] or part["rank"] == rank:
                found[text(leaf["fqn"])] = decode(leaf["value"])
        for leaf in part["tensors"]:
            if not leaf["per_rank"] or part["rank"] == rank:
                put(found, leaf, read_tensor(root / name, part, leaf))
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the greatest commit that is not void."""
    for path in sorted(
        (folder / "commits").iterdir(), key=lambda p: [*map(int, p.stem.split("-"))], reverse=True
    ):
        commit = load(path.read_bytes(), "dtruntime.commit")
        if commit["void"]:
            continue
        data = (folder / commit["attempt"] / "manifest.json").read_bytes()
        assert hashlib.sha256(data).hexdigest() == commit["manifest_sha256"]
        manifest = load(data, "dtruntime.manifest")
        assert set(manifest["requires"]) <= KNOWN_FEATURES
        assert all(manifest[key] == commit[key] for key in ("name", "generation", "step", "attempt"))
        return manifest
    raise FileNotFoundError(folder)


def read_part(folder: Path, manifest: dict[str, Any], ref: dict[str, Any]) -> dict[str, Any]:
    """A part manifest, with the headers of its data files checked."""
    path = folder / manifest["attempt"] / ref["path"]
    assert path.stat().st_size == ref["length"]
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == ref["sha256"]
    part = load(data, "dtruntime.part")
    for file in part["files"]:
        assert file["path"].rpartition("/")[0] in manifest["uses"]
        assert (folder / file["path"]).stat().st_size == file["length"]
        header = read_range(folder / file["path"], 0, file["header_length"])
        assert xxhash.xxh3_128_hexdigest(header) == file["header_digest"]
    return part


def read_tensor(folder: Path, part: dict[str, Any], leaf: dict[str, Any]) -> NDArray[Any]:
    """A stored shard, each chunk checked."""
    pieces = [
        read_range(folder / part["files"][file]["path"], offset, length)
        for file, offset, length in leaf["extents"]
    ]
    data = b"".join(pieces)
    assert (
        "".join(xxhash.xxh3_128_hexdigest(chunk) for chunk in cut(data, part["chunk_bytes"]))
        == leaf["digests"]
    )
    dtype = np.dtype(leaf["dtype"]).newbyteorder("<")
    assert len(data) == dtype.itemsize * math.prod(leaf["shape"])
    return np.frombuffer(data, dtype).reshape(leaf["shape"])


def put(found: dict[str, Any], leaf: dict[str, Any], shard: NDArray[Any]) -> None:
    """Puts a shard into its place in the whole tensor."""
    whole = found.setdefault(text(leaf["fqn"]), np.zeros(leaf["global_shape"], shard.dtype))
    box = tuple(
        slice(start, start + size) for start, size in zip(leaf["offsets"], leaf["shape"], strict=True)
    )
    whole[box] = shard


def load(data: bytes, kind: str) -> dict[str, Any]:
    """One of the JSON files."""
    record: dict[str, Any] = json.loads(data.decode("ascii"))
    assert (record["format"], record["version"]) == (kind, 1)
    return record


def decode(value: Any) -> Any:
    """An encoded object."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag, inner = value["~"], value["v"]
    match tag:
        case "int":
            return int(inner, 16)
        case "float":
            return struct.unpack(">d", bytes.fromhex(inner))[0]
        case "str":
            return bytes.fromhex(inner).decode("utf-8", "surrogatepass")
        case "bytes":
            return base64.b64decode(inner)
        case "tuple":
            return tuple(decode(item) for item in inner)
        case "dict":
            return {decode(key): decode(item) for key, item in inner}
    raise ValueError(f"no codec for {tag}")


def text(value: Any) -> str:
    """A name."""
    return str(decode(value))


def read_range(path: Path, offset: int, length: int) -> bytes:
    """Some bytes of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def cut(data: bytes, chunk_bytes: int) -> Iterator[bytes]:
    """The chunks of a tensor."""
    return (data[at : at + chunk_bytes] for at in range(0, len(data), chunk_bytes))
