"""One try of all ranks to load one commit: the meetings between the steps of `load_round`, the same on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from dtruntime_torch import errors
from dtruntime_torch.barrier import declining
from dtruntime_torch.checkpoint.arguments import LoadOptions
from dtruntime_torch.checkpoint.info import LoadedCheckpoint
from dtruntime_torch.checkpoint.loading import load_verdicts
from dtruntime_torch.checkpoint.loading.commit_choice import CommitChoice
from dtruntime_torch.checkpoint.loading.load_round import LoadRound, Touched
from dtruntime_torch.checkpoint.loading.load_verdicts import Report, Verdict
from dtruntime_torch.checkpoint.manifest import Commit
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.errors import (
    CheckpointMismatch,
    CorruptCheckpoint,
    Damage,
    InvalidArgument,
    LoadFailed,
)
from dtruntime_torch.membership import Membership

# The meetings of a try, in their order; those of a node's memory among them.
_STAGES = ("survey", "divide", "made", "attached", "read", "check", "home", "fill")

HALF_FILLED = "tensors of the state hold bytes of what could not be loaded: load something else into them, or build them anew"


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """How a load ended.

    Attributes:
        info: the checkpoint that was loaded.
        newest: the newest commit that there was when it was picked.
    """

    info: LoadedCheckpoint
    newest: CommitKey


class LoadTogether:
    """Takes the ranks through one try.

    Args:
        choice: of the load that this is a try of.
        members: the ranks that load.
        key: prefix of this try in the Store.
        options: what this rank was asked for, unchecked.
    """

    def __init__(self, choice: CommitChoice, members: Membership, key: str, options: LoadOptions) -> None:
        self._choice = choice
        self._members = members
        self._barrier = members.barrier
        self._key = key
        self._options = options
        self._stage = _STAGES[0]

    def load(self, state: object, touched: Touched) -> LoadOutcome | None:
        """Fills a state from the commit that the leader picks.

        Args:
            state: to be filled.
            touched: of it, by the tries before this one; added to.

        Returns:
            None if another commit has to be tried: this one has vanished, or all agree that it is damaged.
        """
        try:
            return self._load(state, touched)
        except Exception:
            raise  # which all hear of
        except BaseException as interrupt:
            for stage in _STAGES[_STAGES.index(self._stage) :]:
                self._barrier.decline(f"{self._key}/{stage}", interrupt)
            raise

    def _load(self, state: object, touched: Touched) -> LoadOutcome | None:
        commit, newest, options = self._pick()
        what = f"step {commit.step} of {commit.name}"
        this = LoadRound(self._choice.backend, commit, self._members, state, options, touched)

        def judge(reports: Sequence[Report]) -> Verdict:
            return load_verdicts.judge(what, reports, lambda: self._choice.is_there(commit))

        def judge_surveys(reports: Sequence[Report]) -> Verdict:
            return load_verdicts.judge_surveys(what, reports, options, lambda: self._choice.is_there(commit))

        def go(
            stage: str, step: Callable[[], Report], judge: Callable[[Sequence[Report]], Verdict] = judge
        ) -> Verdict | None:
            return self._act_on(self._meet(stage, step, judge), commit, options, this)

        try:
            survey = go("survey", lambda: this.survey(lambda: self._refuse_others(options)), judge_surveys)
            if survey is None:
                return None
            if survey["nodes"]:
                if go("divide", lambda: this.learn_shares(survey["nodes"])) is None:
                    return None
                this.make_memory(self._key)
            if go("read", this.read) is None or go("check", this.check) is None:
                return None
            touched.on_any_rank |= survey["in_place"]
            turn = tuple(survey["turns"][self._members.rank])
            if go("home", lambda: this.read_home(turn)) is None:
                return None
            self._fill(this)
        finally:
            # An error that is kept keeps this frame.
            this.release()
        manifest, sha256 = this.contents.manifest, commit.manifest_sha256
        info = LoadedCheckpoint.from_load(manifest, sha256, survey["missing"], survey["unexpected"])
        return LoadOutcome(info, newest)

    def _pick(self) -> tuple[Commit, CommitKey, LoadOptions]:
        """What the leader chose, the newest commit that there was, and what the leader was asked for."""

        def pick() -> bytes:
            options = self._options.checked()
            commit, newest = self._choice.pick(options.step)
            return json.dumps([asdict(commit), newest, asdict(options)]).encode()

        commit, newest, options = json.loads(self._barrier.announce(f"{self._key}/pick", pick))
        return Commit(**commit), CommitKey(*newest), LoadOptions(**options).checked()

    def _refuse_others(self, leaders: LoadOptions) -> None:
        mine = self._options.checked()
        if mine != leaders:
            raise InvalidArgument(f"it asks for {mine}, rank 0 for {leaders}; give all ranks the same")

    def _meet(
        self, stage: str, step: Callable[[], Report], judge: Callable[[Sequence[Report]], Verdict]
    ) -> Verdict:
        """Does a step, and hears what the leader makes of how it went on all ranks."""
        self._stage = stage
        key = f"{self._key}/{stage}"
        with declining(self._barrier, key):
            report = load_verdicts.encode(step())
        answer = self._barrier.meet(
            key, report, lambda values: load_verdicts.encode(judge(list(map(load_verdicts.decode, values))))
        )
        return load_verdicts.decode(answer)

    def _act_on(
        self, verdict: Verdict, commit: Commit, options: LoadOptions, this: LoadRound
    ) -> Verdict | None:
        """Raises what the verdict says, and rejects a commit that is damaged; None if another has to be tried."""
        kind = verdict["verdict"]
        if kind == "differs":
            raise CheckpointMismatch(verdict["message"])
        if kind == "failed":
            raise errors.from_record(verdict, LoadFailed) from this.error
        if kind == "older":
            error = CorruptCheckpoint(verdict["message"], [Damage(**d) for d in verdict["damage"]])
            self._choice.reject(commit, options.step, error)
        return verdict if kind == "go" else None

    def _fill(self, this: LoadRound) -> None:
        """Fills the state on all ranks; returns when all have succeeded."""
        self._stage = "fill"
        key = f"{self._key}/fill"
        with declining(self._barrier, key):
            message = this.fill().encode(errors="backslashreplace")

        def collect(values: Sequence[bytes]) -> bytes:
            return "; ".join(f"rank {r}: {v.decode()}" for r, v in enumerate(values) if v).encode()

        failures = self._barrier.meet(key, message, collect).decode()
        if failures:
            raise LoadFailed(f"the state could not be filled: {failures}; {HALF_FILLED}") from this.error
