from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from dtruntime_torch import _C
from dtruntime_torch.errors import InvalidArgument, NotFound, StorageError
from dtruntime_torch.storage import LocalBackend, MemoryBackend, run_sync
from dtruntime_torch.storage.backend import reads_chunks
from dtruntime_torch.storage.sync import in_thread
from dtruntime_torch.testing.faulty_backend import (
    Fault,
    FaultyBackend,
    Stopped,
    flipped,
    hidden,
    killed,
    lost_answer,
    not_done,
    truncated,
    unreadable,
)


@pytest.fixture
def inner() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def backend(inner: MemoryBackend) -> FaultyBackend:
    return FaultyBackend(inner)


def test_a_call_that_was_not_done_has_no_effect(inner, backend) -> None:
    backend.when("create", "*", not_done())
    with pytest.raises(StorageError, match="create of commits/1 was not done"):
        run_sync(backend.create("commits/1", b"bytes"))
    assert run_sync(inner.list("")) == []


def test_a_call_whose_answer_is_lost_takes_effect(inner, backend) -> None:
    backend.when("create", "*", lost_answer())
    with pytest.raises(StorageError, match="create of commits/1 was done"):
        run_sync(backend.create("commits/1", b"bytes"))
    assert run_sync(inner.read("commits/1")) == b"bytes"


@pytest.mark.parametrize("fault", [not_done, lost_answer])
def test_the_error_may_be_chosen(backend, fault) -> None:
    backend.when("write", "*", fault(TimeoutError("chosen")))
    with pytest.raises(TimeoutError, match="chosen"):
        run_sync(backend.write("file", b""))


def test_only_the_nth_call_that_matches_meets_the_fault(backend) -> None:
    backend.when("write", "a/*", not_done(), nth=2)
    for path in ("a/1", "b/1", "b/2"):
        run_sync(backend.write(path, b""))
    run_sync(backend.read("a/1"))
    with pytest.raises(StorageError):
        run_sync(backend.write("a/2", b""))
    run_sync(backend.write("a/3", b""))


def test_each_call_meets_a_fault_without_a_number(backend) -> None:
    backend.when("*", "*", not_done(), nth=None)
    for call in (backend.write("a", b""), backend.size("a"), backend.list(""), backend.delete("a")):
        with pytest.raises(StorageError):
            run_sync(call)


def test_calls_are_counted_from_the_rule_on(backend) -> None:
    run_sync(backend.write("a", b""))
    backend.when("write", "a", not_done())
    with pytest.raises(StorageError):
        run_sync(backend.write("a", b""))


def test_the_first_of_two_rules_strikes(backend) -> None:
    backend.when("write", "*", not_done(KeyError("first")))
    backend.when("write", "*", not_done(KeyError("second")))
    with pytest.raises(KeyError, match="first"):
        run_sync(backend.write("a", b""))


@pytest.mark.parametrize(
    ("fault", "expected"), [(flipped(1), b"bxtes"), (flipped(-1), b"byter"), (truncated(2), b"by")]
)
def test_bytes_are_damaged_on_their_way_in_and_out(inner, backend, fault, expected) -> None:
    backend.when("read*", "*", fault, nth=None)
    run_sync(backend.write("file", [b"by", b"tes"]))
    assert run_sync(backend.read("file")) == expected
    assert run_sync(backend.read_range("file", 0, 5)) == expected
    assert run_sync(inner.read("file")) == b"bytes"
    backend.when("write", "*", fault)
    run_sync(backend.write("damaged", [b"by", b"tes"]))
    assert run_sync(inner.read("damaged")) == expected


def test_what_carries_no_bytes_cannot_be_damaged(backend) -> None:
    backend.when("list", "*", flipped(0))
    with pytest.raises(InvalidArgument):
        run_sync(backend.list(""))


def test_what_is_hidden_is_not_there(inner, backend) -> None:
    run_sync(backend.write("file", b"bytes"))
    backend.when("*", "*", hidden(), nth=None)
    for call in (backend.read("file"), backend.read_range("file", 0, 1), backend.size("file")):
        with pytest.raises(NotFound):
            run_sync(call)
    assert run_sync(backend.list("")) == []
    run_sync(backend.write("other", b""))
    run_sync(backend.delete("file"))
    assert [entry.path for entry in run_sync(inner.list(""))] == ["file"]


def test_a_kill_may_be_an_exception_that_nobody_catches(inner, backend) -> None:
    class Killed(BaseException):
        pass

    backend.when("write", "*", killed(Killed()))
    with pytest.raises(Killed):
        run_sync(backend.write("file", b""))
    assert run_sync(inner.list("")) == []


