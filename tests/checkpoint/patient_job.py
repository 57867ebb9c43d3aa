"""A copy job that gets nowhere while somebody waits with a time-out, whatever the machine does meanwhile."""

from __future__ import annotations

from dtruntime_torch import _C

_CopyJob = _C.CopyJob


class PatientJob:
    """Starts when it is waited for without a time-out."""

    done = False
    nbytes_done = nbytes_copied = chunks_skipped = 0

    def __init__(self, *arguments: object, hold: bool = False) -> None:
        self._arguments = arguments
        self._job: _C.CopyJob | None = None

    def wait(self, copies: list[int] | None = None, timeout: float | None = None, help: bool = True) -> bool:
        if timeout is not None:
            return False
        self._job = _CopyJob(*self._arguments)
        return self._job.wait(copies, help=help)

    def release(self) -> None:
        """It gets nowhere all the same."""

    def digests(self) -> bytes:
        assert self._job is not None
        return self._job.digests()

    def cancel(self) -> None:
        """Nothing has begun, and nothing ever will."""
        self.wait = self._refuse

    def _refuse(self, copies: object = None, timeout: object = None, help: object = None) -> bool:
        raise RuntimeError("the copy job was cancelled")
