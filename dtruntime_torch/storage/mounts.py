"""Whether a folder lies on a file system that other hosts change behind this one's back."""

from __future__ import annotations

import os
import re

# Those whose clients keep listings and attributes for a while. FUSE may be anything, so it counts.
_NETWORK_TYPES = {
    "9p", "afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "orangefs", "prl_fs", "pvfs2",
    "smb3", "smbfs", "vboxsf", "virtiofs",
}  # fmt: skip
_LOCAL_FUSE = {"fuseblk", "fuse.fuse-overlayfs", "fuse.lxcfs", "fusectl"}
_ESCAPED = re.compile(r"\\([0-7]{3})")


def is_on_network(folder: str, mountinfo: str = "/proc/self/mountinfo") -> bool:
    """Tells whether a folder lies on a network file system; where the system does not say, it counts as one.

    Args:
        folder: an absolute path without links; it need not be there yet.
        mountinfo: where the kernel lists what is mounted.
    """
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
            mounts = [_read(line) for line in lines]
    except OSError:
        return True
    # Of two at one place the later one hides the earlier.
    above = [(len(place), n, kind) for n, (place, kind) in enumerate(mounts) if _lies_in(folder, place)]
    return not above or _is_network(max(above)[2])


def _is_network(kind: str) -> bool:
    return kind in _NETWORK_TYPES or (kind.startswith("fuse") and kind not in _LOCAL_FUSE)


def _read(line: str) -> tuple[str, str]:
    """Where it is mounted, and the type of the file system, from a line as in proc(5)."""
    mount, _, source = line.partition(" - ")
    place = _ESCAPED.sub(lambda code: chr(int(code[1], 8)), mount.split(" ")[4])
    return place, source.split(" ")[0]


def _lies_in(folder: str, place: str) -> bool:
    return os.path.commonpath([folder, place]) == place
