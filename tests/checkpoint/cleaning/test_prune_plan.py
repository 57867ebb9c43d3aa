"""Any lineage of full saves and deltas, any policy: what a kept manifest names stays, and all else goes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from dtruntime_torch.checkpoint.cleaning.cleaner import Cleaner
from dtruntime_torch.checkpoint.cleaning.prune_plan import PruneReport
from dtruntime_torch.checkpoint.cleaning.retention import RetentionPolicy
from dtruntime_torch.checkpoint.manifest import decode_manifest
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.storage import MemoryBackend, run_sync
from tests.checkpoint.cleaning.test_retention import policies
from tests.checkpoint.commits import NAME
from tests.checkpoint.lineages import DATA, Shelf


@st.composite
def shelves(draw: st.DrawFn) -> Shelf:
    """What up to three generations left: checkpoints, some void since, intents and bare data."""
    shelf = Shelf(MemoryBackend())
    steps = st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True)
    committed: list[Attempt] = []
    for generation in range(1, draw(st.integers(1, 3)) + 1):
        shelf.claim(generation)
        for step in sorted(draw(steps)):
            kind = draw(st.sampled_from(["checkpoint"] * 3 + ["pruned", "intent", "data"]))
            # A delta names what its parent names, and any of that may have lost its own manifest since.
            uses = draw(st.lists(st.sampled_from(committed), max_size=3)) if committed else []
            attempt = Attempt(generation, step, draw(st.integers(1, 2)))
            loss = {"loss": draw(st.floats(allow_nan=False, allow_infinity=False))}
            if kind in ("checkpoint", "pruned"):
                shelf.put(
                    generation, step, *uses, number=attempt.number, metadata=draw(st.none() | st.just(loss))
                )
                committed.append(attempt)
            elif kind == "intent":
                shelf.put_intent(attempt, *uses)
            else:
                shelf.put_data(attempt)
            if kind == "pruned":
                shelf.put_void(generation, step)
                run_sync(shelf.backend.delete(f"{NAME}/{attempt.path}/manifest.json"))
    return shelf


def uses_of(shelf: Shelf, attempt: str) -> set[str]:
    path = f"{NAME}/{attempt}/manifest.json"
    return set(decode_manifest(bytes(run_sync(shelf.backend.read(path))), path).uses)


def prune(shelf: Shelf, policy: RetentionPolicy, dry_run: bool = False) -> PruneReport:
    return run_sync(Cleaner(shelf.backend, NAME, policy).prune(dry_run=dry_run))


def total(shelf: Shelf) -> int:
    return sum(entry.size for entry in run_sync(shelf.backend.list(f"{NAME}/step-")))


@settings(max_examples=300)
@given(shelves(), policies)
def test_what_a_kept_manifest_names_stays_and_all_else_goes(shelf, policy):
    live = {key: commit for key, commit in shelf.commits().items() if not commit.void}
    newest_generation = max(attempt_of(path).generation for path in shelf.attempts())
    own_intents = [
        path
        for path in shelf.attempts()
        if attempt_of(path).generation == newest_generation
        and f"{path}/manifest.json" in shelf.files()
        and path not in {commit.attempt for commit in live.values()}
    ]
    metadata = {key: noted_metadata(shelf, commit.attempt) for key, commit in live.items()}
    kept = policy.kept(metadata)
    named = set().union(
        *(uses_of(shelf, live[key].attempt) for key in kept), *(uses_of(shelf, path) for path in own_intents)
    )
    own = {path for path in shelf.attempts() if attempt_of(path).generation == newest_generation}
    own_uncommitted = own - {commit.attempt for commit in live.values()}
    # What the newest generation has not committed may still be on its way, but for what it has taken back itself.
    before = shelf.attempts()
    prune(shelf, policy)
    assert {key for key, commit in shelf.commits().items() if not commit.void} == kept
    assert shelf.broken() == []
    assert before & named <= shelf.attempts() <= named | own_uncommitted


@given(shelves(), policies)
def test_a_dry_run_tells_what_the_real_one_does_and_changes_nothing(shelf, policy):
    files, bytes_before, before = shelf.files(), total(shelf), shelf.attempts()
    live = {key for key, commit in shelf.commits().items() if not commit.void}
    told = prune(shelf, policy, dry_run=True)
    assert shelf.files() == files
    done = prune(shelf, policy)
    assert done == replace(told, dry_run=False)
    assert set(done.commits) == live - {key for key, commit in shelf.commits().items() if not commit.void}
    gone = before - shelf.attempts()
    assert set(done.attempts) == gone
    assert done.nbytes <= bytes_before - total(shelf)


@given(shelves(), policies)
def test_why_files_stay_is_told_of_each_attempt_without_a_manifest_that_a_delta_uses(shelf, policy):
    told = prune(shelf, policy).in_use
    there = {path for path in shelf.attempts() if f"{path}/manifest.json" in shelf.files()}
    named = set().union(*(uses_of(shelf, path) for path in there))
    assert {line.split()[2] for line in told} == (shelf.attempts() & named) - there
    assert len(told) == len(set(told))


def test_of_many_deltas_that_use_an_attempt_three_are_named_and_the_others_counted():
    shelf = Shelf(MemoryBackend())
    base = shelf.put(1, 1)
    first, second, third, _ = (shelf.put(1, step, base) for step in (2, 3, 4, 5))
    (told,) = prune(shelf, RetentionPolicy(4)).in_use
    named = f"{first.path}, {second.path}, {third.path}"
    assert told == f"files of {base.path} stay, used by {named} and 1 more"


@given(shelves(), policies)
def test_a_second_prune_finds_nothing_to_do(shelf, policy):
    prune(shelf, policy)
    files = shelf.files()
    again = prune(shelf, policy)
    assert (again.commits, again.attempts, again.nbytes) == ((), (), 0)
    assert shelf.files() == files


def test_the_bytes_of_all_files_of_an_attempt_are_counted():
    shelf = Shelf(MemoryBackend())
    old, _ = shelf.put(1, 1), shelf.put(1, 2)
    manifest = run_sync(shelf.backend.size(f"{NAME}/{old.path}/manifest.json"))
    report = prune(shelf, RetentionPolicy(1), dry_run=True)
    assert report == PruneReport(True, (CommitKey(1, 1),), (old.path,), 2 * len(DATA) + manifest, ())


def attempt_of(path: str) -> Attempt:
    step, _, rest = path.removeprefix("step-").partition("/")
    generation, number = rest.split("-")
    return Attempt(int(generation), int(step), int(number))


def noted_metadata(shelf: Shelf, attempt: str) -> object:
    path = f"{NAME}/{attempt}/manifest.json"
    return decode_manifest(bytes(run_sync(shelf.backend.read(path))), path).metadata
