"""Memory that runs out inside the native module is a MemoryError, raised with the GIL in hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from dtruntime_torch import _C
data = bytes(16)
extents = [(0, 10 * i, 5) for i in range(200_000)]
starts, lengths = [0] * 2_000_000, [1] * 2_000_000
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (int(sys.argv[2]) << 20), resource.RLIM_INFINITY))
try:
    if sys.argv[1] == "write_extents":
        _C.write_extents("file", data, extents)
    else:
        _C.digest_ranges(data, starts, lengths, 1)
except MemoryError:
    print("refused")
else:
    print("done")
"""


# Where it runs out depends on the allocator: some of these lie in the conversion of the arguments, some behind it.
@pytest.mark.parametrize("call", ["write_extents", "digest_ranges"])
def test_it_is_an_error_wherever_it_happens(call, tmp_path):
    answers = set()
    for room in (8, 16, 20, 24, 28, 32, 64, 96, 128, 160, 4096):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, call, str(room)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 0, (room, run.stderr)
        answers.add(run.stdout.strip())
        (tmp_path / "file").unlink(missing_ok=True)
    assert answers == {"refused", "done"}
