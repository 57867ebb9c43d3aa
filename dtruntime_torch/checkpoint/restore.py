"""Tries commits until one is loaded. Each try is agreed by all ranks: everyone reads and checks its share, all fill.

Nothing of the state is touched before all ranks know that names, shapes and dtypes fit, and the lengths and headers of
the files. Then contiguous tensors on the host are read straight into place, each chunk digested on the way; all else is
read beside the state, into memory that the ranks of a node share, and checked before that. Where a chunk is damaged, all
ranks go to the checkpoint before it, which fills the same tensors; if there is none, the error says that they hold parts
of it. With `all_or_nothing` everything is read beside the state, and nothing is touched before every digest agreed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from dtruntime_torch.checkpoint.arguments import LoadOptions, check_keys
from dtruntime_torch.checkpoint.door import DOOR
from dtruntime_torch.checkpoint.loading.commit_choice import CommitChoice, OnDamage
from dtruntime_torch.checkpoint.loading.contents import read_alone, survey_contents
from dtruntime_torch.checkpoint.loading.load_plan import SavedState, lies_in, select, whole_specs
from dtruntime_torch.checkpoint.loading.load_round import Touched
from dtruntime_torch.checkpoint.loading.load_together import HALF_FILLED, LoadOutcome, LoadTogether
from dtruntime_torch.checkpoint.loading.targets import Wanted, build_state
from dtruntime_torch.errors import (
    CheckpointMismatch,
    CheckpointNotFound,
    CorruptCheckpoint,
    DTRuntimeError,
    LoadFailed,
)
from dtruntime_torch.membership import Membership
from dtruntime_torch.storage import StorageBackend, run_sync

# A round is lost only to damage, or to somebody who prunes meanwhile.
MAX_ROUNDS = 1000

R = TypeVar("R")


def load(
    backend: StorageBackend,
    name: str,
    members: Membership,
    state: object,
    key: str,
    options: LoadOptions,
    on_damage: OnDamage | None = None,
) -> LoadOutcome:
    """Fills `state` from the newest sound checkpoint, or from the newest generation's of a step.

    Every rank of `members` calls it, and on every rank it ends the same way.

    Args:
        backend: where the checkpoints lie.
        name: under which name.
        members: the ranks that load together.
        state: filled in place.
        key: prefix of this load in the Store.
        options: what is asked for, the same on all ranks; checked here.
        on_damage: called with each commit that all ranks agree is damaged, however the load ends.

    Raises:
        CheckpointNotFound: nothing is committed, or not that step.
        CorruptCheckpoint: no sound checkpoint is left, or that step is damaged.
        CheckpointMismatch: names, shapes or dtypes differ from the state's.
        LoadFailed: ranks failed for other reasons. Where all of them raised one error of ours, it is raised as such.
    """
    # What is filled another manager may still save.
    DOOR.before_update()
    choice, touched = CommitChoice(backend, name, on_damage), Touched()

    def attempt(number: int) -> LoadOutcome | None:
        with _telling_what_is_touched(touched):
            return LoadTogether(choice, members, f"{key}/{number}", options).load(state, touched)

    return _until_loaded(choice, members.rank == 0, attempt)


def load_fresh(
    backend: StorageBackend,
    name: str,
    step: int | None,
    rank: int,
    keys: Collection[str] | None = None,
    on_damage: OnDamage | None = None,
) -> object:
    """Reads a checkpoint, or the names of it that are given, on this process alone; which one is chosen as in `load`.

    Returns:
        A fresh state dict, or the bytes that were saved. Its tensors share the memory that was read into.
    """
    chosen = check_keys(keys)
    choice = CommitChoice(backend, name, on_damage)

    def attempt(number: int) -> tuple[object] | None:
        commit, _ = choice.pick(step)
        try:
            contents = run_sync(
                survey_contents(backend, commit, rank, lambda saved: _want_all(saved, chosen))
            )
            if contents.wanted.differences:
                lines = "; ".join(contents.wanted.differences)
                raise CheckpointMismatch(f"step {commit.step} of {name}: {lines}")
            tensors = dict(contents.tensors(run_sync(read_alone(backend, contents))))
        except CorruptCheckpoint as error:
            if choice.is_there(commit):
                choice.reject(commit, step, error)
            return None
        return (build_state(select(contents.saved, chosen), tensors, contents.values()),)

    return _until_loaded(choice, True, attempt)[0]


def _until_loaded(choice: CommitChoice, speaks: bool, attempt: Callable[[int], R | None]) -> R:
    """Makes attempts until one succeeds.

    Warns at the end: where warnings are errors, no rank is left alone half-way.
    """
    try:
        for number in range(MAX_ROUNDS):
            loaded = attempt(number)
            if loaded is not None:
                return loaded
    finally:
        for note in choice.notes if speaks else ():
            warnings.warn(note, RuntimeWarning, stacklevel=4)
    raise LoadFailed(f"checkpoints of {choice.name} kept vanishing while they were read; who prunes them?")


@contextmanager
def _telling_what_is_touched(touched: Touched) -> Iterator[None]:
    """Says in an error of the body that the state is half filled, if it is."""
    try:
        yield
    except CheckpointNotFound as error:
        if not touched.on_any_rank:
            raise
        # Whoever begins anew where there is no checkpoint must not do so with this state.
        raise LoadFailed(f"{error}; {HALF_FILLED}") from error
    except DTRuntimeError as error:
        if touched.on_any_rank and HALF_FILLED not in str(error):
            error.args = (f"{error}; {HALF_FILLED}", *error.args[1:])
        raise


def _want_all(saved: SavedState, keys: tuple[str, ...] | None) -> Wanted:
    chosen = select(saved, keys)
    names = [*chosen.tensors, *chosen.objects]
    nothing = [key for key in keys or () if not any(lies_in(fqn, (key,)) for fqn in names)]
    return Wanted(
        tensors=whole_specs(chosen),
        objects=tuple(chosen.objects),
        differences=tuple(f"{key}: nothing of that name is in the checkpoint" for key in nothing),
        missing=(),
        unexpected=(),
    )
