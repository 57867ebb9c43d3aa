"""What a cleaner does when something cannot be understood, fails, or is not seen by other hosts yet."""

from __future__ import annotations

import logging

import pytest

from dtruntime_torch.checkpoint.cleaning.cleaner import Cleaner
from dtruntime_torch.checkpoint.cleaning.look import Manifests, Noted
from dtruntime_torch.checkpoint.cleaning.stock import take_stock
from dtruntime_torch.checkpoint.names import Attempt, CommitKey, commit_path
from dtruntime_torch.storage import MemoryBackend, run_sync
from dtruntime_torch.testing.faulty_backend import Call, FaultyBackend, Stopped, killed, lost_answer, not_done
from tests.checkpoint.cleaning.shortcuts import KEEP_ONE, after_commit
from tests.checkpoint.commits import NAME, Time
from tests.checkpoint.lineages import Shelf
from tests.checkpoint.saved_checkpoints import make_newer

# --- what cannot be read --------------------------------------------------------------------------------------


def damage(shelf: Shelf, how: str) -> str:
    """Makes step 2 something that cannot be understood; returns the file that says so."""
    attempt = Attempt(1, 2, 1)
    manifest = f"{attempt.path}/manifest.json"
    if how == "manifest":
        shelf.write(f"{NAME}/{manifest}", b"{}")
    elif how == "another manifest":
        shelf.put_intent(attempt, metadata="not what was committed")
    elif how == "newer manifest":
        data = bytes(run_sync(shelf.backend.read(f"{NAME}/{manifest}")))
        shelf.write(f"{NAME}/{manifest}", data.replace(b'"requires":[]', b'"requires":["chains"]'))
    elif how == "no manifest":
        run_sync(shelf.backend.delete(f"{NAME}/{manifest}"))
    elif how == "commit":
        shelf.write(commit_path(NAME, attempt.key), b"{}")
        return "commits/0001-00000002.json"
    elif how == "intent":
        run_sync(shelf.backend.delete(commit_path(NAME, attempt.key)))
        shelf.write(f"{NAME}/{manifest}", b"{}")
    return manifest


DAMAGES = ["manifest", "another manifest", "newer manifest", "no manifest", "commit", "intent"]


@pytest.mark.parametrize("how", DAMAGES)
def test_nothing_is_deleted_while_something_cannot_be_understood(shelf, backend, caplog, how):
    for step in (1, 2, 3):
        shelf.put(1, step)
    shelf.put_data(Attempt(1, 9, 1))
    path = damage(shelf, how)
    before = shelf.files()
    cleaner = Cleaner(backend, NAME, KEEP_ONE)
    with caplog.at_level(logging.WARNING):
        run_sync(cleaner.before_save(2))
        shelf.put(2, 4)
        after_commit(cleaner, 4, generation=2)
    assert set(before) <= set(shelf.files()) and not any(commit.void for commit in readable(shelf))
    assert f"{NAME}/{path}" in caplog.text
    assert f"dtruntime drop PATH {NAME} {Attempt(1, 2, 1).path}" in caplog.text
    report = run_sync(cleaner.prune(2))
    assert report.blocked and (report.commits, report.attempts, report.nbytes) == ((), (), 0)


@pytest.mark.parametrize("how", DAMAGES)
def test_what_is_dropped_no_longer_blocks(shelf, backend, how):
    for step in (1, 2, 3):
        shelf.put(1, step)
    dead = shelf.put_data(Attempt(1, 9, 1))
    damage(shelf, how)
    cleaner = Cleaner(backend, NAME, KEEP_ONE)
    run_sync(cleaner.before_save(2))
    assert run_sync(Cleaner(backend, NAME).drop(Attempt(1, 2, 1))).blocked == ()
    run_sync(cleaner.before_save(2))
    shelf.put(2, 4)
    after_commit(cleaner, 4, generation=2)
    assert shelf.steps() == [4] and shelf.attempts() == {Attempt(2, 4, 1).path}, dead


def readable(shelf: Shelf) -> list:
    try:
        return list(shelf.commits().values())
    except ValueError:
        return []


# --- failures -------------------------------------------------------------------------------------------------


