"""Names of parameters: without the prefixes of wrappers, as torch.distributed.checkpoint gives them.

A checkpoint of a compiled, data-parallel model then fits the plain one. Optimizers know their parameters by
position; here they get the names of the modules that are saved beside them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from dtruntime_torch.errors import InvalidArgument, UnsupportedType

_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."


class _Naming(NamedTuple):
    """The names of an optimizer's parameters, and of which objects they hold."""

    parameters: tuple[weakref.ref[torch.Tensor], ...]
    modules: tuple[tuple[str, weakref.ref[torch.nn.Module]], ...]
    names: tuple[str, ...]

    def holds(self, parameters: Sequence[torch.Tensor], modules: Mapping[str, torch.nn.Module]) -> bool:
        return (
            len(self.parameters) == len(parameters)
            and len(self.modules) == len(modules)
            and all(
                known() is parameter for known, parameter in zip(self.parameters, parameters, strict=True)
            )
            and all(
                key == known_key and known() is module
                for (known_key, known), (key, module) in zip(self.modules, modules.items(), strict=True)
            )
        )


_namings: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Naming] = weakref.WeakKeyDictionary()


class NameCleaner:
    """Takes what DDP, torch.compile and activation checkpointing add out of the names in `module.state_dict()`.

    To be made anew for each state, in which the names of a module's tensors follow each other.

    Args:
        module: the root.

    Example:
        >>> from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
        >>> wrapped = torch.nn.Sequential(checkpoint_wrapper(torch.nn.Linear(1, 1)))
        >>> NameCleaner(wrapped)("0._checkpoint_wrapped_module.weight")
        '0.weight'
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._root = _Owner(module, "", _child_of_wrapper(module))
        self._owners: dict[str, _Owner] = {}

    def __call__(self, name: str) -> str:
        """Cleans the name of a parameter, a buffer or an extra state."""
        if _CHECKPOINT_WRAPPER in name:
            name = name.replace(_CHECKPOINT_WRAPPER, "")
        before, dot, last = name.rpartition(".")
        owner = self._owner(before) if dot else self._root
        return owner.prefix[:-1] if last == owner.left_out else owner.prefix + last

    def _owner(self, name: str) -> _Owner:
        known = self._owners.get(name)
        if known is None:
            before, dot, last = name.rpartition(".")
            above = self._owner(before) if dot else self._root
            module = getattr(above.module, last, None)
            prefix = above.prefix if last == above.left_out else f"{above.prefix}{last}."
            known = self._owners[name] = _Owner(module, prefix, _child_of_wrapper(module))
        return known


class _Owner(NamedTuple):
    """What a name leads through: the cleaned name of it with a dot, and the name of its child that is left out."""

    module: object
    prefix: str
    left_out: str | None


def _child_of_wrapper(module: object) -> str | None:
    if isinstance(module, DistributedDataParallel):
        return "module"
    # Only who compiles has imported this, which takes seconds.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if compiler is not None and isinstance(module, compiler.OptimizedModule) else None


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters in the order in which `optimizer.state_dict()` numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def parameter_names(
    optimizer: torch.optim.Optimizer, modules: Mapping[str, torch.nn.Module], where: str
) -> tuple[str, ...]:
    """Names an optimizer's parameters; made once and remembered for as long as the optimizer lives.

    Args:
        optimizer: whose parameters.
        modules: the modules of the state, by their names there.
        where: name of the optimizer in the state, for the error.

    Returns:
        The names, in the order of `parameters_of`: as in the module, if one module holds them all (the first
        that does), else behind the name of the first module that holds the parameter.

    Raises:
        InvalidArgument: no module holds a parameter.
    """
    parameters = parameters_of(optimizer)
    known = _namings.get(optimizer)
    if known is None or not known.holds(parameters, modules):
        known = _Naming(
            tuple(map(weakref.ref, parameters)),
            tuple((key, weakref.ref(module)) for key, module in modules.items()),
            _find_names(parameters, modules, where),
        )
        _namings[optimizer] = known
    return known.names


def _find_names(
    parameters: Sequence[torch.Tensor], modules: Mapping[str, torch.nn.Module], where: str
) -> tuple[str, ...]:
    names_in = {key: _names_in(module) for key, module in modules.items()}
    for names in names_in.values():
        if all(id(parameter) in names for parameter in parameters):
            return tuple(names[id(parameter)] for parameter in parameters)
    found = []
    for i, parameter in enumerate(parameters):
        holder = next((key for key, names in names_in.items() if id(parameter) in names), None)
        if holder is None:
            raise InvalidArgument(
                f"{where}: no module of the state holds the optimizer's parameter {i}, of shape "
                f"{list(parameter.shape)}, so that it has no name; pass its module too, or pass "
                f"optimizer.state_dict() instead of the optimizer"
            )
        found.append(f"{holder}.{names_in[holder][id(parameter)]}")
    return tuple(found)


def _names_in(module: torch.nn.Module) -> dict[int, str]:
    clean = NameCleaner(module)
    return {id(parameter): clean(name) for name, parameter in module.named_parameters()}


def named_state(optimizer: torch.optim.Optimizer, names: Sequence[str], where: str) -> dict[str, Any]:
    """An optimizer's state with names in place of numbers, as `get_optimizer_state_dict` of DCP shapes it.

    Args:
        optimizer: of which nothing is changed, and no step taken.
        names: of its parameters, as `parameter_names` gave them.
        where: name of the optimizer in the state, for the error.

    Returns:
        `{"state": {name: {...}}, "param_groups": [{..., "params": [name, ...]}]}`

    Raises:
        UnsupportedType: the optimizer keeps something beside these two, or under a key that has no name.
    """
    numbered = optimizer.state_dict()
    if numbered.keys() != {"state", "param_groups"}:
        more = sorted(str(key) for key in numbered.keys() - {"state", "param_groups"})
        raise UnsupportedType(
            f"{where}: the state of {type(optimizer).__qualname__} holds {more} beside 'state' and "
            f"'param_groups'; pass an object whose state_dict and load_state_dict call the optimizer's"
        )
    state = {_name(key, names, where): value for key, value in numbered["state"].items()}
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in numbered["param_groups"]]
    return {"state": state, "param_groups": groups}


def _name(key: object, names: Sequence[str], where: str) -> str:
    if type(key) is int and 0 <= key < len(names):
        return names[key]
    if type(key) is str:  # kept beside the state of the parameters
        return key
    raise UnsupportedType(
        f"{where}: the key {key!r} in the optimizer's state is neither a parameter nor a str"
    )
