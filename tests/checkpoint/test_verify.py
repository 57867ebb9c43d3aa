"""Verifying: the exact file, tensor and bytes of any damage, wherever in the chain of hashes it is."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch.checkpoint import manifest as manifest_module
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.verify import VerifyReport, find_commit, verify
from dtruntime_torch.errors import CheckpointNotFound, Damage, StorageError
from dtruntime_torch.storage import MemoryBackend, run_sync
from dtruntime_torch.storage.backend import StorageBackend
from dtruntime_torch.testing.faulty_backend import FaultyBackend, not_done
from tests.checkpoint.saved_checkpoints import CHUNK, Saved, arrays_for, flip, grow, save, void


def check(backend: StorageBackend, key: CommitKey | None = None) -> VerifyReport:
    return run_sync(verify(backend, "model", key))


def ranges(report: VerifyReport) -> list[tuple[str, str | None, int, int]]:
    return [(damage.file, damage.tensor, damage.start, damage.stop) for damage in report.damage]


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def saved(backend: MemoryBackend) -> Saved:
    return save(backend)


def test_a_sound_checkpoint_is_counted(backend: MemoryBackend, saved: Saved) -> None:
    # layer0 and layer1 have 100 bytes each, shared has 20, in chunks of 16.
    assert check(backend) == VerifyReport("model", 100, 1, (), tensors=3, chunks=7 + 7 + 2, nbytes=220)
    assert check(backend).ok
    assert saved.manifest.nbytes == 220


def test_a_flipped_byte_of_a_tensor_is_named_exactly(backend: MemoryBackend, saved: Saved) -> None:
    start, stop = saved.images[1].place("layer1")
    flip(backend, saved.data_path(1), stop - 1)
    report = check(backend)
    chunk = (start + 6 * CHUNK, stop)
    before = saved.images[1].data[slice(*chunk)]
    after = bytes(run_sync(backend.read(saved.data_path(1))))[slice(*chunk)]
    expected, actual = xxhash.xxh3_128_hexdigest(before), xxhash.xxh3_128_hexdigest(after)
    assert report.damage == (Damage(saved.data_path(1), "layer1", *chunk, expected, actual),)
    assert not report.ok


@given(st.data())
def test_any_flipped_bit_of_any_file_is_found(data: st.DataObject) -> None:
    backend = MemoryBackend()
    saved = save(backend)
    entries = [entry for entry in run_sync(backend.list("model/")) if entry.size]
    entry = data.draw(st.sampled_from(entries))
    flip(backend, entry.path, data.draw(st.integers(0, entry.size - 1)))
    report = check(backend, saved.key)
    assert not report.ok
    if entry.path != saved.commit_path:
        assert {damage.file for damage in report.damage} == {entry.path}


@pytest.mark.parametrize("which", ["commit_path", "manifest_path"])
def test_a_damaged_commit_or_manifest_is_reported_and_what_it_names_is_not_read(
    backend: MemoryBackend, saved: Saved, which: str
) -> None:
    path = getattr(saved, which)
    flip(backend, path, 1)
    report = check(backend)
    assert {damage.file for damage in report.damage} == {path}
    assert (report.step, report.generation, report.tensors) == (100, 1, 0)


def test_a_missing_manifest_is_reported(backend: MemoryBackend, saved: Saved) -> None:
    run_sync(backend.delete(saved.manifest_path))
    (damage,) = check(backend).damage
    assert (damage.file, damage.actual) == (saved.manifest_path, "missing")


def test_behind_a_damaged_part_manifest_the_other_parts_are_checked(
    backend: MemoryBackend, saved: Saved
) -> None:
    flip(backend, saved.part_path(0), -1)
    flip(backend, saved.data_path(1), -1)
    report = check(backend)
    assert [damage.file for damage in report.damage] == [saved.part_path(0), saved.data_path(1)]
    assert report.tensors == 1


@pytest.mark.parametrize("which", ["part_path", "data_path"])
def test_a_missing_file_of_a_rank_is_reported(backend: MemoryBackend, saved: Saved, which: str) -> None:
    path = getattr(saved, which)(1)
    run_sync(backend.delete(path))
    (damage,) = check(backend).damage
    assert (damage.file, damage.tensor, damage.actual) == (path, None, "missing")


def test_a_truncated_file_names_length_and_tensors(backend: MemoryBackend, saved: Saved) -> None:
    grow(backend, saved, 0, by=-1)
    length = saved.images[0].layout.length
    start, stop = saved.images[0].place("shared")
    assert ranges(check(backend)) == [
        (saved.data_path(0), "shared", start + CHUNK, stop),
        (saved.data_path(0), None, length - 1, length),
    ]


def test_a_file_that_has_grown_is_damaged(backend: MemoryBackend, saved: Saved) -> None:
    grow(backend, saved, 1, by=7)
    length = saved.images[1].layout.length
    assert ranges(check(backend)) == [(saved.data_path(1), None, length, length + 7)]


def test_the_file_of_a_rank_that_wrote_no_tensor_is_checked(backend: MemoryBackend) -> None:
    saved = save(backend, held=[arrays_for(1)[0], {}])
    assert check(backend).ok
    flip(backend, saved.data_path(1), 9)
    assert ranges(check(backend)) == [(saved.data_path(1), None, 0, saved.images[1].layout.length)]


def test_the_newest_is_checked_and_voids_are_passed_over(backend: MemoryBackend) -> None:
    first, second = save(backend, step=300, generation=1), save(backend, step=200, generation=2)
    assert check(backend).step == 200
    void(backend, second)
    assert check(backend).step == 300
    assert check(backend, first.key).ok


def test_of_a_step_that_two_generations_saved_the_newer_is_found(backend: MemoryBackend) -> None:
    older, newer = save(backend, generation=1), save(backend, generation=2)
    assert run_sync(find_commit(backend, "model", 100)) == newer.key
    void(backend, newer)
    assert run_sync(find_commit(backend, "model", 100)) == older.key


def test_a_damaged_commit_is_still_the_newest(backend: MemoryBackend) -> None:
    save(backend, step=100)
    flip(backend, save(backend, step=200).commit_path, 0)
    assert run_sync(find_commit(backend, "model")) == CommitKey(1, 200)
    assert not check(backend).ok


def test_what_is_not_committed_is_not_found(backend: MemoryBackend) -> None:
    for step in (None, 100):
        with pytest.raises(CheckpointNotFound, match="no checkpoint model"):
            run_sync(find_commit(backend, "model", step))
    with pytest.raises(CheckpointNotFound):
        check(backend)
    saved = save(backend)
    with pytest.raises(CheckpointNotFound, match="of step 7;"):
        run_sync(find_commit(backend, "model", 7))
    with pytest.raises(CheckpointNotFound, match="step 100 in generation 3"):
        check(backend, CommitKey(3, 100))
    void(backend, saved)
    with pytest.raises(CheckpointNotFound, match="step 100 in generation 1: it was removed or given up"):
        check(backend, saved.key)


@pytest.mark.parametrize("gone", ["removed", "voided"])
def test_what_a_prune_takes_meanwhile_is_not_damaged(backend: MemoryBackend, gone: str) -> None:
    old, new = save(backend, step=100), save(backend, step=200)
    faulty = FaultyBackend(backend)

    async def prune(call) -> object:
        if gone == "removed":
            await backend.delete(old.commit_path)
        else:
            record = manifest_module.Commit("model", *old.key, "", "", void=True)
            await backend.write(old.commit_path, manifest_module.encode_commit(record))
        await backend.delete(old.data_path(0))
        return await call.proceed()

    faulty.when("size", old.data_path(0), prune)
    with pytest.raises(CheckpointNotFound, match="step 100"):
        check(faulty, old.key)
    assert check(faulty).step == new.key.step


def test_when_the_newest_goes_the_next_newest_is_checked(backend: MemoryBackend) -> None:
    save(backend, step=100)
    newest = save(backend, step=200)
    faulty = FaultyBackend(backend)

    async def remove(call) -> object:
        await backend.delete(newest.commit_path)
        await backend.delete(newest.manifest_path)
        return await call.proceed()

    faulty.when("read", newest.manifest_path, remove)
    assert check(faulty).step == 100


def test_a_storage_that_fails_is_no_damage(backend: MemoryBackend, saved: Saved) -> None:
    faulty = FaultyBackend(backend)
    faulty.when("read_range", saved.data_path(1), not_done(), nth=None)
    with pytest.raises(StorageError, match="scripted fault"):
        check(faulty)


def test_progress_rises_to_all_bytes(backend: MemoryBackend, saved: Saved) -> None:
    seen: list[tuple[int, int]] = []
    run_sync(verify(backend, "model", saved.key, lambda done, total: seen.append((done, total))))
    assert seen == sorted(seen)
    assert seen[-1] == (220, 220)
    assert {total for _, total in seen} == {220}


def test_a_manifest_moved_to_another_step_is_damaged(backend: MemoryBackend, saved: Saved) -> None:
    data = run_sync(backend.read(saved.commit_path))
    run_sync(backend.write("model/commits/0001-00000200.json", data))
    report = check(backend, CommitKey(1, 200))
    assert [damage.file for damage in report.damage] == ["model/commits/0001-00000200.json"]


def test_many_ranks_are_checked(backend: MemoryBackend) -> None:
    save(backend, held=arrays_for(5))
    report = check(backend)
    assert report.ok
    assert report.tensors == 6


def test_a_damaged_rank_does_not_hide_another(backend: MemoryBackend) -> None:
    saved = save(backend, held=arrays_for(4))
    for rank in (1, 3):
        flip(backend, saved.data_path(rank), -1)
    assert [damage.tensor for damage in check(backend).damage] == ["layer1", "layer3"]
