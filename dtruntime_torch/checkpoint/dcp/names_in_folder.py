"""What the files of a folder are called that DCP was given as a checkpoint.

Its records are those of an attempt, and so are the paths in them: `step-00000000/0000-1/shard-00000-of-00002.safetensors`.
The files lie in the folder itself, under the last part of that, with a prefix where several saves or several
manifests must lie side by side. No manager claims generation 0, so nobody takes one for the other.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from dtruntime_torch.checkpoint import names
from dtruntime_torch.checkpoint.names import Attempt

NAME = "dcp"
"""The name of the checkpoint in the records; nothing on storage is called so."""

_OWN = re.compile(r"(?:save-([1-9][0-9]{0,15})\.)?(?:rank-([0-9]{5,16})\.)?(.+)")


class OwnFile(NamedTuple):
    """What the name of a file in such a folder says.

    Attributes:
        save: which save of this folder it is of, counted from 1; of a manifest 0.
        rank: the rank that saved alone; None for a save of all ranks together.
        is_manifest: it is what makes the save a checkpoint.
    """

    save: int
    rank: int | None
    is_manifest: bool


def attempt_of(save: int) -> Attempt:
    """The attempt that the records of a save name."""
    return Attempt(generation=0, step=0, number=save)


def prefix_of(save: int, rank: int | None) -> str:
    """What the names of a save's files start with, but for its manifest.

    Args:
        save: which save of this folder, counted from 1.
        rank: of a rank that saves alone.

    Example:
        >>> prefix_of(1, None), prefix_of(2, None), prefix_of(2, 3)
        ('', 'save-2.', 'save-2.rank-00003.')
    """
    return (f"save-{save}." if save > 1 else "") + _of_rank(rank)


def manifest_name(rank: int | None) -> str:
    """The file that makes a save a checkpoint.

    Example:
        >>> manifest_name(None), manifest_name(3)
        ('manifest.json', 'rank-00003.manifest.json')
    """
    return _of_rank(rank) + names.MANIFEST


def parse_own(file_name: str) -> OwnFile | None:
    """Reads what the functions above make; None for any other name, which belongs to somebody else.

    Example:
        >>> parse_own("save-2.shard-00000-of-00001.json")
        OwnFile(save=2, rank=None, is_manifest=False)
        >>> parse_own("model-00001-of-00002.safetensors")
    """
    match = _OWN.fullmatch(file_name)
    if match is None:
        return None
    save, rank = int(match[1] or 1), None if match[2] is None else int(match[2])
    if file_name == manifest_name(rank):
        return OwnFile(0, rank, True)
    shard = names.parse_shard_file(match[3])
    known = shard is not None and shard.suffix in (names.DATA_SUFFIX, names.PART_SUFFIX)
    if not known or file_name != prefix_of(save, rank) + match[3]:
        return None
    return OwnFile(save, rank, False)


def _of_rank(rank: int | None) -> str:
    return "" if rank is None else f"rank-{rank:05d}."
