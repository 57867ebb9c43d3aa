from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import pytest

from dtruntime_torch.checkpoint import catalog, names
from dtruntime_torch.checkpoint.manifest import (
    Commit,
    Manifest,
    Part,
    PartRef,
    encode_commit,
    encode_manifest,
    encode_part,
)
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.errors import CheckpointNotFound, CorruptCheckpoint, Damage, NotFound
from dtruntime_torch.storage import MemoryBackend, run_sync
from tests.checkpoint.record_builders import BASE, sample_delta, sample_manifest, sample_part

KEY = CommitKey(7, 100)
COMMIT = names.commit_path("model", KEY)
MANIFEST = "model/step-00000100/0007-1/manifest.json"
PART = "model/step-00000100/0007-1/shard-00001-of-00002.json"


class Shelf:
    """A storage in memory, and short ways to put checkpoints on it and to damage them."""

    def __init__(self) -> None:
        self.backend = MemoryBackend()

    def write(self, path: str, data: bytes) -> None:
        run_sync(self.backend.write(path, data))

    def read(self, path: str) -> bytes:
        return bytes(run_sync(self.backend.read(path)))

    def delete(self, path: str) -> None:
        run_sync(self.backend.delete(path))

    def put_commit(self, generation: int, step: int, *, void: bool = False) -> Commit:
        """A commit of which nothing else is there."""
        attempt = "" if void else Attempt(generation, step, 1).path
        commit = Commit("model", generation, step, attempt, "" if void else "0" * 64, void=void)
        self.write(names.commit_path("model", commit.key), encode_commit(commit))
        return commit

    def put(self, part: Part, manifest: Manifest | None = None, **ref: object) -> Commit:
        """A checkpoint whose part of rank 1 is there, with the hashes of what is written."""
        manifest = manifest or sample_manifest()
        encoded = encode_part(part)
        sha256 = hashlib.sha256(encoded).hexdigest()
        fields = {"length": len(encoded), "sha256": sha256, **ref}
        parts = tuple(dataclasses.replace(p, **fields) if p.rank == part.rank else p for p in manifest.parts)  # type: ignore[arg-type]
        manifest = dataclasses.replace(manifest, parts=parts)
        folder = f"model/{manifest.attempt}"
        self.write(f"{folder}/{manifest.parts[part.rank].path}", encoded)
        return self.put_manifest(manifest)

    def put_manifest(self, manifest: Manifest, commit: Commit | None = None) -> Commit:
        """A manifest and the commit of it."""
        encoded = encode_manifest(manifest)
        sha256 = hashlib.sha256(encoded).hexdigest()
        commit = commit or Commit("model", manifest.generation, manifest.step, manifest.attempt, sha256)
        commit = dataclasses.replace(commit, manifest_sha256=sha256)
        self.write(f"{commit.name}/{commit.attempt}/manifest.json", encoded)
        self.write(names.commit_path(commit.name, commit.key), encode_commit(commit))
        return commit

    def load(self) -> Part:
        """Rank 1's part, along the whole chain."""
        commit = run_sync(catalog.read_commit(self.backend, "model", KEY))
        manifest = run_sync(catalog.read_manifest(self.backend, commit))
        return run_sync(catalog.read_part(self.backend, manifest, 1))


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def test_the_chain_leads_from_the_commit_to_the_part(shelf):
    shelf.put(sample_part())
    assert shelf.load() == sample_part()


def test_commits_are_listed_in_ascending_order_as_integers(shelf):
    for generation, step in [(10_000, 1), (9_999, 200_000_000), (9_999, 99_999_999)]:
        shelf.put_commit(generation, step)
    shelf.put_commit(3, 5, void=True)
    expected = [(3, 5), (9_999, 99_999_999), (9_999, 200_000_000), (10_000, 1)]
    assert run_sync(catalog.commit_keys(shelf.backend, "model")) == expected


def test_what_is_no_commit_of_this_checkpoint_is_not_listed(shelf):
    commit = shelf.put_commit(7, 100)
    for path in [
        "model/commits/0007-00000100.json.tmp",
        "model/commits/note.txt",
        "model/commits/7-1.json",
        "model2/commits/0001-00000001.json",
    ]:
        shelf.write(path, encode_commit(commit))
    assert run_sync(catalog.commit_keys(shelf.backend, "model")) == [KEY]


