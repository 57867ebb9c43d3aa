"""Full saves at their shortest, for the tests of `commit`: one rank, one data file."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from dtruntime_torch.checkpoint import names
from dtruntime_torch.checkpoint.commit import Patience
from dtruntime_torch.checkpoint.manifest import (
    Commit,
    Generation,
    Manifest,
    PartRef,
    encode_commit,
    encode_generation,
)
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.storage import StorageBackend
from dtruntime_torch.testing.faulty_backend import Call, Fault, FaultyBackend

NAME = "model"
CREATED = "2026-01-02T03:04:05+00:00"


@dataclass
class Time:
    """A clock that only sleeping moves."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def patience(self, seconds: float = 60.0, call_seconds: float = 30.0) -> Patience:
        return Patience(seconds, call_seconds, clock=lambda: self.now, sleep=self.sleep)


def run_id(number: int) -> str:
    """The id of that incarnation."""
    return f"{number:032x}"


def manifest_of(generation: int, step: int, number: int = 1) -> Manifest:
    """Of a full save by one rank."""
    attempt = Attempt(generation, step, number).path
    return Manifest(
        name=NAME,
        generation=generation,
        step=step,
        attempt=attempt,
        run_id=run_id(generation),
        parent=None,
        world_size=1,
        full=True,
        uses=(attempt,),
        requires=(),
        created=CREATED,
        versions={},
        metadata=None,
        nbytes=4,
        written=4,
        parts=(PartRef(0, names.shard_file_name(0, 1, names.PART_SUFFIX), 2, "0" * 64, 4),),
    )


def manifest_path(manifest: Manifest) -> str:
    return f"{manifest.name}/{manifest.attempt}/{names.MANIFEST}"


def data_path(attempt: str) -> str:
    return f"{NAME}/{attempt}/{names.shard_file_name(0, 1, names.DATA_SUFFIX)}"


def commit_path(generation: int, step: int) -> str:
    return names.commit_path(NAME, CommitKey(generation, step))


# What the tests of one commit make.
MANIFEST = manifest_of(7, 100)
COMMIT = commit_path(7, 100)


def generation_path(generation: int) -> str:
    return names.generation_path(NAME, generation)


async def void(backend: StorageBackend, generation: int, step: int) -> None:
    """What a sweep does first: nobody will commit this any more."""
    data = encode_commit(Commit(NAME, generation, step, "", "", void=True))
    await backend.create(commit_path(generation, step), data)


async def claimed_by(backend: StorageBackend, generation: int, host: str = "node-3", pid: int = 4711) -> None:
    """Somebody else has claimed this."""
    record = Generation(generation, run_id(99), host, pid, CREATED)
    await backend.create(generation_path(generation), encode_generation(record))


def creates(backend: FaultyBackend) -> list[str]:
    """The paths of all creates so far."""
    return [path for operation, path in backend.calls if operation == "create"]


def also(action: Callable[[], Awaitable[None]], *, then: Fault) -> Fault:
    """A fault: somebody else does `action` just before the call meets the fault `then`."""

    async def fault(call: Call) -> object:
        await action()
        return await then(call)

    return fault
