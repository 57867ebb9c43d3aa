"""A checkpoint into the values, dicts and stateful objects of a state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import lr_scheduler

from dtruntime_torch.checkpoint.flatten import PerRank, flatten_state
from dtruntime_torch.checkpoint.loading.targets import bind_targets
from dtruntime_torch.errors import InvalidArgument
from tests.checkpoint.memory_checkpoint import checkpoint_of, differences, exact, load, same_bits, save

DTYPES = [
    "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64 complex32 complex64 "
    "complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
][0].split()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 2), (3, 4)], ids=str)
def test_a_tensor_of_a_dict_is_filled_in_place(dtype, shape):
    size = torch.zeros((), dtype=getattr(torch, dtype)).element_size()
    bits = torch.randint(0, 2 if dtype == "bool" else 256, (*shape, size), dtype=torch.uint8)
    tensor = bits.view(getattr(torch, dtype)).view(shape)
    target = torch.zeros(shape, dtype=tensor.dtype)
    state = {"a": {"t": target}}
    load(save({"a": {"t": tensor}}), state)
    assert state["a"]["t"] is target
    assert same_bits(target, tensor)


def test_a_strided_tensor_is_filled_where_it_lies():
    base = torch.zeros(4, 6)
    tensor = torch.randn(3, 4)
    load(save({"t": tensor}), {"t": base[:, ::2].t()})
    assert torch.equal(base[:, ::2].t(), tensor)
    assert not base[:, 1::2].any()


def test_a_parameter_is_filled_though_it_wants_a_gradient():
    parameter = torch.nn.Parameter(torch.zeros(3))
    load(save({"p": torch.ones(3)}), {"p": parameter})
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert parameter.requires_grad


def test_a_conjugated_view_is_filled():
    base = torch.zeros(3, dtype=torch.complex64)
    tensor = torch.randn(3, dtype=torch.complex64)
    load(save({"t": tensor}), {"t": base.conj()})
    assert torch.equal(base.conj(), tensor)


def test_values_are_set_in_the_user_s_containers():
    saved = {
        "n": 1,
        "b": b"abc",
        "d": {"f": 0.5, "l": [1, 2]},
        "l": [torch.ones(1), 3],
        "t": (torch.ones(1), 4, b"x"),
        "k": {7: torch.ones(1), 8: None},
    }
    state = {
        "n": 0,
        "b": b"",
        "d": {"f": 0.0, "l": []},
        "l": [torch.zeros(1), 0],
        "t": (torch.zeros(1), 0, b""),
        "k": {7: torch.zeros(1), 8: 3},
    }
    inner, tensors = state["d"], (state["l"][0], state["t"][0])
    load(save(saved), state)
    assert exact(state) == exact(saved)
    assert state["d"] is inner
    assert (state["l"][0] is tensors[0], state["t"][0] is tensors[1]) == (True, True)


def test_a_value_takes_whatever_lies_under_its_name():
    saved = {
        "history": {"loss": [1.0], "best": {"t": torch.ones(2)}},
        "queue": [torch.ones(1)],
        "x": b"abc",
        "y": 3,
    }
    state = {"history": {}, "queue": None, "x": 0, "y": b"old"}
    load(save(saved), state)
    assert exact(state) == exact(saved)


def test_what_was_tied_is_tied_in_a_value():
    shared = torch.ones(2)
    state: dict[str, list[torch.Tensor]] = {"x": []}
    load(save({"x": [shared, shared]}), state)
    assert state["x"][0] is state["x"][1]


def test_loaded_values_are_not_the_checkpoint_s_memory():
    # `load` overwrites what it read from.
    state = {"x": None}
    load(save({"x": [torch.ones(2)]}), state)
    assert torch.equal(state["x"][0], torch.ones(2))


class Box:
    """Stateful; takes what it is given."""

    def __init__(self, state: object) -> None:
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.parametrize(
    "saved",
    [
        {"a": 1, "t": torch.ones(3)},
        {},
        [torch.ones(1), 2],
        torch.ones(2),
        5,
        b"abc",
        {1: {"x": torch.ones(1)}},
    ],
    ids=lambda s: str(s)[:20],
)
@pytest.mark.parametrize(
    "current", [{}, {"a": 2, "t": torch.zeros(2), "more": 1}, None], ids=["empty", "other", "none"]
)
def test_a_stateful_object_gets_its_state_as_it_was(saved, current):
    box = Box(current)
    load(save({"deep": {"box": Box(copy.deepcopy(saved))}}), {"deep": {"box": box}})
    assert exact(box.state) == exact(saved)


def test_ties_within_a_stateful_object_are_kept():
    shared, box = torch.ones(2), Box({})
    load(save({"box": Box({"a": shared, "b": [shared]})}), {"box": box})
    assert box.state["a"] is box.state["b"][0]


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 3]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 2)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


def steps(optimizer: torch.optim.Optimizer, scheduler: object, count: int) -> list[float]:
    rates = []
    for _ in range(count):
        optimizer.step()
        scheduler.step(*[1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])  # type: ignore[attr-defined]
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("scheduler_first", [False, True], ids=["optimizer first", "scheduler first"])
def test_a_scheduler_goes_on_with_its_optimizer(kind, tensor_lr, scheduler_first):
    def make():
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=torch.tensor(0.1) if tensor_lr else 0.1, momentum=0.9
        )
        scheduler = SCHEDULERS[kind](optimizer)
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        return optimizer, scheduler, dict(reversed(state.items())) if scheduler_first else state

    optimizer, scheduler, state = make()
    steps(optimizer, scheduler, 3)
    checkpoint = save(state)
    checkpoint.tensors = {fqn: tensor.clone() for fqn, tensor in checkpoint.tensors.items()}
    expected = steps(optimizer, scheduler, 5)
    optimizer, scheduler, fresh = make()
    load(checkpoint, fresh)
    assert steps(optimizer, scheduler, 5) == expected


def test_a_counter_stays_one():
    optimizer = torch.optim.SGD([torch.zeros(1)])
    saved, fresh = (lr_scheduler.MultiStepLR(optimizer, [2, 3]) for _ in range(2))
    load(save({"s": saved}), {"s": fresh})
    assert list(fresh.milestones.elements()) == [2, 3]


def test_all_differences_are_listed():
    saved = {
        "a": torch.ones(2),
        "b": 1,
        "c": {"d": torch.ones(1), "old": 2},
        "e": b"x",
        "gone": Box({"x": 1, "y": 2}),
    }
    state = {
        "a": torch.ones(3),
        "b": torch.ones(1),
        "c": {"d": 0, "new": 1},
        "e": torch.ones(1),
        "box": Box({}),
    }
    assert differences(save(saved), state) == [
        "a: checkpoint (2,) float32, state (3,) float32",
        "b: checkpoint no tensor, state (1,) float32",
        "e: checkpoint no tensor, state (1,) float32",
        "c.new: in the state, not in the checkpoint",
        "box: in the state, not in the checkpoint",
        "c.old: in the checkpoint, not in the state",
        "gone.x: in the checkpoint, not in the state",
        "gone.y: in the checkpoint, not in the state",
    ]


def test_comparing_changes_nothing():
    state = {"a": torch.zeros(2), "b": 1, "c": Box({"n": 1})}
    before = exact({**state, "c": state["c"].state})
    differences(save({"a": torch.ones(2), "b": 2, "c": Box({"n": 2})}), state)
    assert exact({**state, "c": state["c"].state}) == before


def test_names_are_compared_and_not_paths():
    state = {"a.b": torch.zeros(1), "c": {"0": torch.zeros(1)}}
    load(save({"a": {"b": torch.ones(1)}, "c": [torch.ones(1)]}), state)
    assert exact(state) == exact({"a.b": torch.ones(1), "c": {"0": torch.ones(1)}})


def test_of_several_names_the_longest_takes_a_leaf():
    assert differences(save({"a": {"b": 2}}), {"a": None, "a.b": 0}) == [
        "a: in the state, not in the checkpoint"
    ]


def test_a_rank_that_the_checkpoint_does_not_know_keeps_its_own():
    def state(rank):
        return {
            "n": 1,
            "own": PerRank({"r": rank, "t": torch.full((1,), rank)}),
            "box": PerRank(Box({"r": rank})),
        }

    flats = [flatten_state(state(rank), rank) for rank in range(2)]
    known, unknown = state(7), state(8)
    load(checkpoint_of(*flats, rank=1), known)
    load(checkpoint_of(*flats, rank=2), unknown)
    assert (known["own"].value, known["box"].value.state) == ({"r": 1, "t": torch.ones(1)}, {"r": 1})
    assert (unknown["own"].value["r"], unknown["box"].value.state) == (8, {"r": 8})


def test_a_per_rank_value_is_set_in_its_mark():
    own = PerRank(3)
    load(save({"own": PerRank(4)}), {"own": own})
    assert own.value == 4


def test_targets_fill_from_the_last_checkpoint_that_they_saw():
    state = {"n": 0, "t": torch.zeros(1)}
    targets = bind_targets(state)
    older, newer = save({"n": 1, "t": torch.ones(1)}), save({"n": 2, "other": 3})
    assert targets.want(newer.saved).missing
    targets.apply(*older.read(targets.want(older.saved)))
    assert state == {"n": 1, "t": torch.ones(1)}


def test_modules_are_filled_before_what_follows_them():
    model = torch.nn.Linear(1, 1, bias=False)

    class Watcher(Box):
        def load_state_dict(self, state):
            self.state = float(model.weight)

    watcher = Watcher({})
    load(save({"w": Watcher({"x": 1}), "m": {"weight": torch.full((1, 1), 5.0)}}), {"w": watcher, "m": model})
    assert watcher.state == 5


def test_bytes_cannot_be_filled():
    with pytest.raises(InvalidArgument, match="load_checkpoint"):
        bind_targets(b"abc")


def test_an_empty_state_takes_nothing():
    load(save({}), {})
    assert differences(save({"a": 1}), {}) == ["a: in the checkpoint, not in the state"]


def test_two_places_of_one_name_are_refused():
    with pytest.raises(InvalidArgument, match=r"'a\.b': \['a\.b'\] and \['a'\]\['b'\]"):
        bind_targets({"a.b": 1, "a": {"b": 2}})
