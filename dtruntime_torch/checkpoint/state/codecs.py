"""How values of torch, NumPy and the standard library are stored that `objects` does not know by itself."""

from __future__ import annotations

import io
from collections import Counter, OrderedDict

import torch

from dtruntime_torch.checkpoint.objects import register_codec
from dtruntime_torch.checkpoint.state.numpy_codecs import register_numpy
from dtruntime_torch.checkpoint.state.wrappers import Wrapping, wrapping_of


def register_codecs() -> None:
    """Registers all codecs that come with the package."""
    register_codec(torch.Size, "torch.Size", list, _size_of)
    register_codec(torch.dtype, "torch.dtype", lambda dtype: str(dtype).removeprefix("torch."), _dtype_named)
    register_codec(torch.device, "torch.device", str, lambda name: torch.device(str(name)))
    # MultiStepLR keeps its milestones in one.
    register_codec(Counter, "collections.Counter", dict, _counter_of)
    register_codec(OrderedDict, "collections.OrderedDict", dict, _ordered_dict_of)
    # What a module made with torch.save for itself, as Transformer Engine's extra state is.
    register_codec(io.BytesIO, "io.BytesIO", lambda stream: [stream.getvalue(), stream.tell()], _stream_of)
    register_codec(Wrapping, "dtruntime.Wrapping", Wrapping.stored, wrapping_of)
    register_numpy()


def _dtype_named(name: object) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {name!r}")
    return dtype


def _size_of(sizes: object) -> torch.Size:
    if not isinstance(sizes, list):
        raise TypeError(f"{sizes!r} is no list of sizes")
    return torch.Size(sizes)


def _counter_of(counts: object) -> Counter[object]:
    if not isinstance(counts, dict):
        raise TypeError(f"{counts!r} is no dict of counts")
    return Counter(counts)


def _stream_of(held: object) -> io.BytesIO:
    data, position = held if isinstance(held, list) and len(held) == 2 else (None, None)
    if type(data) is not bytes or type(position) is not int:
        raise TypeError("it is no pair of bytes and a position")
    stream = io.BytesIO(data)
    stream.seek(position)
    return stream


def _ordered_dict_of(items: object) -> OrderedDict[object, object]:
    if not isinstance(items, dict):
        raise TypeError(f"{items!r} is no dict")
    return OrderedDict(items)
