"""What things are called on storage, and how a name is read back. No I/O.

A number is written with leading zeros to a fixed least width and grows beyond it, so numbers compare as
integers, never as text. A path is read back only if it is exactly what would have been written: nothing that
merely resembles one of ours is taken for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from dtruntime_torch.errors import InvalidArgument

# A double holds every integer up to this exactly, so a JSON parser of any language reads it.
MAX_INTEGER = 2**53 - 1

MANIFEST = "manifest.json"
DATA_SUFFIX = ".safetensors"
DELTA_SUFFIX = ".delta"
PART_SUFFIX = ".json"

_NAME = r"(?!\.)[A-Za-z0-9._-]{1,100}"
_CHECKPOINT_NAME = re.compile(_NAME)
_COMMIT = re.compile(rf"{_NAME}/commits/([0-9]{{4,16}})-([0-9]{{8,16}})\.json")
_GENERATION = re.compile(rf"{_NAME}/generations/([0-9]{{4,16}})\.json")
_ATTEMPT = re.compile(r"step-([0-9]{8,16})/([0-9]{4,16})-([0-9]{1,16})")
_SHARD = re.compile(r"shard-([0-9]{5,16})-of-([0-9]{5,16})(\.[a-z]+)")


class CommitKey(NamedTuple):
    """The order of checkpoints: a later generation comes after all of an earlier one, then the step counts.

    Attributes:
        generation: number of the incarnation that saved.
        step: training step.

    Example:
        >>> CommitKey(8, 50) > CommitKey(7, 100)
        True
    """

    generation: int
    step: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to save one step; it has a folder that nobody else writes to.

    Attributes:
        generation: number of the incarnation that saves.
        step: training step.
        number: which try of that step in that generation.
    """

    generation: int
    step: int
    number: int

    @property
    def path(self) -> str:
        """Its folder, relative to the checkpoint's.

        Example:
            >>> Attempt(generation=7, step=100, number=1).path
            'step-00000100/0007-1'
        """
        return f"step-{_digits(self.step, 8)}/{_digits(self.generation, 4)}-{_digits(self.number, 1)}"

    @property
    def key(self) -> CommitKey:
        """The commit that this attempt may become."""
        return CommitKey(self.generation, self.step)


class Shard(NamedTuple):
    """What the name of a rank's file says.

    Attributes:
        rank: who wrote it.
        world_size: of how many.
        suffix: what kind of file it is, with its dot.
    """

    rank: int
    world_size: int
    suffix: str


def check_name(name: str) -> str:
    """Returns the name of a checkpoint if it may be one.

    Raises:
        InvalidArgument: it is not 1 to 100 of A-Z a-z 0-9 . _ - or it starts with a dot.

    Example:
        >>> check_name("gpt-2.large")
        'gpt-2.large'
    """
    if type(name) is str and _CHECKPOINT_NAME.fullmatch(name):
        return name
    raise InvalidArgument(
        f"the checkpoint name {name!r} must be 1 to 100 of the characters A-Z a-z 0-9 . _ - "
        f"and may not start with a dot"
    )


def commits_folder(name: str) -> str:
    """The prefix of all commit files of a checkpoint.

    Example:
        >>> commits_folder("model")
        'model/commits/'
    """
    return f"{check_name(name)}/commits/"


def generations_folder(name: str) -> str:
    """The prefix of all generation records of a checkpoint.

    Example:
        >>> generations_folder("model")
        'model/generations/'
    """
    return f"{check_name(name)}/generations/"


def commit_path(name: str, key: CommitKey) -> str:
    """The file whose existence makes a checkpoint.

    Example:
        >>> commit_path("model", CommitKey(7, 100))
        'model/commits/0007-00000100.json'
    """
    return f"{commits_folder(name)}{_digits(key.generation, 4)}-{_digits(key.step, 8)}.json"