def test_a_cause_is_logged_once_until_it_is_gone(shelf, backend, caplog):
    cleaner = Cleaner(backend, NAME)
    backend.when("list", f"{NAME}/commits/", not_done(), nth=None)
    for _ in range(3):
        run_sync(cleaner.before_save(2))
    assert len(caplog.records) == 1 and "was not done" in caplog.text


def test_too_little_time_leaves_the_rest_for_the_next_save(shelf, backend, caplog):
    cleaner = Cleaner(backend, NAME, KEEP_ONE)
    for step in (1, 2):
        shelf.put(1, step)
    backend.when("delete", "*", Stopped())
    run_sync(cleaner.after_commit(CommitKey(1, 2), True, 0.01))
    assert "too little time" in caplog.text
    run_sync(cleaner.before_save(1))
    assert shelf.attempts() == {Attempt(1, 2, 1).path}


def scene(shelf: Shelf) -> None:
    """A generation that died: a pruned base of a delta, a delta, two dead attempts, and three checkpoints."""
    base = shelf.put(1, 1)
    delta = shelf.put(1, 2, base)
    shelf.put(1, 3, base, delta)
    shelf.put_data(Attempt(1, 4, 1))
    shelf.put_intent(Attempt(1, 5, 1), delta)


def clean(cleaner: Cleaner, shelf: Shelf) -> None:
    """What a later generation does in two saves."""
    run_sync(cleaner.before_save(2))
    if CommitKey(2, 8) not in shelf.commits():
        shelf.put(2, 8)
    after_commit(cleaner, 8, generation=2)
    run_sync(cleaner.before_save(2))


def calls_of(operation: str) -> int:
    backend = FaultyBackend(MemoryBackend())
    scene(Shelf(backend._inner))
    clean(Cleaner(backend, NAME, KEEP_ONE), Shelf(backend._inner))
    return len([call for call in backend.calls if operation in ("*", call[0])])


@pytest.mark.parametrize("fault", [not_done, lost_answer])
@pytest.mark.parametrize("nth", range(1, calls_of("*") + 1))
def test_after_a_failure_of_any_call_the_next_saves_delete_all_that_is_left(fault, nth):
    backend = FaultyBackend(MemoryBackend())
    shelf = Shelf(backend._inner)
    scene(shelf)
    time = Time()
    cleaner = Cleaner(backend, NAME, KEEP_ONE, clock=lambda: time.now, sleep=time.sleep)
    backend.when("*", "*", fault(), nth=nth)
    clean(cleaner, shelf)
    assert shelf.broken() == []
    clean(cleaner, shelf)
    assert shelf.steps() == [8] and shelf.attempts() == {Attempt(2, 8, 1).path}


class Killed(BaseException):
    """The process is no more."""


@pytest.mark.parametrize("nth", range(1, calls_of("*") + 1))
def test_after_a_kill_before_any_call_the_next_generation_deletes_all_that_is_left(nth):
    backend = FaultyBackend(MemoryBackend())
    shelf = Shelf(backend._inner)
    scene(shelf)
    backend.when("*", "*", killed(Killed()), nth=nth)
    with pytest.raises(Killed):
        clean(Cleaner(backend, NAME, KEEP_ONE), shelf)
    assert shelf.broken() == [] and shelf.steps()
    cleaner = Cleaner(shelf.backend, NAME, KEEP_ONE)
    run_sync(cleaner.before_save(3))
    shelf.put(3, 9)
    after_commit(cleaner, 9, generation=3)
    assert shelf.steps() == [9] and shelf.attempts() == {Attempt(3, 9, 1).path}


@pytest.mark.parametrize("nth", range(1, calls_of("delete") + 1))
def test_a_delete_that_never_works_keeps_only_what_depends_on_it(nth):
    backend = FaultyBackend(MemoryBackend())
    shelf = Shelf(backend._inner)
    scene(shelf)
    uses = {**dict.fromkeys(shelf.attempts(), frozenset()), **{a: n.uses for a, n in noted(shelf).items()}}
    stuck: list[str] = []

    async def stick(call: Call) -> object:
        stuck.append(call.path.removeprefix(f"{NAME}/"))
        backend.when("delete", call.path, not_done(), nth=None)
        raise call.error("is refused")

    backend.when("delete", "*", stick, nth=nth)
    cleaner = Cleaner(backend, NAME, KEEP_ONE)
    clean(cleaner, shelf)
    clean(cleaner, shelf)
    (path,) = stuck
    attempt, _, file_name = path.rpartition("/")
    kept = {attempt} | (uses[attempt] if file_name == "manifest.json" else set())
    assert shelf.steps() == [8] and shelf.broken() == []
    assert shelf.attempts() <= kept | {Attempt(2, 8, 1).path}


