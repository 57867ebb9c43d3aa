"""Between threads and event loops: blocking work behind an await, and an await in blocking code."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from typing import Any, Generic, TypeVar

from dtruntime_torch.errors import StorageError

Result = TypeVar("Result")

_MOST_INTERRUPTS = 1000


async def in_thread(work: Callable[[], Result]) -> Result:
    """Runs blocking `work` on a thread of the loop's pool, so that callers may gather several.

    If the caller is cancelled, the cancellation is raised once the work has ended: it may still be reading
    buffers that the caller is about to reuse.

    Example:
        >>> run_sync(in_thread(lambda: 6 * 7))
        42
    """
    piece = _Piece(work)
    try:
        return await _outcome_of(piece)
    except BaseException:
        # Only an interrupt in the midst of handing it over finds it still at work.
        _insist(piece.give_up)
        raise


async def _outcome_of(work: Callable[[], Result]) -> Result:
    try:
        future = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError:
        # The interpreter is going down and gives no more work to its pools; a save in flight may still end.
        return work()
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()  # looked at, so that asyncio does not log it as lost
        raise cancelled
    return future.result()


class _Piece(Generic[Result]):
    """Work that has ended, or never begins, once it was given up."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._began = self._given_up = False
        self._ended = threading.Event()

    def __call__(self) -> Result:
        with self._lock:
            if self._given_up:
                raise asyncio.CancelledError
            self._began = True
        try:
            return self._work()
        finally:
            self._ended.set()

    def give_up(self) -> None:
        with self._lock:
            self._given_up = True
        if self._began:
            self._ended.wait()


async def in_time(work: Awaitable[Result], seconds: float, what: str) -> Result:
    """Gives work up that does not end; what a thread of `in_thread` is at is waited for all the same.

    Args:
        work: cancelled then.
        seconds: that it may take.
        what: is done, for the error.

    Raises:
        StorageError: the storage did not answer in time.
    """
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError as error:
        raise StorageError(f"{what}: the storage did not answer within {seconds:g} s") from error


def run_sync(coroutine: Coroutine[object, object, Result]) -> Result:
    """Runs a coroutine to its end and returns its result, from any thread.

    Loops are never nested: where one is running already, the coroutine gets a thread of its own. The caller's
    current event loop is left alone (`asyncio.run` would take it away).

    Example:
        >>> async def answer() -> int:
        ...     return 42
        >>> run_sync(answer())
        42
    """
    return _run_in_new_thread(coroutine) if _is_loop_running() else _run_in_new_loop(coroutine)


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run_in_new_thread(coroutine: Coroutine[object, object, Result]) -> Result:
    outcome: Future[Result] = Future()
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Result] | None]] = Future()

    async def cancellable() -> Result:
        running.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    def run() -> None:
        try:
            outcome.set_result(_run_in_new_loop(cancellable()))
        except BaseException as error:
            outcome.set_exception(error)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=[run], name="dtruntime-run-sync").start()

    def stop() -> None:
        either: list[Future[Any]] = [running, outcome]
        wait(either, return_when=FIRST_COMPLETED)
        if not outcome.done():
            loop, task = running.result()
            if task is not None:
                with suppress(RuntimeError):  # the loop has just ended
                    loop.call_soon_threadsafe(task.cancel)
        # Not the thread itself: an interrupted `join` takes a thread for ended (CPython 3.11).
        outcome.exception()

    try:
        return outcome.result()
    except BaseException:
        # Interrupted, or at its end: nothing may go on behind the caller's back, into memory that it uses again.
        _insist(stop)
        raise


def _run_in_new_loop(coroutine: Coroutine[object, object, Result]) -> Result:
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        try:
            _insist(lambda: loop.run_until_complete(_finish(asyncio.all_tasks(loop))))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()


def _insist(end: Callable[[], object]) -> None:
    """Waits to the end however often that is interrupted; then the last interrupt is raised."""
    interrupt: BaseException | None = None
    for _ in range(_MOST_INTERRUPTS):
        try:
            end()
            break
        except BaseException as error:  # of a signal handler: what is waited for raises nothing
            interrupt = error
    if interrupt is not None:
        raise interrupt


async def _finish(tasks: set[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