def test_generations_are_listed_in_ascending_order_as_integers(shelf):
    for number in (10_000, 7, 9_999):
        shelf.write(names.generation_path("model", number), b"{}")
    shelf.write("model/generations/7.json", b"{}")
    assert run_sync(catalog.generations(shelf.backend, "model")) == [7, 9_999, 10_000]


def test_nothing_is_listed_where_nothing_is(shelf):
    assert run_sync(catalog.commit_keys(shelf.backend, "model")) == []
    assert run_sync(catalog.generations(shelf.backend, "model")) == []
    assert run_sync(catalog.newest_key(shelf.backend, "model")) is None


def test_a_commit_that_is_not_there_is_not_found(shelf):
    with pytest.raises(NotFound):
        run_sync(catalog.read_commit(shelf.backend, "model", KEY))


def test_a_void_is_read_as_such(shelf):
    void = shelf.put_commit(7, 100, void=True)
    assert run_sync(catalog.read_commit(shelf.backend, "model", KEY)) == void
    assert void.void


def flip(data: bytes) -> bytes:
    """One bit of one digit or letter that keeps the JSON sound."""
    place = data.index(b'"version":1') + 10
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def put_commit_elsewhere(shelf: Shelf) -> None:
    other = shelf.put_commit(7, 99)
    shelf.write(COMMIT, encode_commit(other))


def put_commit_of_another_name(shelf: Shelf) -> None:
    commit = Commit("other", 7, 100, sample_manifest().attempt, "0" * 64)
    shelf.write(COMMIT, encode_commit(commit))


def put_manifest_of_another_name(shelf: Shelf) -> None:
    commit = Commit("model", 7, 100, sample_manifest().attempt, "0" * 64)
    shelf.put_manifest(dataclasses.replace(sample_manifest(), name="other"), commit)


def put_manifest_of_another_attempt(shelf: Shelf) -> None:
    other = "step-00000100/0007-2"
    commit = Commit("model", 7, 100, sample_manifest().attempt, "0" * 64)
    shelf.put_manifest(dataclasses.replace(sample_manifest(), attempt=other, uses=(other,)), commit)


def put_part_of_another_rank(shelf: Shelf) -> None:
    part = sample_part()
    path = part.files[0].path.replace("00001-of", "00000-of")
    files = (dataclasses.replace(part.files[0], path=path),)
    other = dataclasses.replace(part, rank=0, files=files, completed_by=(1,))
    encoded = encode_part(other)
    shelf.put(part, length=len(encoded), sha256=hashlib.sha256(encoded).hexdigest())
    shelf.write(PART, encoded)


def put_part_that_uses_what_is_not_protected(shelf: Shelf) -> None:
    delta = dataclasses.replace(sample_delta(), rank=1, world_size=2)
    own = dataclasses.replace(
        delta.files[1], path=delta.files[1].path.replace("00000-of-00001", "00001-of-00002")
    )
    shelf.put(dataclasses.replace(delta, files=(delta.files[0], own)), data_length=80)


BAD_CHAINS = {
    "commit-repeats": (COMMIT, "that of", [put_commit_elsewhere, put_commit_of_another_name]),
    "manifest-missing": (MANIFEST, "missing", [lambda shelf: shelf.delete(MANIFEST)]),
    "manifest-sha256": (
        MANIFEST,
        "SHA-256",
        [lambda shelf: shelf.write(MANIFEST, flip(shelf.read(MANIFEST)))],
    ),
    "manifest-repeats": (
        MANIFEST,
        "that of",
        [put_manifest_of_another_name, put_manifest_of_another_attempt],
    ),
    "part-missing": (PART, "missing", [lambda shelf: shelf.delete(PART)]),
    "part-length": (PART, "bytes", [lambda shelf: shelf.write(PART, shelf.read(PART) + b" ")]),
    "part-sha256": (PART, "SHA-256", [lambda shelf: shelf.write(PART, flip(shelf.read(PART)))]),
    "part-repeats": (PART, "that of", [put_part_of_another_rank]),
    "part-uses": (PART, BASE, [put_part_that_uses_what_is_not_protected]),
    "part-data-length": (PART, "data file", [lambda shelf: shelf.put(sample_part(), data_length=172)]),
}
"""By the names of docs/FORMAT.md: which file is blamed, what is said, and how to bring it about."""