def noted(shelf: Shelf) -> dict[str, Noted]:
    return run_sync(take_stock(shelf.backend, NAME, Manifests(shelf.backend, NAME), set())).manifests


# --- other hosts ----------------------------------------------------------------------------------------------


def test_where_listings_are_cached_the_look_comes_only_when_others_see_the_change(shelf, backend):
    time = Time()
    backend.settle_seconds = 90.0
    cleaner = Cleaner(backend, NAME, KEEP_ONE, clock=lambda: time.now, sleep=time.sleep)
    old, _ = shelf.put(1, 1), shelf.put(1, 2)
    after_commit(cleaner, 2)
    assert shelf.steps() == [2] and old.path in shelf.attempts()
    time.now = 89.9
    run_sync(cleaner.before_save(1))
    assert old.path in shelf.attempts()
    time.now = 90.0
    run_sync(cleaner.before_save(1))
    assert old.path not in shelf.attempts()
    assert time.slept == []


def test_a_prune_by_hand_waits_until_others_see_the_change(shelf, backend):
    time = Time()
    backend.settle_seconds = 90.0
    cleaner = Cleaner(backend, NAME, KEEP_ONE, clock=lambda: time.now, sleep=time.sleep)
    old, _ = shelf.put(1, 1), shelf.put(1, 2)
    assert run_sync(cleaner.prune()).attempts == (old.path,)
    assert sum(time.slept) == 90.0


def test_of_a_sound_one_of_a_later_version_only_the_upgrade_is_advised(shelf, backend):
    for step in (1, 2, 3):
        shelf.put(1, step)
    make_newer(backend, NAME, CommitKey(1, 2))
    before = shelf.files()
    (reason,) = run_sync(Cleaner(backend, NAME, KEEP_ONE).prune()).blocked
    assert "chains" in reason and "upgrade" in reason
    assert "drop" not in reason and "epair" not in reason
    assert shelf.files() == before


@pytest.mark.parametrize("tries", [(2,), (2, 3), ()])
def test_of_a_commit_that_cannot_be_read_the_tries_that_are_there_are_named(shelf, backend, tries):
    shelf.write(commit_path(NAME, CommitKey(1, 2)), b"{}")
    for number in tries:
        shelf.put_intent(Attempt(1, 2, number))
    shelf.put_intent(Attempt(1, 3, 7))
    (reason,) = run_sync(Cleaner(backend, NAME, KEEP_ONE).prune()).blocked
    advised = [f"`dtruntime drop PATH {NAME} {Attempt(1, 2, number).path}`" for number in tries or (1,)]
    assert reason.endswith(f"Give its attempt up with {', or '.join(advised)}")


@pytest.mark.parametrize("how", ["sound", "commit", "uncommitted", "another try"])
def test_a_committed_one_that_is_dropped_is_counted(shelf, backend, how):
    for step in (1, 2, 3):
        shelf.put(1, step)
    attempt = Attempt(1, 2, 1)
    if how == "commit":
        shelf.write(commit_path(NAME, attempt.key), b"{}")
    elif how == "uncommitted":
        attempt = shelf.put_intent(Attempt(1, 9, 1))
    elif how == "another try":
        attempt = shelf.put_intent(Attempt(1, 2, 2))
    report = run_sync(Cleaner(backend, NAME).drop(attempt))
    assert report.commits == ((attempt.key,) if how in ("sound", "commit") else ())
    assert report.attempts == (attempt.path,)


def test_of_a_commit_that_looks_like_one_of_a_later_version_the_upgrade_comes_first(shelf, backend):
    path = commit_path(NAME, shelf.put(1, 2).key)
    data = bytes(run_sync(backend.read(path)))
    shelf.write(path, data.replace(b'"version":1', b'"version":2'))
    (reason,) = run_sync(Cleaner(backend, NAME, KEEP_ONE).prune()).blocked
    assert (
        "upgrade dtruntime_torch. If that does not help, give its attempt up with `dtruntime drop" in reason
    )
