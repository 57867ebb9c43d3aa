"""One try of one rank to load one commit, step by step: survey, read, check, fill.

Each step but the last ends in a report to the leader; whatever goes wrong becomes part of it, so that all ranks hear of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dtruntime_torch import _C, errors
from dtruntime_torch.checkpoint.arguments import LoadOptions
from dtruntime_torch.checkpoint.loading.assembly import Staged
from dtruntime_torch.checkpoint.loading.chunk_needs import pack, unpack
from dtruntime_torch.checkpoint.loading.contents import (
    Contents,
    check_home_headers,
    read_homes,
    read_shares,
    survey_contents,
    with_parts_of,
)
from dtruntime_torch.checkpoint.loading.load_plan import SavedState
from dtruntime_torch.checkpoint.loading.load_verdicts import Report
from dtruntime_torch.checkpoint.loading.node_memory import share_memory, this_node
from dtruntime_torch.checkpoint.loading.node_shares import Shares, divide
from dtruntime_torch.checkpoint.loading.placement import place
from dtruntime_torch.checkpoint.loading.targets import Targets, Wanted, bind_targets
from dtruntime_torch.checkpoint.manifest import Commit
from dtruntime_torch.errors import CorruptCheckpoint
from dtruntime_torch.membership import Membership
from dtruntime_torch.storage import StorageBackend, run_sync
from dtruntime_torch.storage.backend import reads_chunks

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Touched:
    """What tries that failed have left in the state.

    Attributes:
        names: of tensors of this rank that hold bytes of a checkpoint which was not loaded.
        on_any_rank: whether such tensors are anywhere, so that all ranks end alike.
    """

    names: set[str] = field(default_factory=set)
    on_any_rank: bool = False


class LoadRound:
    """What one rank makes of the commit that was picked.

    Args:
        backend: where the checkpoint lies.
        commit: what was picked.
        members: the ranks that load, this one among them.
        state: to be filled.
        options: what for, checked; the same on all ranks.
        touched: by the tries before this one; added to.

    Attributes:
        error: what went wrong on this rank.
    """

    def __init__(
        self,
        backend: StorageBackend,
        commit: Commit,
        members: Membership,
        state: object,
        options: LoadOptions,
        touched: Touched,
    ) -> None:
        self._backend = backend
        self._commit = commit
        self._members = members
        self._state = state
        self._options = options
        self._targets: Targets | None = None
        self._contents: Contents | None = None
        self._tensors: Mapping[str, torch.Tensor] = {}
        self._values: dict[str, object] = {}
        self._shares: Shares | None = None
        self._staged = Staged()
        self._node_ranks: tuple[int, ...] = ()
        self._reader = reads_chunks(backend)
        self._touched = touched
        self.error: Exception | None = None
        self._memory: dict[int, _C.Arena] | None = None

    @property
    def contents(self) -> Contents:
        """What the checkpoint holds, once it was surveyed."""
        assert self._contents is not None
        return self._contents

    def survey(self, refuse_others: Callable[[], None]) -> Report:
        """Compares the state with the checkpoint; no data is read.

        Args:
            refuse_others: raises if the leader was asked for something else.
        """

        def survey() -> Report:
            refuse_others()
            self._targets = targets = bind_targets(self._state)
            self._contents = run_sync(
                survey_contents(
                    self._backend,
                    self._commit,
                    self._members.rank,
                    lambda saved: self._want(targets, saved),
                    dict if self._reader is None or self._options.all_or_nothing else targets.homes,
                    self._members.world_size,
                )
            )
            wanted = self._contents.wanted
            return {
                "kind": "sound",
                "differences": wanted.differences,
                "missing": wanted.missing,
                "unexpected": wanted.unexpected,
                "in_place": bool(self._contents.homes),
                "node": this_node(),
                "needs": pack(self._contents.needs),
            }

        return self._report(survey)

    def _want(self, targets: Targets, saved: SavedState) -> Wanted:
        wanted = targets.want(saved, self._options.keys)
        lines = [
            f"{fqn}: holds bytes of a newer step that is damaged, and is not in this one"
            for fqn in targets.left_alone(self._touched.names)
        ]
        return replace(wanted, differences=(*wanted.differences, *lines))

    def learn_shares(self, nodes: Sequence[dict[str, Any]]) -> Report:
        """Learns with whom this rank shares what is read, and what of that it reads for all; reads the parts for that.

        Args:
            nodes: as the verdict has them.
        """

        def learn_shares() -> Report:
            for node in nodes:
                if self._members.rank in node["ranks"]:
                    self._node_ranks = tuple(node["ranks"])
                    needs = [unpack(packed) for packed in node["needs"]]
                    needs = needs * len(self._node_ranks) if len(needs) == 1 else needs
                    self._contents = run_sync(with_parts_of(self._backend, self.contents, needs))
                    self._shares = divide(needs, self._contents.parts)
            return {"kind": "sound"}

        return self._report(learn_shares)

    def make_memory(self, key: str) -> None:
        """Makes the memory for what ranks of this node need in common. All ranks call it.

        Args:
            key: prefix of this load in the Store.
        """
        nbytes = 0
        if self._shares is not None:
            nbytes = place(self._shares.common[self._node_ranks.index(self._members.rank)]).nbytes
        tag = f"dtruntime-{self._members.run_id}-{key.replace('/', '-')}"
        self._memory = share_memory(self._members.barrier, key, tag, self._node_ranks, nbytes)

    def read(self) -> Report:
        """Reads this rank's share, straight into the memory of the node, and what only this rank needs.

        Of the files from which the rest comes the headers are checked, while nothing of the state is touched yet.
        """

        def read() -> Report:
            contents, shares, ranks = self.contents, self._shares, self._node_ranks
            if self._memory is None or shares is None:
                shares, ranks = divide([contents.needs], contents.parts), (self._members.rank,)
            common = [self._memory[rank] for rank in ranks] if self._memory else []
            staged = run_sync(
                read_shares(self._backend, contents, shares, ranks.index(self._members.rank), common)
            )
            self._staged = staged
            run_sync(check_home_headers(self._backend, contents))
            return {"kind": "sound"}

        return self._report(read)

    def check(self) -> Report:
        """Asks the targets whether they take what was read; all of it has to be there."""

        def check() -> Report:
            assert self._targets is not None
            self._tensors, self._values = self.contents.tensors(self._staged), self.contents.values()
            self._targets.check(self._tensors, self._values)
            return {"kind": "sound"}

        return self._report(check)

    def read_home(self, turn: tuple[int, int]) -> Report:
        """Reads the rest straight into the tensors of the state, on this rank's turn of that many of its host."""

        def read_home() -> Report:
            if self._reader is not None and self.contents.homes:
                self._touched.names.update(self.contents.homes)
                run_sync(read_homes(self._backend, self._reader, self.contents, turn))
            return {"kind": "sound"}

        return self._report(read_home)

    def fill(self) -> str:
        """Fills the state; returns what went wrong, or nothing."""
        assert self._targets is not None
        try:
            self._targets.apply(self._tensors, self._values)
        except Exception as error:
            self.error = error
            return errors.to_record(error)["message"]
        return ""

    def release(self) -> None:
        """Lets go of what was read."""
        self._memory, self._staged, self._tensors, self._values = None, Staged(), {}, {}

    def _report(self, step: Callable[[], Report]) -> Report:
        try:
            return step()
        except CorruptCheckpoint as error:
            self.error = error
            return {"kind": "damaged", "message": str(error), "damage": [asdict(d) for d in error.damage]}
        except Exception as error:
            logger.debug("step %d could not be loaded", self._commit.step, exc_info=True)
            self.error = error
            return {"kind": "failed", **errors.to_record(error)}
