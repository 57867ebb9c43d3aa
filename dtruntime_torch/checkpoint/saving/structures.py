"""What follows from the structure of a state: computed when it changes, and kept until then."""

from __future__ import annotations

from dataclasses import dataclass

from dtruntime_torch.checkpoint.flatten import FlatState, Flattener
from dtruntime_torch.checkpoint.saving import groups
from dtruntime_torch.checkpoint.saving.groups import Groups
from dtruntime_torch.checkpoint.saving.layout import Layout, make_layout
from dtruntime_torch.checkpoint.saving.save_plan import make_save_plan
from dtruntime_torch.checkpoint.specs import FlatSpecs, SavePlan
from dtruntime_torch.membership import Membership


@dataclass(frozen=True, slots=True)
class Structure:
    """What follows from the specs of a state, once the ranks know of each other's."""

    specs: FlatSpecs
    learnt: Groups
    plan: SavePlan
    layout: Layout


class Structures:
    """The structure that the ranks know of each other, for the saves of one manager.

    Args:
        members: the ranks that save together.

    Attributes:
        known: the last one; None makes the next save ask all ranks again.
    """

    def __init__(self, members: Membership) -> None:
        self.known: Structure | None = None
        self._members = members
        self._flattener = Flattener(members.rank)

    def agree(self, key: str, state: object) -> tuple[FlatState, Structure]:
        """Takes a state apart, and asks the other ranks what they hold if its structure is a new one.

        Args:
            key: the save's prefix in the Store.
            state: the user's.

        Returns:
            The state, and its structure: `known`, if it did not change.

        Raises:
            InvalidArgument, UnsupportedType: the state cannot be saved.
            BarrierTimeout: ranks did not take part.
            SaveFailed: other ranks see no change; or they showed what cannot be read.
        """
        flat = self._flattener.flatten(state)
        known = self.known
        if known is not None and known.specs == flat.specs:
            return flat, known
        self.known = None
        if known is not None and groups.differ_only_in_size(known.specs, flat.specs):
            learnt = known.learnt
        else:
            learnt = groups.learn(
                self._members.barrier, f"{key}/groups", flat.specs, busy_key=f"{key}/commit"
            )
        rank, world_size = self._members.rank, self._members.world_size
        plan = make_save_plan(rank, world_size, flat.specs, learnt.specs, learnt.members)
        self.known = Structure(flat.specs, learnt, plan, make_layout(plan))
        return flat, self.known