@pytest.mark.parametrize(
    ("rule", "damage"), [(rule, damage) for rule, (_, _, ways) in BAD_CHAINS.items() for damage in ways]
)
def test_a_broken_chain_is_refused_by_file(shelf, rule, damage):
    path, says, _ = BAD_CHAINS[rule]
    shelf.put(sample_part())
    damage(shelf)
    with pytest.raises(CorruptCheckpoint, match=says) as caught:
        shelf.load()
    assert [found.file for found in caught.value.damage] == [path]


@pytest.mark.parametrize("path", [COMMIT, MANIFEST, PART])
def test_any_flipped_bit_on_the_chain_is_found(shelf, path):
    shelf.put(sample_part())
    sound = shelf.read(path)
    for place in range(0, len(sound), 7):
        shelf.write(path, sound[:place] + bytes([sound[place] ^ 1 << place % 8]) + sound[place + 1 :])
        with pytest.raises(CorruptCheckpoint):
            shelf.load()


def test_a_part_that_has_grown_is_not_read(shelf):
    shelf.put(sample_part())
    shelf.write(PART, bytes(1 << 20))

    async def refuse(path: str) -> bytes:
        raise AssertionError(f"{path} was read")

    commit = run_sync(catalog.read_commit(shelf.backend, "model", KEY))
    manifest = run_sync(catalog.read_manifest(shelf.backend, commit))
    shelf.backend.read = refuse
    with pytest.raises(CorruptCheckpoint):
        run_sync(catalog.read_part(shelf.backend, manifest, 1))


def test_a_delta_whose_uses_are_protected_is_read(shelf):
    delta = sample_delta()
    manifest = dataclasses.replace(
        sample_manifest(),
        full=False,
        uses=(delta.attempt, BASE),
        world_size=1,
        parts=(PartRef(0, "shard-00000-of-00001.json", 1, "0" * 64, 80),),
    )
    commit = shelf.put(delta, manifest)
    read = run_sync(catalog.read_manifest(shelf.backend, commit))
    assert run_sync(catalog.read_part(shelf.backend, read, 0)) == delta


def test_the_newest_is_the_greatest_that_is_not_void(shelf):
    shelf.put_commit(6, 900)
    shelf.put_commit(7, 50)
    shelf.put_commit(7, 100, void=True)
    assert run_sync(catalog.newest_key(shelf.backend, "model")) == (7, 50)


def test_a_newest_that_cannot_be_read_keeps_its_place_in_the_order(shelf):
    shelf.put_commit(6, 900)
    shelf.write(COMMIT, b"{}")
    assert run_sync(catalog.newest_key(shelf.backend, "model")) == KEY


def test_a_commit_that_vanishes_between_listing_and_reading_is_looked_for_again(shelf):
    shelf.put_commit(7, 100)
    inner = shelf.backend.list

    async def list_and_prune(prefix, delimiter=None):
        listed = await inner(prefix, delimiter)
        if len(listed) == 1:
            await shelf.backend.delete(COMMIT)
            other = Commit("model", 7, 200, "step-00000200/0007-1", "0" * 64)
            await shelf.backend.write(names.commit_path("model", other.key), encode_commit(other))
            shelf.backend.list = inner
        return listed

    shelf.backend.list = list_and_prune
    assert run_sync(catalog.newest_key(shelf.backend, "model")) == (7, 200)


def test_a_listing_that_never_agrees_with_the_files_ends(shelf):
    shelf.put_commit(7, 100)

    async def lose(path: str) -> bytes:
        raise NotFound(path)

    shelf.backend.read = lose
    with pytest.raises(NotFound):
        run_sync(catalog.newest_key(shelf.backend, "model"))


