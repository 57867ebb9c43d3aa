"""Tensors that only wrap others (`__tensor_flatten__`): they have no memory of their own, so what they wrap is stored.

A wrapper `w` becomes the tensors `w.<name>`, one for each that it wraps, and the value `w.__tensor_flatten__`, which
says what else makes it. On load the tensors inside of the wrapper that is there are filled. No class is ever made
from its name in a checkpoint: where there is no wrapper, none can be made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dtruntime_torch.checkpoint.format import strict_json
from dtruntime_torch.checkpoint.objects import encode
from dtruntime_torch.checkpoint.specs import Shape
from dtruntime_torch.checkpoint.state.local_shard import dtype_name, is_dtensor
from dtruntime_torch.errors import UnsupportedType

# Beside the names of the wrapped tensors, which are attributes.
WRAPPING = "__tensor_flatten__"


@dataclass(frozen=True, slots=True)
class Wrapping:
    """What makes a wrapper beside the tensors in it.

    Attributes:
        kind: the name of its class.
        dtype: its own, as specs name it.
        shape: its own.
        stride: its own.
        metadata: what `__tensor_flatten__` gave.
        tensor: the wrapper, where there is one; it is not stored.
    """

    kind: str
    dtype: str
    shape: Shape
    stride: Shape
    metadata: object
    tensor: torch.Tensor | None = None

    def stored(self) -> dict[str, object]:
        """What is stored of it."""
        return {
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "stride": list(self.stride),
            "metadata": self.metadata,
        }

    def around(self, inner: dict[str, Any]) -> torch.Tensor:
        """A wrapper like `tensor` around other tensors; itself, if they are those in it."""
        wrapper: Any = self.tensor
        if all(getattr(wrapper, name) is part for name, part in inner.items()):
            return self.tensor  # type: ignore[return-value]  # only asked for where there is one
        _, metadata = wrapper.__tensor_flatten__()
        made: torch.Tensor = type(wrapper).__tensor_unflatten__(
            inner, metadata, torch.Size(self.shape), self.stride
        )
        return made


def is_wrapper(value: object) -> bool:
    """Whether the value is a tensor that can be taken apart."""
    kind = type(value)
    if kind is torch.Tensor or kind is torch.nn.Parameter or not isinstance(value, torch.Tensor):
        return False
    if not (hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")):
        return False
    # A DTensor is stored as one. Of the others what is inside is not what there is to store.
    return not (is_dtensor(value) or value.is_nested or kind.__name__ == "AsyncCollectiveTensor")


def take_apart(wrapper: Any, where: str) -> tuple[dict[str, torch.Tensor], Wrapping]:
    """The tensors in a wrapper, by their names, and what else makes it.

    Raises:
        UnsupportedType: it holds something beside tensors.
    """
    names, metadata = wrapper.__tensor_flatten__()
    inner = {name: getattr(wrapper, name) for name in names}
    for name, part in inner.items():
        if not isinstance(part, torch.Tensor):
            raise UnsupportedType(
                f"{where}.{name}: a {type(wrapper).__qualname__} holds a {type(part).__qualname__} where it says to "
                f"hold a tensor; store what it holds by yourself"
            )
    kind = type(wrapper).__qualname__
    return inner, Wrapping(
        kind, dtype_name(wrapper), tuple(wrapper.shape), tuple(wrapper.stride()), metadata, wrapper
    )


def innermost(tensor: torch.Tensor, where: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors with memory in a tensor, wrappers in wrappers included, and their names; of a plain one itself."""
    if not is_wrapper(tensor):
        yield where, tensor
        return
    inner, _ = take_apart(tensor, where)
    for name, part in inner.items():
        yield from innermost(part, f"{where}.{name}")


def inside(value: object, keys: list[object]) -> object:
    """What lies in a wrapper, and in the wrappers in it, under these names; None if nothing does."""
    for key in keys:
        if not is_wrapper(value):
            return None
        inner, _ = take_apart(value, "")
        value = inner.get(str(key))
    return value


def mismatch(saved: Wrapping, own: Wrapping) -> str | None:
    """In what a wrapper of a checkpoint differs from one that is there, the tensors in them left out."""
    for name, theirs, ours in (
        ("class", saved.kind, own.kind),
        ("dtype", saved.dtype, own.dtype),
        ("shape", saved.shape, own.shape),
        ("strides", _compared(saved), _compared(own)),
    ):
        if theirs != ours:
            return f"a wrapper of {name} {theirs} in the checkpoint, of {name} {ours} in the state"
    if _canonical(saved.metadata) != _canonical(own.metadata):
        return f"a {saved.kind} of other metadata in the checkpoint: {saved.metadata!r:.100}"
    return None


def _compared(wrapping: Wrapping) -> Shape:
    """The strides that matter."""
    pairs = zip(wrapping.shape, wrapping.stride, strict=True)
    return () if 0 in wrapping.shape else tuple(stride if size > 1 else 0 for size, stride in pairs)


def _canonical(metadata: object) -> bytes:
    return strict_json.dump({"metadata": encode(metadata, WRAPPING)})


def rewrapped(value: Any) -> Any:
    """Puts tensors back into wrappers, wherever a dict holds a `Wrapping` that knows its wrapper."""
    if type(value) in (dict, OrderedDict):
        items = {key: rewrapped(item) for key, item in value.items()}
        wrapping = items.get(WRAPPING)
        if isinstance(wrapping, Wrapping) and wrapping.tensor is not None:
            return wrapping.around({key: part for key, part in items.items() if key != WRAPPING})
        return type(value)(items)
    if type(value) is list or type(value) is tuple:
        return type(value)(map(rewrapped, value))
    return value


def with_wrapper(saved: Wrapping, like: object, where: str) -> tuple[Wrapping, str | None]:
    """What was saved, with the wrapper to make it like; and what differs from that one."""
    if not is_wrapper(like):
        return saved, f"a {saved.kind} in the checkpoint, and none in the state to make it like"
    _, own = take_apart(like, where)
    return replace(saved, tensor=own.tensor), mismatch(saved, own)


def wrapping_of(stored: object) -> Wrapping:
    """Makes it again from what was stored of it, which is trusted in nothing."""
    if not isinstance(stored, Mapping) or stored.keys() != Wrapping("", "", (), (), None).stored().keys():
        raise ValueError("it lacks fields, or has others")
    shape, stride = (_sizes(stored[name]) for name in ("shape", "stride"))
    if type(stored["kind"]) is not str or type(stored["dtype"]) is not str or len(shape) != len(stride):
        raise ValueError("its fields do not fit together")
    return Wrapping(stored["kind"], stored["dtype"], shape, stride, stored["metadata"])


def _sizes(value: object) -> Shape:
    if type(value) is not list or any(type(size) is not int or size < 0 for size in value):
        raise ValueError(f"{str(value)[:60]} are no sizes")
    return tuple(value)
