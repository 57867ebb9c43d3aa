"""What a cleaner deletes, and in which order."""

from __future__ import annotations

import pytest

from dtruntime_torch.checkpoint.cleaning.cleaner import Cleaner
from dtruntime_torch.checkpoint.cleaning.retention import KEEP_ALL
from dtruntime_torch.checkpoint.names import Attempt, CommitKey, commit_path
from dtruntime_torch.storage import LocalBackend, run_sync
from dtruntime_torch.testing.faulty_backend import Call, FaultyBackend, lost_answer, not_done
from tests.checkpoint.cleaning.shortcuts import KEEP_ONE, after_commit
from tests.checkpoint.commits import NAME, Time, data_path
from tests.checkpoint.lineages import Shelf


def changes(backend: FaultyBackend, since: int = 0) -> list[tuple[str, str]]:
    """The calls that changed something, and the listings that came between, without the name."""
    kept = [call for call in backend.calls[since:] if call[0] in ("write", "create", "delete", "list")]
    return [(operation, path.removeprefix(f"{NAME}/")) for operation, path in kept]


# --- retention ------------------------------------------------------------------------------------------------


def test_the_commit_goes_first_then_the_manifest_then_it_looks_then_the_files(shelf, backend):
    cleaner = Cleaner(backend, NAME, KEEP_ONE)
    old = shelf.put(1, 1)
    after_commit(cleaner, 1)
    shelf.put(1, 2)
    since = len(backend.calls)
    after_commit(cleaner, 2)
    first = changes(backend, since).index(("delete", "commits/0001-00000001.json"))
    assert changes(backend, since)[first:] == [
        ("delete", "commits/0001-00000001.json"),
        ("delete", f"{old.path}/manifest.json"),
        ("list", "step-"),
        ("list", "step-"),
        ("list", f"{old.path}/"),
        ("delete", data_path(old.path).removeprefix(f"{NAME}/").replace(".safetensors", ".json")),
        ("delete", data_path(old.path).removeprefix(f"{NAME}/")),
    ]
    assert shelf.steps() == [2] and shelf.attempts() == {Attempt(1, 2, 1).path}


def test_the_newest_stays_where_nothing_else_is_kept(shelf, backend):
    shelf.put(1, 1)
    after_commit(Cleaner(backend, NAME, KEEP_ONE), 1)
    assert shelf.steps() == [1] and shelf.broken() == []


def test_everything_stays_without_a_policy(shelf, backend):
    for step in (1, 2, 3):
        shelf.put(1, step)
    after_commit(Cleaner(backend, NAME, KEEP_ALL), 3)
    assert shelf.steps() == [1, 2, 3]


def test_a_commit_of_ones_own_whose_create_was_answered_is_removed(shelf, backend):
    cleaner = Cleaner(backend, NAME, KEEP_ONE)
    for step in (1, 2):
        shelf.put(1, step)
        after_commit(cleaner, step)
    assert list(shelf.commits()) == [CommitKey(1, 2)]


@pytest.mark.parametrize("why", ["not answered", "an older generation", "another process made it"])
def test_a_commit_that_may_still_be_created_is_overwritten_with_void(shelf, backend, why):
    cleaner = Cleaner(backend, NAME, KEEP_ONE)
    shelf.put(1, 1)
    if why != "another process made it":
        after_commit(cleaner, 1, answered=why != "not answered")
    generation = 2 if why == "an older generation" else 1
    shelf.put(generation, 2)
    after_commit(cleaner, 2, generation)
    assert shelf.commits()[CommitKey(1, 1)].void
    assert shelf.attempts() == {Attempt(generation, 2, 1).path}


def test_files_that_a_kept_delta_names_stay_until_that_goes(shelf, backend):
    cleaner = Cleaner(backend, NAME, KEEP_ONE)
    base = shelf.put(1, 1)
    delta = shelf.put(1, 2, base)
    after_commit(cleaner, 2)
    assert shelf.steps() == [2] and shelf.attempts() == {base.path, delta.path}
    assert f"{base.path}/manifest.json" not in shelf.files()
    shelf.put(1, 3)
    after_commit(cleaner, 3)
    assert shelf.attempts() == {Attempt(1, 3, 1).path}


def test_files_that_a_delta_on_its_way_names_stay(shelf, backend):
    base = shelf.put(1, 1)
    shelf.put(1, 2)
    shelf.put_intent(Attempt(1, 3, 1), base)
    after_commit(Cleaner(backend, NAME, KEEP_ONE), 2)
    assert base.path in shelf.attempts()


def test_commits_of_newer_generations_are_left_alone(shelf, backend):
    for key in ((1, 1), (2, 5), (2, 6), (2, 7)):
        shelf.put(*key)
    after_commit(Cleaner(backend, NAME, KEEP_ONE), 1)
    assert shelf.steps() == [5, 6, 7]


def test_a_commit_that_somebody_else_took_meanwhile_is_left_to_them(shelf, backend):
    old = shelf.put(1, 1)
    shelf.put(1, 2)

    async def taken(call: Call) -> object:
        await backend._inner.delete(call.path)
        return await call.proceed()

    backend.when("read", commit_path(NAME, old.key), taken, nth=2)
    after_commit(Cleaner(backend, NAME, KEEP_ONE), 2)
    assert f"{old.path}/manifest.json" in shelf.files()