def pick(
    shelf: Shelf,
    step: int | None = None,
    rejected: Mapping[CommitKey, Sequence[Damage]] | None = None,
    notes: list[str] | None = None,
):
    notes = [] if notes is None else notes
    commit, newest = run_sync(catalog.pick(shelf.backend, "model", step, rejected or {}, notes))
    return commit.key, newest


def test_pick_takes_the_newest_that_was_not_rejected(shelf):
    shelf.put_commit(6, 900)
    shelf.put_commit(7, 100)
    shelf.put_commit(7, 200, void=True)
    assert pick(shelf) == ((7, 100), (7, 100))
    assert pick(shelf, rejected={KEY: ()}) == ((6, 900), (7, 100))


def prune_while_it_reads(shelf: Shelf) -> None:
    """Before the newest is read a second time a newer one comes, and a job that follows voids this one."""
    inner, reads = shelf.backend.read, []

    async def read(path: str) -> object:
        reads.append(path)
        if reads.count(COMMIT) == 2:
            shelf.backend.read = inner
            shelf.put_commit(8, 110)
            shelf.put_commit(7, 100, void=True)
        return await inner(path)

    shelf.backend.read = read


@pytest.mark.parametrize("older", [False, True])
def test_where_the_newest_turns_void_meanwhile_pick_takes_the_one_that_came_before_that(shelf, older):
    shelf.put_commit(7, 100)
    if older:
        shelf.put_commit(6, 900)
    prune_while_it_reads(shelf)
    assert pick(shelf) == ((8, 110), (8, 110))


def test_where_the_newest_turns_void_before_it_is_read_it_is_not_the_older_one(shelf):
    shelf.put_commit(6, 900)
    shelf.put_commit(7, 100)
    inner = shelf.backend.list

    async def list_and_void(prefix, delimiter=None):
        listed = await inner(prefix, delimiter)
        shelf.backend.list = inner
        shelf.put_commit(8, 110)
        shelf.put_commit(7, 100, void=True)
        return listed

    shelf.backend.list = list_and_void
    assert run_sync(catalog.newest_key(shelf.backend, "model")) == (8, 110)


def test_pick_of_a_step_takes_the_newest_generation_that_has_it(shelf):
    for generation, step in [(5, 100), (6, 100), (6, 200)]:
        shelf.put_commit(generation, step)
    shelf.put_commit(7, 100, void=True)
    assert pick(shelf, step=100) == ((6, 100), (6, 200))


def test_pick_passes_over_a_commit_that_cannot_be_read_and_notes_it_once(shelf):
    shelf.put_commit(6, 900)
    shelf.write(COMMIT, b"{}")
    notes: list[str] = []
    for _ in range(2):
        assert pick(shelf, notes=notes) == ((6, 900), KEY)
    (note,) = notes
    assert COMMIT in note


def test_the_note_about_the_only_commit_promises_none_before_it(shelf):
    shelf.write(COMMIT, b"{}")
    with pytest.raises(CorruptCheckpoint):
        pick(shelf, notes=(notes := []))
    assert [note.rpartition("; ")[2] for note in notes] == ["it is passed over"]


def test_pick_of_a_step_does_not_fall_back(shelf):
    shelf.put_commit(6, 100)
    shelf.write(COMMIT, b"{}")
    with pytest.raises(CorruptCheckpoint):
        pick(shelf, step=100)


def test_pick_says_that_there_is_nothing(shelf):
    with pytest.raises(CheckpointNotFound, match="no checkpoint called model"):
        pick(shelf)
    shelf.put_commit(7, 100, void=True)
    with pytest.raises(CheckpointNotFound, match="no checkpoint called model"):
        pick(shelf)


def test_pick_says_which_steps_there_are(shelf):
    shelf.put_commit(7, 100)
    with pytest.raises(CheckpointNotFound, match=r"step 50; there are steps \[100\]"):
        pick(shelf, step=50)


def test_where_all_is_damaged_it_is_no_fresh_start(shelf):
    shelf.put_commit(7, 100)
    with pytest.raises(CorruptCheckpoint, match="no checkpoint called model"):
        pick(shelf, rejected={KEY: ()})
