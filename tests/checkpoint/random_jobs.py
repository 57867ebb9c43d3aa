"""Jobs of any number of ranks whose states, changes, failures and ends are drawn, and what they must leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial

import torch
from hypothesis import strategies as st

import dtruntime_torch as dt
from dtruntime_torch.checkpoint import catalog, names, restore
from dtruntime_torch.checkpoint.cleaning.retention import RetentionPolicy
from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.manifest import Commit
from dtruntime_torch.checkpoint.verify import verify
from dtruntime_torch.errors import CheckpointNotFound, NotFound
from dtruntime_torch.storage import MemoryBackend, StorageBackend, run_sync
from dtruntime_torch.testing.faulty_backend import Call, FaultyBackend, lost_answer, not_done
from tests.checkpoint.mortal import Dead, Mortal
from tests.checkpoint.thread_ranks import Rank, make_ranks, together

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
Tensors = dict[str, torch.Tensor]


@st.composite
def tensors(draw: st.DrawFn) -> Tensors:
    """Of several dtypes, from nothing to a few chunks."""
    sizes = st.sampled_from([(), (0,), (3,), (1000,), (5000,), (3, 0, 2), (100, 70)])
    kinds = draw(st.lists(st.tuples(st.sampled_from(DTYPES), sizes), min_size=1, max_size=5))
    return {f"t{i}": torch.zeros(size, dtype=dtype) for i, (dtype, size) in enumerate(kinds)}


class World:
    """A storage, the job that is at work there, and what is known of its saves.

    Args:
        held: the tensors that are saved.
        chunk_bytes: of the jobs.
        keep: how many checkpoints stay.
    """

    def __init__(self, held: Tensors, chunk_bytes: int, keep: int | None) -> None:
        self.inner = MemoryBackend()
        self.held = held
        self.step = 0
        self.saved: dict[int, Tensors] = {}  # what each step saved, or tried to
        self.reported: list[int] = []
        self._chunk_bytes = chunk_bytes
        self._keep = keep
        self._mortals: list[Mortal] = []
        self._backends: list[FaultyBackend] = []
        self._ranks: list[Rank] = []
        self._holders: dict[str, tuple[int, ...]] = {}

    def begin(self, ranks: int, salt: int) -> None:
        """A new job starts, and goes on from the newest checkpoint if there is one."""
        self.end()
        self._mortals = [Mortal(self.inner) for _ in range(ranks)]
        self._backends = [FaultyBackend(mortal) for mortal in self._mortals]
        self._ranks = make_ranks(
            ranks,
            self._backends,
            chunk_bytes=self._chunk_bytes,
            delta=dt.DeltaPolicy(max_changed=0.7, max_files=4),
            retention=RetentionPolicy(keep_last_n=self._keep),
        )
        # Each tensor is held by some of the ranks.
        self._holders = {
            name: tuple(rank for rank in range(ranks) if (salt + i + rank) % 3 or rank == i % ranks)
            for i, name in enumerate(self.held)
        }
        self._load()

    def end(self) -> None:
        """The job ends, and with it its threads."""
        for rank in self._ranks:
            with suppress(dt.errors.DTRuntimeError, Dead):
                rank.saver.close()

    def change(self, draws: Sequence[tuple[int, int]]) -> None:
        """Changes elements of tensors, each of a chunk of its own or not."""
        names_of = list(self.held)
        for which, where in draws:
            flat = self.held[names_of[which % len(names_of)]].view(-1)
            if flat.numel():
                flat[where % flat.numel()] = (
                    (self.step + where) % 2 if flat.dtype is torch.bool else self.step + 1
                )

    def save(self) -> list[object]:
        """All ranks save; returns what came of it."""
        self.step += 1
        self.saved[self.step] = deepcopy(self.held)
        calls = [
            partial(rank.save, {**self._held_by(i), "step": self.step}, self.step)
            for i, rank in enumerate(self._ranks)
        ]
        results = together(*calls)
        if all(isinstance(result, CheckpointInfo) for result in results):
            self.reported.append(self.step)
        return results

    def save_with_a_fault(self, rank: int, nth: int, lost: bool) -> None:
        """One call of one rank fails, having been done or not."""
        backend = self._backends[rank % len(self._backends)]
        saving = [True]
        fail = lost_answer() if lost else not_done()

        async def fault(call: Call) -> object:
            return await (fail(call) if saving else call.proceed())

        backend.when("*", "*", fault, nth=nth)
        self.save()
        saving.clear()

    def save_and_die(self, rank: int, nth: int, after: bool) -> None:
        """One rank dies in a save, and with it the job."""
        for one in self._ranks:
            # The dead cannot say that they are.
            one.members.barrier.timeout = 1.0
        self._mortals[rank % len(self._mortals)].die_at(nth, after)
        results = self.save()
        dead = [result for result in results if isinstance(result, Dead)]
        assert not dead or len(dead) == 1

    def prune(self) -> None:
        self._ranks[0].saver.prune(False)

    def check(self) -> None:
        """Everything that is committed loads bit for bit, and what was reported and is to stay is there."""
        keys = [commit.key for commit in self._commits()]
        for key in keys:
            report = run_sync(verify(self.inner, "model", key))
            assert report.ok, report.damage
            state = restore.load_fresh(self.inner, "model", key.step, 0)
            check_equal(state, self.saved[key.step], key.step)
        steps = [key.step for key in keys]
        stay = self.reported if self._keep is None else self.reported[-1:]
        assert set(stay) <= set(steps), (stay, steps)
        assert self._keep is None or len(steps) <= self._keep + 2

    def check_nothing_is_left_over(self) -> None:
        """Below the attempts lies what a commit names, and nothing else."""
        needed = set()
        for commit in self._commits():
            manifest = run_sync(catalog.read_manifest(self.inner, commit))
            needed.add(names.manifest_path("model", commit.attempt))
            for ref in manifest.parts:
                needed.add(f"model/{commit.attempt}/{ref.path}")
                part = run_sync(catalog.read_part(self.inner, manifest, ref.rank))
                needed |= {f"model/{file.path}" for file in part.files}
        there = {entry.path for entry in run_sync(self.inner.list("model/step-"))}
        used = {path.rpartition("/")[0] for path in needed}
        assert needed <= there
        # A folder of which one file is needed stays whole.
        assert {path.rpartition("/")[0] for path in there} == used

    def _held_by(self, rank: int) -> dict[str, object]:
        return {name: tensor for name, tensor in self.held.items() if rank in self._holders[name]}

    def _load(self) -> None:
        states = [
            {**{name: torch.ones_like(tensor) for name, tensor in self.held.items()}, "step": 0}
            for _ in self._ranks
        ]
        results = together(
            *[partial(rank.load, state) for rank, state in zip(self._ranks, states, strict=True)]
        )
        if all(isinstance(result, CheckpointNotFound) for result in results):
            assert not self.reported
            return
        for result, state in zip(results, states, strict=True):
            assert isinstance(result, CheckpointInfo), result
            check_equal(state, self.saved[result.step], result.step)
        assert isinstance(results[0], CheckpointInfo)
        self.held = deepcopy(self.saved[results[0].step])

    def _commits(self) -> list[Commit]:
        found = []
        for key in run_sync(catalog.commit_keys(self.inner, "model")):
            commit = _read(self.inner, key)
            found += [commit] if commit is not None and not commit.void else []
        return found


def _read(backend: StorageBackend, key: names.CommitKey) -> Commit | None:
    try:
        return run_sync(catalog.read_commit(backend, "model", key))
    except NotFound:
        return None


def check_equal(state: object, expected: Tensors, step: int) -> None:
    """Bit for bit."""
    assert isinstance(state, dict) and state.keys() == {*expected, "step"} and state["step"] == step
    for name, tensor in expected.items():
        found = state[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