def test_a_kill_ends_the_process_without_clean_up() -> None:
    program = textwrap.dedent("""
        import atexit
        from dtruntime_torch.storage import MemoryBackend, run_sync
        from dtruntime_torch.testing.faulty_backend import FaultyBackend, killed

        atexit.register(print, "cleaned up")
        backend = FaultyBackend(MemoryBackend())
        backend.when("write", "*", killed())
        run_sync(backend.write("file", b""))
        """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 137
    assert done.stdout == b""


def test_a_stopped_call_goes_on_once_it_is_released(inner, backend) -> None:
    stopped = Stopped()
    backend.when("write", "*", stopped)
    writer = threading.Thread(target=run_sync, args=[backend.write("file", b"late")])
    writer.start()
    assert stopped.reached.wait(timeout=60)
    assert run_sync(inner.list("")) == []
    stopped.release()
    writer.join(timeout=60)
    assert run_sync(inner.read("file")) == b"late"


def test_a_stopped_call_that_is_given_up_never_happens_and_holds_up_no_other(inner, backend) -> None:
    stopped = Stopped()
    backend.when("write", "*", stopped, nth=None)

    async def give_up_one() -> None:
        first = asyncio.ensure_future(backend.write("first", b""))
        second = asyncio.ensure_future(backend.write("second", b""))
        await in_thread(lambda: stopped.reached.wait(timeout=60))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        stopped.release()
        await second
        await backend.write("third", b"")

    run_sync(give_up_one())
    assert [entry.path for entry in run_sync(inner.list(""))] == ["second", "third"]


def test_the_calls_are_kept_in_order(backend) -> None:
    backend.when("create", "*", not_done())
    with pytest.raises(StorageError):
        run_sync(backend.create("a", b""))
    run_sync(backend.list("a/"))
    assert backend.calls == [("create", "a"), ("list", "a/")]


# --- chunks read straight into memory ---------------------------------------------------------------------------

FILE = bytes(range(100))
OFFSETS, SIZES, CHUNK = (0, 60), (20, 10), 8


class Chunks:
    """One read of two pieces of a file, of three chunks and of two, through a fault or none."""

    def __init__(self, folder: Path) -> None:
        self.backend = FaultyBackend(LocalBackend(folder))
        self.into = [bytearray(size) for size in SIZES]
        run_sync(self.backend.write("file", FILE))

    def read(self) -> bytes:
        reader = reads_chunks(self.backend)
        assert reader is not None
        views = [memoryview(piece) for piece in self.into]
        return run_sync(reader.read_chunks("file", OFFSETS, views, CHUNK))

    @property
    def arrived(self) -> bytes:
        return b"".join(self.into)


EXPECTED = b"".join(FILE[at : at + size] for at, size in zip(OFFSETS, SIZES, strict=True))


def digests(data: bytes | bytearray) -> bytes:
    """Of the pieces, as they arrived."""
    return _C.digest(data[: SIZES[0]], CHUNK) + _C.digest(data[SIZES[0] :], CHUNK)


@pytest.fixture
def chunks(tmp_path: Path) -> Chunks:
    return Chunks(tmp_path)


class OwnWay(LocalBackend):
    """Reads in a way of its own, past which no chunks may be read."""

    async def read_range(self, *arguments, **more):
        return await super().read_range(*arguments, **more)


@pytest.mark.parametrize("inner_of", [lambda folder: MemoryBackend(), OwnWay], ids=["memory", "own way"])
def test_chunks_are_read_only_where_the_inner_backend_reads_them(tmp_path: Path, inner_of) -> None:
    assert reads_chunks(FaultyBackend(inner_of(tmp_path))) is None
    assert reads_chunks(FaultyBackend(FaultyBackend(inner_of(tmp_path)))) is None
    assert reads_chunks(FaultyBackend(FaultyBackend(LocalBackend(tmp_path)))) is not None


def test_chunks_are_a_call_of_their_own(chunks: Chunks) -> None:
    chunks.backend.when("read_range", "*", not_done(), nth=None)
    assert (chunks.read(), chunks.arrived) == (digests(EXPECTED), EXPECTED)
    assert chunks.backend.calls[-1] == ("read_chunks", "file")


@pytest.mark.parametrize(
    ("fault", "arrived"), [(not_done(), bytes(30)), (lost_answer(), EXPECTED)], ids=["refused", "lost"]
)
def test_chunks_are_refused_or_their_answer_is_lost(chunks: Chunks, fault: Fault, arrived: bytes) -> None:
    chunks.backend.when("read*", "*", fault)
    with pytest.raises(StorageError, match="read_chunks of file"):
        chunks.read()
    assert chunks.arrived == arrived


def test_damaged_chunks_have_the_digests_of_what_arrived(chunks: Chunks) -> None:
    chunks.backend.when("read_chunks", "*", flipped(25))
    changed = bytearray(EXPECTED)
    changed[25] ^= 1
    assert (chunks.read(), chunks.arrived) == (digests(changed), bytes(changed))


@pytest.mark.parametrize(("length", "whole"), [(29, 4), (28, 4), (27, 3), (20, 3), (19, 2), (7, 0), (0, 0)])
def test_of_chunks_that_end_short_only_whole_ones_have_digests(
    chunks: Chunks, length: int, whole: int
) -> None:
    chunks.backend.when("read_chunks", "*", truncated(length))
    assert chunks.read() == digests(EXPECTED)[: 16 * whole]
    assert chunks.arrived[:length] == EXPECTED[:length]


@pytest.mark.parametrize(
    ("start", "stop", "meets"),
    [(19, 20, True), (20, 60, False), (59, 61, True), (70, None, False), (69, None, True), (0, None, True)],
)
def test_chunks_meet_a_bad_sector_that_one_piece_touches(
    chunks: Chunks, start: int, stop: int | None, meets: bool
) -> None:
    chunks.backend.when("read_chunks", "*", unreadable(start, stop))
    if not meets:
        assert chunks.read() == digests(EXPECTED)
        return
    with pytest.raises(StorageError, match="bad sector") as caught:
        chunks.read()
    assert caught.value.errno == errno.EIO


def test_chunks_of_a_hidden_file_are_not_there(chunks: Chunks) -> None:
    chunks.backend.when("*", "*", hidden(), nth=None)
    with pytest.raises(NotFound):
        chunks.read()


def test_a_stopped_read_of_chunks_goes_on_once_it_is_released(chunks: Chunks) -> None:
    stopped = Stopped()
    chunks.backend.when("read_chunks", "*", stopped)
    reader = threading.Thread(target=chunks.read)
    reader.start()
    assert stopped.reached.wait(timeout=60)
    assert chunks.arrived == bytes(30)
    stopped.release()
    reader.join(timeout=60)
    assert chunks.arrived == EXPECTED