# --- the sweep ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["put_data", "put_intent"])
def test_an_attempt_of_an_older_generation_is_voided_before_its_files_go(shelf, backend, left):
    dead = getattr(shelf, left)(Attempt(1, 7, 2))
    since = len(backend.calls)
    run_sync(Cleaner(backend, NAME).before_save(2))
    done = changes(backend, since)
    order = [
        done.index(("create", "commits/0001-00000007.json")),
        done.index(("delete", f"{dead.path}/manifest.json")),
        len(done) - 1 - done[::-1].index(("list", "step-")),
        done.index(("list", f"{dead.path}/")),
    ]
    assert order == sorted(order)
    assert shelf.attempts() == set() and shelf.commits()[dead.key].void


def test_attempts_of_the_own_and_of_newer_generations_are_left_alone(shelf, backend):
    for generation in (2, 3):
        shelf.put_data(Attempt(generation, 7, 1))
        shelf.put_intent(Attempt(generation, 8, 1))
    before = shelf.files()
    run_sync(Cleaner(backend, NAME).before_save(2))
    assert shelf.files() == before


def test_an_attempt_that_is_committed_after_all_is_left_alone(shelf, backend):
    slow = Attempt(1, 7, 1)
    shelf.put_intent(slow)

    async def first(call: Call) -> object:
        Shelf(backend._inner).put(1, 7)
        return await call.proceed()

    backend.when("create", "*", first)
    run_sync(Cleaner(backend, NAME).before_save(2))
    assert shelf.steps() == [7] and shelf.broken() == []


def test_another_try_of_a_step_that_was_committed_is_swept(shelf, backend):
    shelf.put_data(Attempt(1, 7, 1))
    kept = shelf.put(1, 7, number=2)
    run_sync(Cleaner(backend, NAME).before_save(2))
    assert shelf.attempts() == {kept.path} and shelf.steps() == [7]


@pytest.mark.parametrize("fault", [lost_answer, not_done])
def test_an_unknown_outcome_of_the_fence_is_asked_again_not_guessed(shelf, backend, fault):
    shelf.put_intent(Attempt(1, 7, 1))
    backend.when("create", "*", fault())
    time = Time()
    run_sync(Cleaner(backend, NAME, clock=lambda: time.now, sleep=time.sleep).before_save(2))
    assert shelf.attempts() == set() and shelf.commits()[CommitKey(1, 7)].void
    assert [operation for operation, _ in backend.calls].count("create") == 2


def test_a_fence_that_stays_unknown_deletes_nothing(shelf, backend):
    shelf.put_intent(Attempt(1, 7, 1))
    backend.when("create", "*", not_done(), nth=None)
    time = Time()
    since = len(backend.calls)
    run_sync(Cleaner(backend, NAME, clock=lambda: time.now, sleep=time.sleep).before_save(2))
    assert not [call for call in backend.calls[since:] if call[0] == "delete"]


def test_what_a_kept_delta_names_is_not_swept_and_gets_no_void(shelf, backend):
    base = shelf.put_data(Attempt(1, 1, 1))
    shelf.put(1, 2, base)
    run_sync(Cleaner(backend, NAME).before_save(2))
    assert base.path in shelf.attempts() and list(shelf.commits()) == [CommitKey(1, 2)]


def test_a_manifest_whose_commit_was_pruned_protects_nothing_any_more(shelf, backend):
    base = shelf.put_data(Attempt(1, 1, 1))
    dead = shelf.put_intent(Attempt(1, 2, 1), base)
    shelf.put_void(1, 2)
    run_sync(Cleaner(backend, NAME).before_save(2))
    assert shelf.attempts() == set(), dead


def test_the_sweep_comes_once_in_a_generation(shelf, backend):
    cleaner = Cleaner(backend, NAME)
    run_sync(cleaner.before_save(2))
    since = len(backend.calls)
    run_sync(cleaner.before_save(2))
    assert backend.calls[since:] == []
    run_sync(cleaner.before_save(3))
    assert backend.calls[since:] != []


def test_what_a_killed_write_left_is_swept_with_its_folder(tmp_path):
    folder = tmp_path / NAME / "step-00000007" / "0001-1"
    folder.mkdir(parents=True)
    (folder / ".tmp-0123456789abcdef").write_bytes(b"half a file")
    run_sync(Cleaner(LocalBackend(tmp_path), NAME).before_save(2))
    assert not (tmp_path / NAME / "step-00000007").exists()


# --- who lost -------------------------------------------------------------------------------------------------


def test_who_lost_deletes_its_manifest_looks_and_deletes_its_files(shelf, backend):
    cleaner = Cleaner(backend, NAME)
    run_sync(cleaner.before_save(1))
    lost = shelf.put_intent(Attempt(1, 7, 1))
    shelf.put_void(1, 7)
    cleaner.gave_up(lost)
    since = len(backend.calls)
    run_sync(cleaner.before_save(1))
    assert [call[0] for call in changes(backend, since)] == [
        "delete",
        "list",
        "list",
        "list",
        "delete",
        "delete",
    ]
    assert shelf.attempts() == set()


def test_files_of_a_loser_that_a_delta_names_stay(shelf, backend):
    # It had been committed, used by a later incarnation, and pruned.
    cleaner = Cleaner(backend, NAME)
    lost = shelf.put_intent(Attempt(1, 7, 1))
    shelf.put_void(1, 7)
    shelf.put(2, 8, lost)
    cleaner.gave_up(lost)
    run_sync(cleaner.before_save(1))
    assert shelf.broken() == []
