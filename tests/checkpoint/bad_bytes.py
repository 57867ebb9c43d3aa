"""For each thing that docs/FORMAT.md says a reader must refuse: bytes that have it, and a word of the error.

The names are those of the page; `test_format_page` holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from dtruntime_torch.checkpoint.manifest import (
    encode_commit,
    encode_generation,
    encode_manifest,
    encode_part,
)
from tests.checkpoint.record_builders import (
    ATTEMPT,
    BASE,
    sample_commit,
    sample_delta,
    sample_generation,
    sample_manifest,
    sample_part,
    sample_void,
)

SOUND = {
    "part": encode_part(sample_part()),
    "delta": encode_part(sample_delta()),
    "manifest": encode_manifest(sample_manifest()),
    "commit": encode_commit(sample_commit()),
    "void": encode_commit(sample_void()),
    "generation": encode_generation(sample_generation()),
}
"""What the bad bytes are made from; a delta is a part, a void is a commit."""


class Bad(NamedTuple):
    """Bytes that must be refused.

    Attributes:
        rule: its name in docs/FORMAT.md.
        kind: the key of `SOUND` that they were made from.
        data: the bytes.
        says: what the error must say.
    """

    rule: str
    kind: str
    data: bytes
    says: str


def changed(rule: str, kind: str, says: str, *steps: Any) -> Bad:
    """The sound record with the value at a way into its JSON replaced: (..., key, value)."""
    record = json.loads(SOUND[kind])
    *way, last, value = steps
    target = record
    for step in way:
        target = target[step]
    target[last] = value(target[last]) if callable(value) else value
    return Bad(rule, kind, json.dumps(record).encode(), says)


def replaced(rule: str, kind: str, says: str, old: bytes, new: bytes) -> Bad:
    """The sound bytes with some of them replaced."""
    assert old in SOUND[kind]
    return Bad(rule, kind, SOUND[kind].replace(old, new, 1), says)


def without(rule: str, kind: str, says: str, *way: Any) -> Bad:
    """The sound record with a field left out."""
    record = json.loads(SOUND[kind])
    *outer, last = way
    target = record
    for step in outer:
        target = target[step]
    del target[last]
    return Bad(rule, kind, json.dumps(record).encode(), says)


def added(value: Any) -> Callable[[list[Any]], list[Any]]:
    """A list with one more item at its end."""
    return lambda values: [*values, value]


def _deep(levels: int) -> bytes:
    return b'"metadata":' + b"[" * levels + b"]" * levels


BAD_JSON = [
    Bad("json-ascii", "commit", SOUND["commit"].replace(b"model", "mödel".encode()), "not ASCII"),
    Bad("json-ascii", "commit", SOUND["commit"].decode().encode("utf-16"), "not ASCII"),
    Bad("json-ascii", "commit", b"\xef\xbb\xbf" + SOUND["commit"], "not ASCII"),
    Bad("json-syntax", "commit", b"", "no JSON"),
    Bad("json-syntax", "commit", SOUND["commit"][:-1], "no JSON"),
    Bad("json-syntax", "commit", SOUND["commit"] + b"{}", "no JSON"),
    Bad("json-object", "commit", b"[]", "no object"),
    Bad("json-object", "commit", b"7", "no object"),
    replaced("json-key-twice", "commit", "twice", b'"step":100', b'"step":100,"step":100'),
    replaced("json-number", "manifest", "NaN", b'"loss":2.5', b'"loss":NaN'),
    replaced("json-number", "manifest", "Infinity", b'"loss":2.5', b'"loss":-Infinity'),
    replaced("json-number", "manifest", "not finite", b'"loss":2.5', b'"loss":1e999'),
    replaced("json-integer", "commit", "lies beyond", b'"step":100', b'"step":9007199254740992'),
    replaced("json-integer", "commit", "lies beyond", b'"step":100', b'"step":' + b"9" * 100_000),
    replaced(
        "json-depth", "manifest", "too deep", b'"metadata":{"loss":2.5', _deep(100_000) + b',"m":{"loss":2.5'
    ),
    without("json-field", "commit", "lacks 'step'", "step"),
    without("json-field", "part", "lacks 'digests'", "tensors", 0, "digests"),
    changed("json-type", "commit", "'step'", "step", True),
    changed("json-type", "commit", "'step'", "step", 100.0),
    changed("json-type", "commit", "'step'", "step", -1),
    changed("json-type", "commit", "'step'", "step", "100"),
    changed("json-type", "commit", "'name'", "name", None),
    changed("json-type", "commit", "'void'", "void", 0),
    changed("json-type", "manifest", "'uses'", "uses", [1]),
    changed("json-type", "manifest", "'uses'", "uses", ATTEMPT),
    changed("json-type", "manifest", "'parts'", "parts", {}),
    changed("json-type", "manifest", "a part is no object", "parts", 0, []),
    changed("json-type", "manifest", "the parent", "parent", [1]),
    changed("json-type", "manifest", "the parent", "parent", [1, True]),
    changed("json-type", "manifest", "'torch'", "versions", "torch", 2),
    changed("json-type", "manifest", "'versions'", "versions", ["torch"]),
    changed("json-type", "part", "'shape'", "tensors", 0, "shape", [2, "5"]),
    changed("json-type", "part", "an extent", "tensors", 0, "extents", [[0, 128]]),
    changed("json-type", "part", "an extent", "tensors", 0, "extents", [[0, -1, 40]]),
    changed("json-type", "part", "a fqn is no string", "tensors", 0, "fqn", 7),
    changed("json-type", "part", "a alias is no string", "tensors", 0, "alias", []),
    changed("json-surrogate", "commit", "'name'", "name", "\ud800"),
    changed("json-surrogate", "part", "'name'", "tensors", 0, "name", "\udc00"),
    changed("json-hex", "part", "lower-case hex", "tensors", 0, "digests", str.upper),
    changed("json-hex", "part", "lower-case hex", "tensors", 0, "digests", lambda text: text[:-1]),
    changed(
        "json-hex",
        "part",
        "lower-case hex",
        "tensors",
        0,
        "digests",
        lambda text: text.replace(text[2:4], "  "),
    ),
    changed("format", "commit", "'dtruntime.manifest'", "format", "dtruntime.manifest"),
    changed("format", "commit", "'format'", "format", None),
    changed("version", "commit", "upgrade", "version", 2),
    changed("version", "manifest", "upgrade", "version", 0),
]

BAD_GENERATIONS = [
    changed("run-id", "generation", "run id", "run_id", "a b"),
    changed("run-id", "generation", "run id", "run_id", ""),
    changed("created", "generation", "ISO 8601", "created", "yesterday"),
    changed("created", "generation", "ISO 8601", "created", "2026-01-02T03:04:05"),
    changed("one-line", "generation", "host", "host", "node\x1b[2J"),
    changed("one-line", "generation", "host", "host", "n" * 256),
]

BAD_COMMITS = [
    changed("name", "commit", "name", "name", "../other"),
    changed("name", "commit", "name", "name", ".hidden"),
    changed("name", "commit", "name", "name", "model\n"),
    changed("attempt", "commit", "no attempt", "attempt", "step-00000100/../0007-1"),
    changed("attempt", "commit", "no attempt", "attempt", "step-100/7-1"),
    changed("attempt", "commit", "no attempt", "attempt", "step-000000100/0007-1"),
    changed("attempt", "commit", "no attempt", "attempt", "step-00000100/0007-1/"),
    changed("attempt", "commit", "no attempt", "attempt", "step-0000010\u0660/0007-1"),
    changed("attempt", "commit", "no attempt", "attempt", "step-00000101/0007-1"),
    changed("attempt", "commit", "no attempt", "attempt", "step-00000100/0008-1"),
    changed("attempt", "commit", "no attempt", "attempt", ""),
    changed("commit-sha256", "commit", "SHA-256", "manifest_sha256", str.upper),
    changed("commit-sha256", "commit", "SHA-256", "manifest_sha256", ""),
    changed("void", "commit", "void", "void", True),
    changed("void", "void", "void", "attempt", ATTEMPT),
    changed("void", "void", "no attempt", "void", False),
]

BAD_MANIFESTS = [
    changed("requires", "manifest", "upgrade", "requires", ["sparse-chunks"]),
    changed("name", "manifest", "name", "name", "a/b"),
    changed("attempt", "manifest", "no attempt", "attempt", BASE),
    changed("run-id", "manifest", "run id", "run_id", "x" * 101),
    changed("created", "manifest", "ISO 8601", "created", "2026-01-02"),
    changed("one-line", "manifest", "version", "versions", "torch", "2\n3"),
    changed("uses-path", "manifest", "no attempt", "uses", [ATTEMPT, "/etc"]),
    changed("uses-twice", "manifest", "twice", "uses", [ATTEMPT, ATTEMPT]),
    changed("uses-own", "manifest", "its own attempt", "uses", []),
    changed("full-uses", "manifest", "full and uses", "uses", [ATTEMPT, BASE]),
    changed("delta-parent", "manifest", "no parent", "full", False)._replace(
        data=SOUND["manifest"]
        .replace(b'"full":true', b'"full":false')
        .replace(b'"parent":[6,90]', b'"parent":null')
    ),
    changed("parent-order", "manifest", "parent comes after", "parent", [7, 100]),
    changed("parts-count", "manifest", "one part for each rank", "world_size", 3),
    changed("parts-count", "manifest", "one part for each rank", "world_size", 0),
    changed("parts-rank", "manifest", "out of place", "parts", 1, "rank", 0),
    changed("parts-path", "manifest", "is called", "parts", 1, "path", "../x.json"),
    changed("parts-path", "manifest", "is called", "parts", 1, "path", "shard-00000-of-00002.json"),
    changed("parts-sha256", "manifest", "SHA-256", "parts", 0, "sha256", "ff"),
    changed("parts-length", "manifest", "no bytes", "parts", 0, "length", 0),
]

_FILE = f"{ATTEMPT}/shard-00001-of-00002.safetensors"
_BASE_FILE = f"{BASE}/shard-00000-of-00001.safetensors"
_FILE_OF_PART = json.loads(SOUND["part"])["files"][0]

BAD_PARTS = [
    changed("attempt", "part", "no attempt", "attempt", BASE),
    changed("part-rank", "part", "none of 2", "rank", 2),
    changed("part-completed", "part", "by itself", "completed_by", [1]),
    changed("part-completed", "part", "out of order", "completed_by", [0, 0]),
    changed("part-completed", "part", "that there is not", "completed_by", [0, 2]),
    changed("part-chunk", "part", "chunks have no bytes", "chunk_bytes", 0),
    changed("file-path", "part", "no data file", "files", 0, "path", f"../{_FILE}"),
    changed("file-path", "part", "no data file", "files", 0, "path", f"/{_FILE}"),
    changed("file-path", "part", "no data file", "files", 0, "path", _FILE.replace(".safetensors", ".json")),
    changed("file-path", "part", "no data file", "files", 0, "path", _FILE.replace("shard-00001", "shard-1")),
    changed("file-path", "part", "no data file", "files", 0, "path", f"{ATTEMPT}/manifest.json"),
    changed("file-path", "part", "no data file", "files", 0, "path", _FILE.replace("00001-of", "00002-of")),
    changed("file-twice", "delta", "occurs twice", "files", 1, lambda file: {**file, "path": _BASE_FILE}),
    changed(
        "file-own",
        "part",
        "two files in its own",
        "files",
        added({**_FILE_OF_PART, "path": _FILE.replace("safetensors", "delta")}),
    ),
    changed("file-own", "part", "another rank's", "files", 0, "path", _FILE.replace("00001-of", "00000-of")),
    changed("file-header", "part", "multiple of 64", "files", 0, "header_length", 100),
    changed("file-header", "part", "multiple of 64", "files", 0, "header_length", 0),
    changed("file-header", "part", "shorter than its header", "files", 0, "header_length", 192),
    changed("file-header-digest", "part", "no digest", "files", 0, "header_digest", "00"),
    changed("file-gap", "part", "belong to no tensor", "files", 0, "length", 174),
    changed("file-gap", "part", "belong to no tensor", "files", 0, "header_length", 64),
    changed("file-gap", "delta", "belong to no tensor", "files", 1, "length", 96),
    changed("path-depth", "part", "64 steps", "tensors", 0, "path", [["l", 0]] * 65),
    changed("path-step", "part", "neither a dict", "tensors", 0, "path", [["x", 0]]),
    changed("path-step", "part", "neither a dict", "tensors", 0, "path", [[0, 0]]),
    changed("path-step", "part", "a step of a path", "tensors", 0, "path", [["d"]]),
    changed("path-step", "part", "a position", "tensors", 0, "path", [["l", "0"]]),
    changed("path-key", "part", "cannot be a dict's key", "tensors", 0, "path", [["d", []]]),
    changed(
        "path-key", "part", "cannot be a dict's key", "tensors", 0, "path", [["d", {"~": "set", "v": []}]]
    ),
    changed("fqn-twice", "part", "fqn 'lr' occurs twice", "tensors", 0, "fqn", "lr"),
    changed("tensor-name-twice", "part", "occurs twice", "tensors", 0, "name", "queue.0"),
    changed("tensor-name", "part", "cannot name a tensor", "tensors", 0, "name", "__metadata__"),
    changed("dtype", "part", "upgrade", "tensors", 0, "dtype", "float7"),
    changed("dimensions", "part", "64 dimensions", "tensors", 1, "global_shape", [0] * 65),
    changed("box", "part", "is not in the whole", "tensors", 0, "offsets", [3, 0]),
    changed("box", "part", "is not in the whole", "tensors", 0, "offsets", [2]),
    changed("box", "part", "is not in the whole", "tensors", 0, "global_shape", [4, 5, 1]),
    changed("tensor-size", "part", "too large", "tensors", 1, "global_shape", [0, 2**50]),
    changed("tensor-size", "part", "too large", "tensors", 0, "global_shape", [2**26, 2**26]),
    changed("alias-self", "part", "tied to itself", "tensors", 0, "alias", "model.weight"),
    changed("bytes", "part", "no 1-d uint8", "tensors", 0, "is_bytes", True),
    changed("digests", "part", "3 chunks", "tensors", 0, "digests", lambda text: text[32:]),
    changed("digests", "part", "chunks", "chunk_bytes", 8),
    changed("extent-file", "part", "not listed", "tensors", 0, "extents", [[1, 128, 40]]),
    changed("extent-range", "part", "no data of", "tensors", 0, "extents", [[0, 120, 40]]),
    changed("extent-range", "part", "no data of", "tensors", 0, "extents", [[0, 140, 40]]),
    changed("extent-range", "part", "no data of", "tensors", 0, "extents", [[0, 2**53 - 1, 2**53 - 1]]),
    changed("extent-empty", "part", "no data of", "tensors", 0, "extents", [[0, 128, 0], [0, 128, 40]]),
    changed("extent-chunk", "part", "spans two", "tensors", 0, "extents", [[0, 128, 8], [0, 136, 32]]),
    changed("extent-sum", "part", "in extents", "tensors", 0, "extents", [[0, 128, 32]]),
    changed("extent-overlap", "part", "overlaps", "tensors", 2, "extents", [[0, 164, 5]]),
    changed(
        "extent-overlap", "delta", "overlaps", "tensors", 0, "extents", [[0, 64, 16], [0, 64, 16], [0, 96, 8]]
    ),
]

BAD_RECORDS = [*BAD_JSON, *BAD_GENERATIONS, *BAD_COMMITS, *BAD_MANIFESTS, *BAD_PARTS]

BAD_OBJECTS: list[tuple[str, Any, str]] = [
    ("object-keys", {}, "encodes nothing"),
    ("object-keys", {"~": "tuple"}, "encodes nothing"),
    ("object-keys", {"~": "tuple", "v": [], "w": 1}, "encodes nothing"),
    ("object-tag", {"~": "bag", "v": []}, "no type 'bag'"),
    ("object-tag", {"~": "set", "v": "ab"}, "no type 'set'"),
    ("object-tag", {"~": "frozenset", "v": {"~": "set", "v": []}}, "no type 'frozenset'"),
    ("object-tag", {"~": "complex", "v": [1.0, 2.0]}, "no type 'complex'"),
    ("object-tag", {"~": 7, "v": []}, "no type '7'"),
    ("object-tag", {"~": ["int"], "v": "0"}, "no type"),
    ("object-tag", {"~": "tuple", "v": "ab"}, "no type 'tuple'"),
    ("object-tag", {"~": "int", "v": 7}, "no type 'int'"),
    ("object-text", {"~": "int", "v": ""}, "no int"),
    ("object-text", {"~": "int", "v": "+1"}, "no int"),
    ("object-text", {"~": "int", "v": "1_0"}, "no int"),
    ("object-text", {"~": "int", "v": "\u0661"}, "no int"),
    ("object-text", {"~": "float", "v": "inf"}, "no float"),
    ("object-text", {"~": "float", "v": "7ff0"}, "no float"),
    ("object-text", {"~": "complex", "v": "3ff0000000000000"}, "no complex"),
    ("object-text", {"~": "complex", "v": "3FF00000000000003FF0000000000000"}, "no complex"),
    ("object-text", {"~": "str", "v": "f"}, "no str"),
    ("object-text", {"~": "str", "v": "ff"}, "no str"),
    ("object-text", {"~": "bytes", "v": "a"}, "no bytes"),
    ("object-text", {"~": "bytes", "v": "aGk=\n"}, "no bytes"),
    ("object-pair", {"~": "dict", "v": [[1]]}, "no pair"),
    ("object-pair", {"~": "dict", "v": ["ab"]}, "no pair"),
    ("object-key", {"~": "dict", "v": [[[], 1]]}, "cannot be a dict's key"),
    ("object-key", {"~": "dict", "v": [[{"~": "tuple", "v": [[]]}, 1]]}, "cannot be a dict's key"),
    ("object-key", {"~": "set", "v": [[]]}, "cannot be a set's member"),
    ("object-key", {"~": "frozenset", "v": [{"~": "set", "v": []}]}, "cannot be a set's member"),
    ("object-key-twice", {"~": "set", "v": [1, {"~": "tuple", "v": []}, True]}, "the member True twice"),
    ("object-key-twice", {"~": "frozenset", "v": ["a", "a"]}, "the member 'a' twice"),
    ("object-key-twice", {"~": "dict", "v": [["a", 1], ["a", 2]]}, "twice"),
    ("object-key-twice", {"~": "dict", "v": [[1, 1], [True, 2]]}, "twice"),
]
