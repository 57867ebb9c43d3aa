"""A reader of checkpoints, full and delta, written from docs/FORMAT.md alone; it imports nothing of ours.

It is what somebody with another language would write first, so it is also the page's proof: 60 lines of code.
"""

import base64
import hashlib
import json

import numpy as np
import xxhash


def read_newest(root, name, rank):
    """Everything of the newest checkpoint by fqn, as rank `rank` sees it. NumPy has no bfloat16."""
    found, manifest = {}, read_manifest(root / name)
    for part in (read_part(root / name, manifest, ref) for ref in manifest["parts"]):
        for leaf in (*part["objects"], *part["tensors"]):
            wanted = not leaf["per_rank"] or part["rank"] == rank
            if wanted and "value" in leaf:
                found[decode(leaf["fqn"])] = decode(leaf["value"])
            elif wanted:
                whole = found.setdefault(decode(leaf["fqn"]), np.zeros(leaf["global_shape"], leaf["dtype"]))
                ends = np.add(leaf["offsets"], leaf["shape"]).astype(int)
                whole[tuple(map(slice, leaf["offsets"], ends))] = read_tensor(root / name, part, leaf)
    return found


def read_manifest(folder):
    """The manifest of the greatest commit that is not void."""
    commits = [parse(path.read_bytes(), "commit") for path in (folder / "commits").iterdir()]
    newest = max((c for c in commits if not c["void"]), key=lambda c: (c["generation"], c["step"]))
    data = (folder / newest["attempt"] / "manifest.json").read_bytes()
    manifest = parse(data, "manifest", newest["manifest_sha256"])
    assert manifest["requires"] == [], "written by a later version"
    assert all(manifest[key] == newest[key] for key in ("name", "generation", "step", "attempt"))
    return manifest


def read_part(folder, manifest, ref):
    """A part manifest; the headers of its data files are checked."""
    data = read_range(folder / manifest["attempt"] / ref["path"], 0, ref["length"])
    part = parse(data, "part", ref["sha256"])
    for file in part["files"]:
        assert file["path"].rpartition("/")[0] in manifest["uses"]
        assert (folder / file["path"]).stat().st_size == file["length"]
        header = read_range(folder / file["path"], 0, file["header_length"])
        assert xxhash.xxh3_128_hexdigest(header) == file["header_digest"]
    return part


def read_tensor(folder, part, leaf):
    """A stored shard; each of its chunks is checked."""
    files, size = part["files"], part["chunk_bytes"]
    data = b"".join(read_range(folder / files[file]["path"], at, n) for file, at, n in leaf["extents"])
    chunks = (data[at : at + size] for at in range(0, len(data), size))
    assert "".join(map(xxhash.xxh3_128_hexdigest, chunks)) == leaf["digests"]
    return np.frombuffer(data, np.dtype(leaf["dtype"]).newbyteorder("<")).reshape(leaf["shape"])


def parse(data, kind, sha256=None):
    """One of the JSON files."""
    assert sha256 in (None, hashlib.sha256(data).hexdigest())
    record = json.loads(data.decode("ascii"))
    assert (record["format"], record["version"]) == (f"dtruntime.{kind}", 1)
    return record


def decode(value):
    """An encoded object."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    return DECODERS[value["~"]](value["v"]) if isinstance(value, dict) else value


DECODERS = {
    "int": lambda v: int(v, 16),
    "float": lambda v: np.frombuffer(bytes.fromhex(v), ">f8")[0].item(),
    "str": lambda v: bytes.fromhex(v).decode("utf-8", "surrogatepass"),
    "bytes": base64.b64decode,
    "complex": lambda v: np.frombuffer(bytes.fromhex(v), ">c16")[0].item(),
    **{kind.__name__: lambda v, kind=kind: kind(map(decode, v)) for kind in (tuple, set, frozenset)},  # type: ignore[misc]
    "dict": lambda v: {decode(key): decode(item) for key, item in v},
}


def read_range(path, offset, length):
    """Some bytes of a file."""
    return path.read_bytes()[offset : offset + length]
