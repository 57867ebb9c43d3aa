"""Between threads and event loops: blocking work behind an await, and an await in blocking code."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import TypeVar

from dtruntime_torch.errors import StorageError

Result = TypeVar("Result")


async def in_thread(work: Callable[[], Result]) -> Result:
    """Runs blocking `work` on a thread of the loop's pool, so that callers may gather several.

    If the caller is cancelled, the cancellation is raised once the work has ended: it may still be reading
    buffers that the caller is about to reuse.

    Example:
        >>> run_sync(in_thread(lambda: 6 * 7))
        42
    """
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

    def run() -> None:
        try:
            outcome.set_result(_run_in_new_loop(coroutine))
        except BaseException as error:
            outcome.set_exception(error)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=[run], name="dtruntime-run-sync").start()
    return outcome.result()


def _run_in_new_loop(coroutine: Coroutine[object, object, Result]) -> Result:
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        try:
            loop.run_until_complete(_finish(asyncio.all_tasks(loop)))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()


async def _finish(tasks: set[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
