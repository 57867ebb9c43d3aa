"""Faults that a device, an op or a stager may have, each planted in a `HostBench`."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from unittest import mock

import torch

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.door import OwnedMemory, storage_of
from dtruntime_torch.checkpoint.staging import capture
from dtruntime_torch.checkpoint.staging.capture import Capture
from dtruntime_torch.checkpoint.staging.lateness import Lateness
from dtruntime_torch.checkpoint.staging.stager import Stager
from dtruntime_torch.errors import SaveFailed
from dtruntime_torch.manager import CheckpointManager
from tests.gpucheck.host_device import Passed, StagingSide


class OneBit:
    """Flips a bit of some digests."""

    def __init__(self, when) -> None:
        self._when = when

    def __call__(self, data: bytes) -> bytes:
        digest = bytearray(_C.digest(data, len(data)))
        digest[15] ^= self._when(len(data))
        return bytes(digest)


def wrong_digest_of_one_length(bench):
    bench.native.digest_of = OneBit(lambda length: length == 241)


def a_read_rounded_down_to_16(bench):
    read = bench.native.read_bytes
    bench.native.read_bytes = lambda address, length: read(address & ~15, length)


def wrong_digest_by_the_op(bench):
    digest = bench.digest
    bench.digest = lambda tensor, chunk: digest(tensor, chunk) ^ (tensor.dtype == torch.bfloat16)


def a_chunk_too_few(bench):
    digest = bench.digest
    bench.digest = lambda tensor, chunk: digest(tensor, chunk)[:-1]


def a_copy_that_writes_past_its_end(bench):
    write = bench.native.write_bytes
    bench.native.write_bytes = lambda address, data: write(address, data + b"\0")


def an_op_that_does_not_copy(bench):
    bench.copy_digest_ = lambda target, source, chunk: bench.digest(source, chunk)


def a_comparison_of_one_half(bench):
    bench.native.differ = lambda new, old: new[:8] != old[:8]


def a_change_that_is_not_seen(bench):
    bench.native.differ = lambda new, old: False


def a_gather_that_writes_zeros(bench):
    bench.native.write_bytes = lambda address, data: None


def a_table_that_is_not_brought_up_to_date(bench):
    find = bench.native.cuda_find_changed

    def keeps_the_table(digests, known, count, *rest):
        before = ctypes.string_at(known, 16 * count)
        find(digests, known, count, *rest)
        ctypes.memmove(known, before, len(before))

    bench.native.cuda_find_changed = keeps_the_table


class Late:
    """A staging that reads its sources only when somebody waits for it."""

    def __init__(self, stager, *arguments) -> None:
        self._stager, self._arguments = stager, arguments

    def before_overwrite(self, indices=None, timeout=None) -> None:
        pass

    def wait(self, timeout=None) -> bytes:
        staging = self._stager.start(*self._arguments)
        digests = staging.wait(timeout)
        self.nbytes_copied = staging.nbytes_copied
        return digests


def a_torn_staging(bench):
    class LateStager:
        def __init__(self, arena, chunk_bytes) -> None:
            self._stager = Stager(arena, chunk_bytes)

        def start(self, pairs, only_changed=False, names=(), late=()):
            return Late(self._stager, pairs, only_changed)

    bench.stager = LateStager


def a_device_that_does_not_digest_at_the_call(bench):
    class Blind(StagingSide):
        def has_kernels(self):
            return False

    bench.staging_device = lambda: Blind(bench)


def a_device_that_fails_in_the_words_of_a_tear(bench):
    class Failing(Passed):
        def query(self):
            raise SaveFailed("tensor 0 did not arrive from cpu as it was sent")

        synchronize = query

    class Broken(StagingSide):
        def record(self):
            return Failing(super().record().time)

    bench.staging_device = lambda: Broken(bench)


def a_stager_that_takes_late_ones_first(bench):
    class Reversed(Stager):
        def start(self, pairs, only_changed=False, names=(), late=()):
            return super().start(pairs, only_changed, names, [n for n in range(len(pairs)) if n not in late])

    bench.stager = lambda arena, chunk: Reversed(arena, chunk, find_device=lambda tensor: StagingSide(bench))


def a_staging_with_wrong_digests(bench):
    class Lying(Stager):
        def start(self, *arguments, **options):
            staging = super().start(*arguments, **options)
            wait = staging.wait
            staging.wait = lambda timeout=None: wait(timeout)[:-16] + bytes(16)
            return staging

    bench.stager = Lying


def a_stager_that_copies_all(bench):
    class Thorough(Stager):
        def start(self, pairs, only_changed=False):
            return super().start(pairs)

    bench.stager = lambda arena, chunk: Thorough(arena, chunk, find_device=lambda tensor: StagingSide(bench))


def a_change_that_is_neither_seen_nor_kept(bench):
    """The digests of one chunk are the old ones: nobody but who looks at the bytes can tell."""
    digest_of, seen = bench.native.digest_of, {}
    bench.native.digest_of = lambda data: seen.setdefault(data[1:], digest_of(data))


def an_op_that_does_not_wait_for_the_side_stream(bench):
    digest = bench.digest
    bench.digest = lambda tensor, chunk: digest(
        torch.zeros_like(tensor) if bench.stream() == 8 else tensor, chunk
    )


def an_op_that_changes_the_current_device(bench):
    digest, now = bench.digest, [bench.index]
    bench.digest = lambda tensor, chunk: now.append(now[-1] + 1) or digest(tensor, chunk)
    bench.current_index = lambda: now[-1]


def a_graph_that_does_nothing(bench):
    bench.capture = lambda work: (lambda: None, work())


def a_graph_that_runs_well_only_once(bench):
    capture = bench.capture

    def once(work):
        replay, result = capture(work)
        replays = iter([replay])
        return lambda: next(replays, lambda: None)(), result

    bench.capture = once


def a_graph_that_does_not_copy(bench):
    copy_digest_ = bench.copy_digest_
    capture = bench.capture

    def forgets(work):
        replay, result = capture(work)
        bench.copy_digest_ = lambda target, source, chunk: copy_digest_(target.clone(), source, chunk)
        return replay, result

    bench.capture = forgets


def a_stager_on_the_stream_of_training(bench):
    on_side_stream = bench.on_side_stream
    bench.on_side_stream = lambda name="side": on_side_stream("main" if name == "stager" else name)


def a_start_that_waits(bench):
    class Slow(Stager):
        def start(self, *arguments, **options):
            for _ in range(10):
                bench.clock()
            return super().start(*arguments, **options)

    bench.stager = lambda arena, chunk: Slow(arena, chunk, find_device=lambda tensor: StagingSide(bench))


def streams_that_wait_for_each_other(bench):
    bench.overlaps = False


def a_copy_that_waits_its_turn_on_the_side(bench):
    """Three times as slow there, while the other stream is not held up: only who waits for the copy notices."""
    copy = bench.copy

    def slow(target, source):
        for _ in range(1 if bench.stream() == 7 else 3):
            copy(target, source)

    bench.copy = slow


def in_its_managers(bench, owner, name, value):
    """What a class does while there is a manager of the bench."""
    manager = bench.manager

    @contextmanager
    def faulty(folder):
        with mock.patch.object(owner, name, value), manager(folder) as made:
            yield made

    bench.manager = faulty


def a_door_that_does_not_hold(bench):
    in_its_managers(bench, Capture, "before_step", lambda self, storages: None)


def a_save_that_does_not_take_what_is_early(bench):
    in_its_managers(bench, Capture, "take_early", lambda self, timeout: self._staging.release())


def a_save_that_takes_all_for_what_optimizers_own(bench):
    in_its_managers(bench, OwnedMemory, "storage_around", lambda self, tensor: storage_of(tensor))


def a_save_that_is_never_late(bench):
    in_its_managers(bench, Lateness, "choose_late", lambda self, tensors: capture.Late())


def a_save_that_does_not_look_for_tears(bench):
    manager = bench.manager
    bench.manager = lambda folder: manager(folder, paranoid=False)


def a_manager_that_forgets_tears(bench):
    in_its_managers(bench, Lateness, "give_up", lambda self, why: None)


def what_is_loaded(bench, change):
    load = CheckpointManager.load_checkpoint

    def loads_otherwise(self, **options):
        state = load(self, **options)
        change(state)
        return state

    in_its_managers(bench, CheckpointManager, "load_checkpoint", loads_otherwise)


def a_value_that_is_loaded_as_another(bench):
    what_is_loaded(bench, lambda state: "scaler" in state and state["scaler"].update(scale=3.0))


def a_tensor_that_is_not_loaded(bench):
    what_is_loaded(bench, lambda state: state["model"].popitem())
