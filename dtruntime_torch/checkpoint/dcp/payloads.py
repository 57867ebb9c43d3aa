"""What DCP's planners hand over as bytes: values without a pickle on the way in, a pickle of ours on the way out.

A default planner gives `torch.save` bytes and runs `torch.load(weights_only=False)` on what a reader returns. So what it
gives is decoded by `torch.load(weights_only=True)` and stored as `objects` encodes it; what it gets is made here, from
the decoded value. Bytes of another planner that are no pickle in disguise are kept as they are.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner

from dtruntime_torch.checkpoint import objects
from dtruntime_torch.checkpoint.objects import Json
from dtruntime_torch.checkpoint.state.codecs import register_codecs
from dtruntime_torch.errors import CorruptCheckpoint, UnsupportedType

register_codecs()

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a file of torch.save began before it was a zip
_NEWEST_PICKLE = 5


def encode_payload(data: bytes, fqn: str) -> tuple[Json, bytes | None]:
    """Takes apart what a planner hands over.

    Args:
        data: the bytes.
        fqn: whose they are, for the error.

    Returns:
        The encoded value and None; or None and the bytes, where they are no file of torch.save.

    Raises:
        UnsupportedType: it holds what cannot be stored without a pickle, or is one; says what to do.
    """
    if _is_torch_file(data):
        value = _load_plain(data, fqn)
        _refuse_tensors(value, fqn, set())
        return objects.encode(value, fqn), None
    if _is_pickle(data):
        raise UnsupportedType(
            f"{fqn}: the planner made a pickle of it, and none is stored; let it hand over the bytes of torch.save, "
            f"or an encoding of its own that needs no pickle"
        )
    return None, data


def decode_payload(value: Json, fqn: str) -> io.BytesIO:
    """What a planner gets for a value that `encode_payload` encoded: bytes of torch.save, made here.

    Raises:
        CorruptCheckpoint: it encodes no value.
    """
    return as_torch_file(objects.decode(value, fqn))


def as_torch_file(value: object) -> io.BytesIO:
    """The bytes of torch.save for a value, from their start on."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def raw_payload(data: bytes, fqn: str, planner: LoadPlanner) -> io.BytesIO:
    """What a planner gets for bytes that were kept as they were.

    Raises:
        CorruptCheckpoint: the planner would unpickle them, or they are a pickle, which no save of ours keeps.
    """
    unpickles = getattr(type(planner), "load_bytes", None) is DefaultLoadPlanner.load_bytes
    if unpickles or _is_torch_file(data) or _is_pickle(data):
        raise CorruptCheckpoint(
            f"{fqn}: the checkpoint holds bytes that {type(planner).__qualname__} would unpickle, which might run code "
            f"of whoever wrote them; bytes of a planner of one's own are read by one that overrides load_bytes"
        )
    return RawPayload(data)


class RawPayload(io.BytesIO):
    """Bytes that a planner may take as they are, and that nothing unpickles by mistake.

    A planner that overrides `load_bytes` may still call that of torch, which hands them to pickle; what is no pickle to the
    eye may be one to it. It reads lines, which are not there, or from a zip into memory, which is refused.
    """

    @property
    def readline(self) -> NoReturn:
        raise AttributeError("bytes that were kept as they were are not read by lines")

    def readinto(self, buffer: object) -> NoReturn:
        raise io.UnsupportedOperation("bytes that were kept as they were are not read into memory")


def _is_torch_file(data: bytes) -> bool:
    if data.startswith(_LEGACY):
        return True
    if not data.startswith(b"PK\x03\x04"):
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(
                name.rpartition("/")[2] in ("data.pkl", "constants.pkl") for name in archive.namelist()
            )
    except (zipfile.BadZipFile, NotImplementedError):
        return False


def _is_pickle(data: bytes) -> bool:
    """Whether they begin and end as pickles do since there are protocols with a mark."""
    return len(data) > 2 and data[0] == 0x80 and 2 <= data[1] <= _NEWEST_PICKLE and data.endswith(b".")


def _refuse_tensors(value: object, where: str, seen: set[int], depth: int = 0) -> None:
    if isinstance(value, torch.Tensor):
        raise UnsupportedType(
            f"{where}: a tensor in a tuple, or in anything else that DCP takes as one value, cannot be stored; put it in a "
            f"dict or a list of the state, and let the planner flatten that (flatten_state_dict=True)"
        )
    if depth == objects.MAX_DEPTH or id(value) in seen:
        return  # what is too deep or contains itself is refused for that
    if isinstance(value, Mapping):
        seen.add(id(value))
        for key, item in value.items():
            _refuse_tensors(item, f"{where}[{key!r}]", seen, depth + 1)
    elif isinstance(value, (list, tuple)):
        seen.add(id(value))
        for position, item in enumerate(value):
            _refuse_tensors(item, f"{where}[{position}]", seen, depth + 1)


def _load_plain(data: bytes, fqn: str) -> object:
    try:
        return _load(data)
    except pickle.UnpicklingError:
        known: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            frozenset,
            *objects.codec_types(),
            *_numpy_makers(),
        ]
    try:
        with torch.serialization.safe_globals(known):
            return _load(data)
    except pickle.UnpicklingError as error:
        zipped = not data.startswith(_LEGACY)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)) if zipped else []
        raise UnsupportedType(
            f"{fqn}: it needs {', '.join(names) or 'a pickle'} to be made again, and no pickle is stored; turn it into "
            f"plain int, float, str, bytes, list, tuple, set or dict first, or teach it: "
            f"dtruntime_torch.register_codec"
        ) from error


def _load(data: bytes) -> object:
    value: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return value


def _numpy_makers() -> list[Callable[..., Any]]:
    """What NumPy's own pickles name: they make arrays and scalars and run nothing else."""
    import numpy as np

    makers = [np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGMmSU"}
    return [*makers, np.ndarray, np.dtype, *kinds]
