"""What the failure of a save is asked, and relieved of."""

from __future__ import annotations

import traceback

from dtruntime_torch.errors import TornSnapshot


def tear_in(error: BaseException | None) -> TornSnapshot | None:
    """The tear that an error goes back to, if one does."""
    while error is not None and not isinstance(error, TornSnapshot):
        error = error.__cause__
    return error


def forget_frames(error: BaseException) -> None:
    """Lets go of what the frames of a failure hold: views of the arena, which is as large as the model.

    Else each failed save would keep an arena for as long as somebody keeps its error.
    """
    errors: list[BaseException | None] = [error]
    seen: set[int] = set()
    while errors:
        one = errors.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            errors += [one.__cause__, one.__context__]
