"""What a suspended coroutine will do next, as a value: two that are equal go on alike for equal answers.

That is all that its frames hold, locals and evaluation stacks alike, down the chain of awaits. So a walk over all
interleavings knows a process by this and not by its history, and comes to each state once however it was reached.
What is unknown here raises: nothing is left out silently.
"""

from __future__ import annotations

import gc
import logging
import types
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, types.CodeType, types.ModuleType)
_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_SUSPENDED = (types.CoroutineType, types.GeneratorType)


async def _nothing() -> None:
    return None


_started = _nothing()
_AWAITS = type(_started.__await__())
_started.close()


def fingerprint(root: object) -> Hashable:
    """A hashable value that holds all that `root` reaches."""
    return _Freeze().of(root)


class _Freeze:
    """One pass over a graph of objects. An object met again is the number of its first meeting."""

    def __init__(self) -> None:
        self._met: dict[int, int] = {}
        self._kept: list[object] = []  # so that no id is used twice

    def of(self, value: object) -> Hashable:
        if isinstance(value, (*_PLAIN, Enum)):
            return (type(value), value)
        if isinstance(value, _BUILTIN):
            return (type(value), value.__qualname__, self.of(getattr(value, "__self__", None)))
        if isinstance(value, tuple):
            return (type(value), *map(self.of, value))
        if id(value) in self._met:
            return ("met", self._met[id(value)])
        self._met[id(value)] = len(self._met)
        self._kept.append(value)
        return (type(value), self._inside(value))

    def _inside(self, value: object) -> Hashable:
        if isinstance(value, (list, bytearray)):
            return tuple(map(self.of, value))
        if isinstance(value, (set, frozenset)):
            return frozenset(_Freeze().of(item) for item in value)
        if isinstance(value, dict):
            return tuple((self.of(key), self.of(item)) for key, item in value.items())
        if isinstance(value, _SUSPENDED):
            return self._suspended(value)
        if isinstance(value, _AWAITS):
            return tuple(map(self.of, gc.get_referents(value)))
        if isinstance(value, types.FunctionType):
            cells = value.__closure__ or ()
            return (value.__code__, self.of(value.__defaults__), *map(self._cell, cells))
        if isinstance(value, types.MethodType):
            return (self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, types.CellType):
            return self._cell(value)
        if isinstance(value, memoryview):
            return bytes(value)
        if isinstance(value, partial):
            return (self.of(value.func), self.of(value.args), self.of(value.keywords))
        if isinstance(value, BaseException):
            return tuple(map(self.of, (value.args, vars(value), value.__cause__, value.__context__)))
        if isinstance(value, types.TracebackType):
            return "a traceback"  # it is shown, not acted on
        if isinstance(value, logging.Logger):
            return value.name
        if is_dataclass(value):
            return tuple(self.of(getattr(value, field.name)) for field in fields(value))
        return self._object(value)

    def _object(self, value: object) -> Hashable:
        if type(value).__module__ == "builtins":
            return self.of(value.__reduce__())  # iterators: what is left of them
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        if not hasattr(value, "__dict__") and not slots:
            raise TypeError(f"what a {type(value).__qualname__} holds is not known")
        held = {**getattr(value, "__dict__", {}), **{n: getattr(value, n, None) for n in slots}}
        return tuple((name, self.of(item)) for name, item in held.items())

    def _suspended(self, value: types.CoroutineType | types.GeneratorType) -> Hashable:
        frame = value.cr_frame if isinstance(value, types.CoroutineType) else value.gi_frame
        if frame is None:
            return "ended"
        code = frame.f_code
        # All but the function whose frame it is: its code is there already.
        held = [item for item in _held(value) if getattr(item, "__code__", None) is not code]
        return (code, frame.f_lasti, *map(self.of, held), self.of(frame.f_locals))

    def _cell(self, cell: types.CellType) -> Hashable:
        try:
            return self.of(cell.cell_contents)
        except ValueError:
            return "empty"


def _held(suspended: object) -> list[object]:
    """What the frame refers to; whether it does so itself or by a frame object depends on the Python version."""
    found = gc.get_referents(suspended)
    frames = [item for item in found if isinstance(item, types.FrameType)]
    found += [item for frame in frames for item in gc.get_referents(frame)]
    apart = [(id(frame.f_globals), id(frame.f_builtins)) for frame in frames]
    skipped = {id(frame) for frame in frames}.union(*apart)
    return [item for item in found if id(item) not in skipped]
