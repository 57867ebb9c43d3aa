"""docs/FORMAT.md against what is written and what is refused."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.dtypes import is_known, itemsize, safetensors_code
from dtruntime_torch.checkpoint.loading.load_plan import index_parts, make_load_plan, whole_specs
from dtruntime_torch.checkpoint.manifest import ObjectEntry, PartRef, TensorEntry, encode_part
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.checkpoint.specs import Extent
from dtruntime_torch.checkpoint.verify import verify
from dtruntime_torch.errors import CorruptCheckpoint
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from tests.checkpoint import plain_reader, saved_checkpoints
from tests.checkpoint.bad_bytes import BAD_OBJECTS, BAD_RECORDS, SOUND
from tests.checkpoint.plan_builders import flat, obj, part_of, plans_of, stored, stored_object, tensor
from tests.checkpoint.record_builders import BASE, sample_delta, sample_manifest
from tests.checkpoint.test_catalog import BAD_CHAINS

PAGE = (Path(__file__).parents[2] / "docs" / "FORMAT.md").read_text()

WEIGHT = np.arange(42, dtype=np.float32).reshape(6, 7)
COMPLEX = np.arange(5, dtype=np.complex64) * (1 - 2j)
NOTES = {
    "lr": (1e-3, 2**70),
    3: [b"raw", None, float("inf"), "\ud800"],
    "set": {1, frozenset({"a"})},
    "c": 1 - 2j,
}


def save_a_sharded_state(backend: LocalBackend | MemoryBackend) -> saved_checkpoints.Saved:
    """Two ranks: a weight cut in two, one tensor that all hold, a state that differs by rank, and notes."""
    states = [
        flat(
            tensor("weight", 6, 7, layout="cut", offsets=(3 * rank, 0), shape=(3, 7), holders=(rank,)),
            tensor("complex", 5, dtype="complex64"),
            tensor("empty", 0, 4, dtype="float64"),
            tensor("rng", 4, dtype="uint8", per_rank=True),
            obj("notes"),
        )
        for rank in range(2)
    ]
    images = []
    for rank, plan in enumerate(plans_of(states)):
        held: dict[str, NDArray[Any]] = {
            "weight": WEIGHT[3 * rank : 3 * rank + 3],
            "complex": COMPLEX,
            "empty": np.zeros((0, 4)),
            "rng": np.arange(4, dtype=np.uint8) + rank,
        }
        images.append(saved_checkpoints.stage(plan, held, {"notes": objects.encode(NOTES, "notes")}))
    attempt = Attempt(7, 100, 1)
    parts = tuple(saved_checkpoints.write(backend, "model", attempt, image) for image in images)
    return saved_checkpoints.commit(backend, dataclasses.replace(sample_manifest(), parts=parts), images)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_reader_written_from_the_page_reads_what_was_written(tmp_path, rank):
    save_a_sharded_state(LocalBackend(tmp_path))
    state = plain_reader.read_newest(tmp_path, "model", rank)
    np.testing.assert_array_equal(state.pop("weight"), WEIGHT)
    np.testing.assert_array_equal(state.pop("complex"), COMPLEX)
    np.testing.assert_array_equal(state.pop("rng"), np.arange(4, dtype=np.uint8) + rank)
    assert state.pop("empty").shape == (0, 4)
    assert state == {"notes": NOTES}


def test_a_reader_written_from_the_page_passes_over_voids_and_older_generations(tmp_path):
    backend = LocalBackend(tmp_path)
    saved_checkpoints.save(backend, step=900, generation=1)
    expected = saved_checkpoints.save(backend, step=100, generation=2)
    saved_checkpoints.void(backend, saved_checkpoints.save(backend, step=200, generation=2))
    assert plain_reader.read_manifest(tmp_path / "model")["attempt"] == expected.manifest.attempt


def save_a_delta(backend: LocalBackend | MemoryBackend) -> tuple[saved_checkpoints.Saved, bytes]:
    """The middle chunk of a tensor in a pack, the others where the base has them."""
    old, new = bytes(range(40)), bytes(range(16)) + bytes(16) + bytes(range(32, 40))
    part = sample_delta()
    base, pack = b"b" * 64 + old, b"p" * 64 + new[16:32]
    files = tuple(
        dataclasses.replace(file, length=len(data), header_digest=xxhash.xxh3_128_digest(data[:64]))
        for file, data in zip(part.files, (base, pack), strict=True)
    )
    extents = (Extent(0, 64, 16), Extent(1, 64, 16), Extent(0, 96, 8))
    digests = b"".join(map(xxhash.xxh3_128_digest, (new[:16], new[16:32], new[32:])))
    (entry,) = part.tensors
    part = dataclasses.replace(
        part, files=files, tensors=(dataclasses.replace(entry, extents=extents, digests=digests),)
    )
    encoded = encode_part(part)
    ref = PartRef(
        0, "shard-00000-of-00001.json", len(encoded), hashlib.sha256(encoded).hexdigest(), len(pack)
    )
    manifest = dataclasses.replace(
        sample_manifest(),
        full=False,
        parent=CommitKey(7, 90),
        uses=(part.attempt, BASE),
        world_size=1,
        parts=(ref,),
    )
    for path, data in [(files[0].path, base), (files[1].path, pack), (f"{part.attempt}/{ref.path}", encoded)]:
        run_sync(backend.write(f"model/{path}", data))
    return saved_checkpoints.commit(backend, manifest, []), new


def test_a_reader_written_from_the_page_reads_a_delta(tmp_path):
    _, expected = save_a_delta(LocalBackend(tmp_path))
    assert plain_reader.read_newest(tmp_path, "model", 0)["w"].tobytes() == expected


def test_our_reader_reads_a_delta():
    backend = MemoryBackend()
    saved, _ = save_a_delta(backend)
    report = run_sync(verify(backend, "model", saved.key))
    assert (report.damage, report.chunks, report.nbytes) == ((), 3, 40)


def drop(backend: MemoryBackend, saved: saved_checkpoints.Saved) -> None:
    run_sync(backend.delete(saved.data_path(0)))


BAD_DATA = {
    "data-missing": ("missing", drop),
    "data-length": ("bytes", lambda backend, saved: saved_checkpoints.grow(backend, saved, 0, 1)),
    "data-header": ("", lambda backend, saved: saved_checkpoints.flip(backend, saved.data_path(0), 9)),
    "data-chunk": ("", lambda backend, saved: saved_checkpoints.flip(backend, saved.data_path(0), -1)),
}


@pytest.mark.parametrize("rule", BAD_DATA)
def test_damaged_data_is_found(rule):
    backend = MemoryBackend()
    saved = saved_checkpoints.save(backend)
    says, harm = BAD_DATA[rule]
    harm(backend, saved)
    report = run_sync(verify(backend, "model", saved.key))
    assert {damage.file for damage in report.damage} == {saved.data_path(0)}
    assert says in str(report.damage[0])
    assert (report.damage[0].tensor is not None) == (rule == "data-chunk")


BAD_SHARDS: dict[str, list[list[TensorEntry | ObjectEntry]]] = {
    "shards-disagree": [
        [stored("w", (4,), ((0,), (2,))), stored("w", (5,), ((2,), (2,)))],
        [stored("w", (4,), ((0,), (2,))), stored("w", (4,), ((2,), (2,)), dtype="float64")],
        [stored("w", (4,)), stored_object("w")],
        [stored_object("w"), stored_object("w")],
    ],
    "shards-cover": [
        [stored("w", (4,), ((0,), (2,))), stored("w", (4,), ((3,), (1,)))],
        [stored("w", (4,), ((0,), (3,))), stored("w", (4,), ((2,), (2,)))],
    ],
}


@pytest.mark.parametrize("entries", [entries for bad in BAD_SHARDS.values() for entries in bad])
def test_parts_that_do_not_fit_together_are_refused(entries):
    parts = {rank: part_of(rank, entry) for rank, entry in enumerate(entries)}

    def plan():
        saved = index_parts(parts, 0)
        make_load_plan(saved, parts, whole_specs(saved))

    with pytest.raises(CorruptCheckpoint, match="'w'"):
        plan()


def test_what_the_page_says_to_refuse_is_what_is_tested():
    refused = PAGE[PAGE.index("## What a reader MUST refuse") :]
    rows = [line.split("|")[1] for line in refused.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([a-z0-9-]+)`", row)]
    assert len(named) == len(set(named))
    by_own_test = {"object-depth", "object-codec"}  # in test_objects
    tables = [BAD_CHAINS, BAD_DATA, BAD_SHARDS, by_own_test]
    tested = {bad.rule for bad in BAD_RECORDS} | {rule for rule, _, _ in BAD_OBJECTS}
    assert set(named) == tested.union(*tables)


def test_the_table_of_dtypes_is_complete():
    rows = re.findall(r"^\| (1|2|4|8|16) \| (.*) \|$", PAGE, re.MULTILINE)
    listed = [
        (name, code, int(size)) for size, row in rows for name, code in re.findall(r"`(\w+)` (\w+)", row)
    ]
    assert len(listed) == 21
    for name, code, size in listed:
        assert is_known(name)
        assert itemsize(name) == size
        assert (safetensors_code(name) or "none") == code


def test_the_table_of_codecs_is_complete():
    table = PAGE[PAGE.index("Codecs that come with the package:") : PAGE.index("A tensor that wraps others")]
    rows = re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE)
    listed = sorted(tag for row in rows for tag in re.findall(r"`([^`]+)`", row))
    # In a process of its own: other tests register codecs, too.
    code = "from dtruntime_torch.checkpoint import flatten, objects; print(*sorted(objects._codecs_by_tag))"
    registered = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert listed == registered.stdout.split()


@pytest.mark.parametrize("link", re.findall(r"\]\((\.\./[^)]+)\)", PAGE))
def test_files_that_the_page_names_are_there(link):
    assert (Path(__file__).parents[2] / "docs" / link).resolve().is_file()


def test_the_page_has_every_field_and_no_other():
    files = PAGE[PAGE.index("## JSON files") : PAGE.index("## Digests")]
    rows = [line.split("|")[1] for line in files.splitlines() if line.startswith("| `")]
    named = {field for row in rows for field in re.findall(r"`([a-z0-9_]+)`", row)}
    written = set()
    for record in map(json.loads, SOUND.values()):
        written |= set(record)
        for inner in ("parts", "files", "tensors", "objects"):
            written |= {field for item in record.get(inner, []) for field in item}
    assert named == written


def test_the_reader_is_as_short_as_the_page_says():
    source = Path(plain_reader.__file__).read_text()
    tree = ast.parse(source)
    documented = [tree, *(node for node in tree.body if isinstance(node, ast.FunctionDef))]
    docstrings = {
        line
        for node in documented
        if ast.get_docstring(node)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    code = [n for n, line in enumerate(source.splitlines(), 1) if line.strip() and n not in docstrings]
    assert len(code) == 60 and "A reader of 60 lines" in PAGE
    assert "dtruntime_torch" not in source.replace("docs/FORMAT.md", "")
