from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading

import pytest

from dtruntime_torch.errors import InvalidArgument, NotFound, StorageError
from dtruntime_torch.storage import MemoryBackend, run_sync
from dtruntime_torch.storage.sync import in_thread
from dtruntime_torch.testing.faulty_backend import (
    FaultyBackend,
    Stopped,
    flipped,
    hidden,
    killed,
    lost_answer,
    not_done,
    truncated,
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
