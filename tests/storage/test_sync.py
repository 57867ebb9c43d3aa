from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtruntime_torch.storage import run_sync
from dtruntime_torch.storage.sync import in_thread


async def here() -> tuple[int, int]:
    await asyncio.sleep(0)
    return threading.get_ident(), id(asyncio.get_running_loop())


async def fail() -> None:
    raise KeyError("ours")


def test_without_a_loop_it_runs_in_the_calling_thread() -> None:
    assert run_sync(here())[0] == threading.get_ident()


def test_inside_a_running_loop_it_runs_in_a_thread_and_a_loop_of_its_own() -> None:
    async def outer() -> None:
        thread, loop = run_sync(here())
        assert thread != threading.get_ident()
        assert loop != id(asyncio.get_running_loop())

    run_sync(outer())


def test_from_another_thread_it_runs_there() -> None:
    async def outer() -> bool:
        return await in_thread(lambda: run_sync(here())[0] == threading.get_ident())

    assert run_sync(outer())


@pytest.mark.parametrize("inside", [False, True])
def test_its_error_is_the_callers(inside: bool) -> None:
    async def outer() -> None:
        run_sync(fail())

    with pytest.raises(KeyError, match="ours"):
        run_sync(outer() if inside else fail())


def test_it_leaves_the_callers_current_loop_alone() -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        run_sync(here())
        assert asyncio.get_event_loop_policy().get_event_loop() is loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_context_variables_are_seen_inside_a_running_loop() -> None:
    variable = contextvars.ContextVar("variable", default="unset")

    async def look() -> str:
        return variable.get()

    async def outer() -> str:
        variable.set("set")
        return run_sync(look())

    assert run_sync(outer()) == "set"


def test_tasks_left_over_are_cancelled_and_cleaned_up() -> None:
    ended = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def leave_one() -> None:
        task = asyncio.ensure_future(endless())
        await asyncio.sleep(0)
        assert not task.done()

    run_sync(leave_one())
    assert ended == [True]


def test_work_in_a_thread_ends_before_its_siblings_failure_is_raised() -> None:
    failed, ended = threading.Event(), []

    def work() -> None:
        assert failed.wait(timeout=60)
        ended.append(True)

    async def fail_after_start() -> None:
        failed.set()
        raise KeyError("ours")

    async def both() -> None:
        await asyncio.gather(in_thread(work), fail_after_start())

    with pytest.raises(KeyError):
        run_sync(both())
    assert ended == [True]


def test_a_cancelled_caller_gets_its_buffers_back_only_when_the_work_has_ended() -> None:
    started, go_on, ended = threading.Event(), threading.Event(), []

    def work() -> None:
        started.set()
        assert go_on.wait(timeout=60)
        ended.append(True)

    async def cancel() -> list[bool]:
        task = asyncio.ensure_future(in_thread(work))
        await in_thread(lambda: started.wait(timeout=60))
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return ended

    assert run_sync(cancel()) == [True]


def test_a_save_in_a_thread_of_its_own_still_ends_when_the_program_does(tmp_path: Path) -> None:
    # Without that a script that ends with a save in flight would lose it: the pools are closed by then.
    program = textwrap.dedent("""
        import sys, threading
        from dtruntime_torch.storage import LocalBackend, run_sync

        def save():
            threading.main_thread().join()
            run_sync(LocalBackend(sys.argv[1]).write("file", b"saved"))

        threading.Thread(target=save).start()
        """)
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "file").read_bytes() == b"saved"


@pytest.fixture
def interrupting() -> Iterator[threading.Event]:
    """Lets SIGUSR1 interrupt the main thread; set when it has."""
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGUSR1, interrupt)
    yield interrupted
    # What a test that failed left at work may still send one: that is not to end the test run.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def until_the_main_thread_waits() -> None:
    """An interrupt between two lines of a clean-up is lost on it, as on any in Python; here it comes while that waits.

    On a busy machine a thread that has to go on may stay where it waited for some more milliseconds.
    """
    seen = 0
    for _ in range(60_000):
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        seen = seen + 1 if frame.f_code.co_name in ("select", "wait", "_wait_for_tstate_lock") else 0
        if seen == 50:
            return
        threading.Event().wait(0.001)
    raise AssertionError("the main thread does not wait")


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a running loop"])
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_leaves_no_work_behind(interrupting: threading.Event, inside: bool, times: int) -> None:
    started, ended = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        for _ in range(times):
            until_the_main_thread_waits()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert interrupting.wait(60)
            interrupting.clear()
        sum(range(2_000_000))  # what goes on for a while after that
        ended.set()

    async def outer() -> None:
        run_sync(in_thread(work))

    with pytest.raises(KeyboardInterrupt):
        run_sync(outer()) if inside else run_sync(in_thread(work))
    assert ended.is_set()