def generation_path(name: str, generation: int) -> str:
    """The file that says which incarnation a generation is.

    Example:
        >>> generation_path("model", 7)
        'model/generations/0007.json'
    """
    return f"{generations_folder(name)}{_digits(generation, 4)}.json"


def attempt_path(name: str, attempt: Attempt) -> str:
    """The folder of an attempt, relative to the root of the storage.

    Example:
        >>> attempt_path("model", Attempt(7, 100, 1))
        'model/step-00000100/0007-1'
    """
    return f"{check_name(name)}/{attempt.path}"


def attempts_prefix(name: str) -> str:
    """What the folders of all attempts start with, relative to the root of the storage.

    Example:
        >>> attempts_prefix("model")
        'model/step-'
    """
    return f"{check_name(name)}/step-"


def manifest_path(name: str, attempt: str) -> str:
    """The manifest of an attempt, relative to the root of the storage.

    Args:
        name: of the checkpoint.
        attempt: the path of its folder, relative to the checkpoint's.

    Example:
        >>> manifest_path("model", "step-00000100/0007-1")
        'model/step-00000100/0007-1/manifest.json'
    """
    return f"{check_name(name)}/{attempt}/{MANIFEST}"


def shard_file_name(rank: int, world_size: int, suffix: str) -> str:
    """The name of one rank's file in an attempt's folder.

    Args:
        rank: whose it is.
        world_size: the number of ranks that save.
        suffix: what kind of file it is, with its dot.

    Example:
        >>> shard_file_name(0, 2, ".safetensors")
        'shard-00000-of-00002.safetensors'
    """
    return f"shard-{_digits(rank, 5)}-of-{_digits(world_size, 5)}{suffix}"


def parse_commit(path: str) -> CommitKey | None:
    """Reads what `commit_path` wrote; None for any other path.

    Example:
        >>> parse_commit("model/commits/0007-00000100.json")
        CommitKey(generation=7, step=100)
    """
    found = _numbers(_COMMIT, path)
    if found is None:
        return None
    key = CommitKey(*found)
    return key if path == commit_path(path.partition("/")[0], key) else None


def parse_generation(path: str) -> int | None:
    """Reads what `generation_path` wrote; None for any other path.

    Example:
        >>> parse_generation("model/generations/0007.json")
        7
    """
    found = _numbers(_GENERATION, path)
    if found is None:
        return None
    return found[0] if path == generation_path(path.partition("/")[0], found[0]) else None


def parse_attempt(path: str) -> Attempt | None:
    """Reads what `Attempt.path` wrote; None for any other path.

    Example:
        >>> parse_attempt("step-00000100/0007-1")
        Attempt(generation=7, step=100, number=1)
    """
    found = _numbers(_ATTEMPT, path)
    if found is None:
        return None
    step, generation, number = found
    attempt = Attempt(generation, step, number)
    return attempt if path == attempt.path else None


def parse_shard_file(file_name: str) -> Shard | None:
    """Reads what `shard_file_name` wrote; None for any other name.

    Example:
        >>> parse_shard_file("shard-00000-of-00002.json")
        Shard(rank=0, world_size=2, suffix='.json')
    """
    match = _SHARD.fullmatch(file_name)
    if match is None or not _in_range(match[1], match[2]):
        return None
    shard = Shard(int(match[1]), int(match[2]), match[3])
    return shard if file_name == shard_file_name(*shard) and shard.rank < shard.world_size else None


def _numbers(pattern: re.Pattern[str], path: str) -> tuple[int, ...] | None:
    match = pattern.fullmatch(path)
    if match is None or not _in_range(*match.groups()):
        return None
    return tuple(int(group) for group in match.groups())


def _in_range(*texts: str) -> bool:
    return all(int(text) <= MAX_INTEGER for text in texts)


def _digits(number: int, width: int) -> str:
    if not 0 <= number <= MAX_INTEGER:
        raise InvalidArgument(f"{number} cannot be part of a path; it must lie between 0 and {MAX_INTEGER}")
    return f"{number:0{width}d}"
