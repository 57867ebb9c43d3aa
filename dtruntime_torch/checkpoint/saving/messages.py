"""What the ranks of a save tell the leader when they arrive, and what it answers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dtruntime_torch import errors
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.manifest import PartRef
from dtruntime_torch.checkpoint.names import Attempt, CommitKey


@dataclass(frozen=True, slots=True)
class Arrival:
    """A rank has made its part durable, or could not.

    Attributes:
        part: as the manifest will name it; None if it failed.
        nbytes: bytes of its tensors.
        changed_bytes: of them, in chunks that differ from its base; 0 where there is none to compare with.
        files: how many data files its part names.
        used: bytes of these files.
        uses: paths of the attempts that these lie in.
        base: of a delta, SHA-256 of the manifest that it was made against; None of a full save.
        error: why it failed, "" if it did not.
        passing: it may be over at the next try, to which this rank will come.
    """

    part: PartRef | None = None
    nbytes: int = 0
    changed_bytes: int = 0
    files: int = 0
    used: int = 0
    uses: tuple[str, ...] = ()
    base: str | None = None
    error: str = ""
    passing: bool = False

    @classmethod
    def failed(cls, error: BaseException, passing: bool) -> Arrival:
        """Of a rank that wrote nothing that counts."""
        return cls(error=errors.to_record(error)["message"] or type(error).__name__, passing=passing)

    def encode(self) -> bytes:
        """For the Store."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Arrival:
        """Reads what `encode` wrote."""
        fields = json.loads(data)
        part = None if fields["part"] is None else PartRef(**fields["part"])
        return cls(**{**fields, "part": part, "uses": tuple(fields["uses"])})


@dataclass(frozen=True, slots=True)
class Answer:
    """How a try to save went, said by the leader.

    Attributes:
        kind: "committed"; "aborted", "lost": never; "unknown": nobody can tell; "again": not in this try, and all
            ranks go on with the next.
        message: why, "" if committed.
        info: of what was committed.
        full_next: the next save is to be full.
        delete: each rank deletes its own files of this try.
        attempt: where the next try goes.
        full: the next try writes everything.
        delay: seconds before the next try.
    """

    kind: Literal["committed", "aborted", "lost", "unknown", "again"]
    message: str = ""
    info: CheckpointInfo | None = None
    full_next: bool = False
    delete: bool = False
    attempt: Attempt | None = None
    full: bool = False
    delay: float = 0.0

    def encode(self) -> bytes:
        """For the Store."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Answer:
        """Reads what `encode` wrote."""
        fields = json.loads(data)
        info = None if fields["info"] is None else _info_from(fields["info"])
        attempt = None if fields["attempt"] is None else Attempt(**fields["attempt"])
        return cls(**{**fields, "info": info, "attempt": attempt})


def _info_from(fields: dict[str, Any]) -> CheckpointInfo:
    parent = None if fields["parent"] is None else CommitKey(*fields["parent"])
    parts = tuple(PartRef(**part) for part in fields["parts"])
    return CheckpointInfo(**{**fields, "parent": parent, "parts": parts})
