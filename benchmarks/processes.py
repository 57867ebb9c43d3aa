"""What the processes of a session take: CPU seconds and memory, as the kernel counts them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
# The fields of /proc/PID/stat behind the name, which may itself hold spaces and brackets: state, parent, group, session.
SESSION = 3
# Of /proc/PID/smaps_rollup. Not the share of anonymous memory: what ranks were forked with falls with each fork.
HELD = ("Anonymous:", "Pss_Shmem:")


def members(sessions: Iterable[int]) -> list[int]:
    """The processes of these sessions: their leaders, and whatever those have started."""
    wanted, found = set(sessions), []
    for path in PROC.glob("[0-9]*"):
        # A process may end while it is looked at.
        with suppress(OSError):
            fields = (path / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[SESSION]) in wanted:
                found.append(int(path.name))
    return found


def cpu_seconds(pids: Iterable[int]) -> dict[int, float]:
    """The CPU seconds that each of these has used, in user and in kernel mode; one that has ended is left out."""
    used = {}
    for pid in pids:
        with suppress(OSError):
            # What clock_getcpuclockid(3) makes of a process: exact, where /proc/PID/stat counts hundredths.
            used[pid] = time.clock_gettime((~pid << 3) | 2)
    return used


def memory(pids: Iterable[int]) -> int:
    """Bytes of memory that these hold together, shared memory once; mapped files, as of libraries, are left out."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            lines = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8").splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(HELD))
    return total
