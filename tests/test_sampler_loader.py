"""`track` over real loaders: what was handed out is counted, what was only prefetched is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
)

from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.sampler import ElasticDistributedSampler

N = 50
MakeLoader = Callable[[ElasticDistributedSampler], "DataLoader[int]"]


class Numbers(Dataset[int]):
    """Sample `i` is `i`, so that a batch says which samples it holds."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return index  # or a list of them, where the sampler gives whole batches


def make(rank: int = 0, world_size: int = 2, **options: object) -> ElasticDistributedSampler:
    return ElasticDistributedSampler(Numbers(), world_size, rank, seed=3, **options)  # type: ignore[arg-type]


def plain(**options: object) -> MakeLoader:
    return lambda sampler: DataLoader(Numbers(), sampler=sampler, **options)  # type: ignore[arg-type]


def with_batch_sampler(**options: object) -> MakeLoader:
    return lambda sampler: DataLoader(
        Numbers(), batch_sampler=BatchSampler(sampler, 4, drop_last=False), **options  # type: ignore[arg-type]
    )


LOADERS: dict[str, MakeLoader] = {
    "plain": plain(batch_size=4),
    "one sample a batch": plain(),
    "one batch": plain(batch_size=100),
    "without batches": plain(batch_size=None),
    "batch sampler": with_batch_sampler(),
    "batch sampler as a sampler": lambda sampler: DataLoader(
        Numbers(), batch_size=None, sampler=BatchSampler(sampler, 4, drop_last=False)
    ),
    "worker": plain(batch_size=4, num_workers=1),
    "workers, prefetch": plain(batch_size=4, num_workers=2, prefetch_factor=4),
    "persistent workers": plain(batch_size=4, num_workers=2, persistent_workers=True),
    "workers, batch sampler": with_batch_sampler(num_workers=2),
    "workers, without batches": plain(batch_size=None, num_workers=2),
}


def samples(batch: torch.Tensor | list[int] | int) -> list[int]:
    return torch.as_tensor(batch).reshape(-1).tolist()


@pytest.fixture(params=LOADERS, ids=lambda name: str(name))
def make_loader(request: pytest.FixtureRequest) -> MakeLoader:
    return LOADERS[request.param]


def test_the_position_in_the_body_is_right_behind_the_batch(make_loader: MakeLoader) -> None:
    sampler = make()
    whole, seen = list(sampler), []
    for batch in sampler.track(make_loader(sampler)):
        seen += samples(batch)
        assert sampler.state_dict()["consumed"] == 2 * len(seen)
        assert sampler.remaining == len(whole) - len(seen)
    assert seen == whole


def test_a_pass_that_was_left_early_goes_on_behind_its_last_batch(make_loader: MakeLoader) -> None:
    sampler = make()
    loader = make_loader(sampler)
    whole, seen = list(sampler), []
    while sampler.remaining:
        for step, batch in enumerate(sampler.track(loader)):
            seen += samples(batch)
            if step == 4:
                break
    assert seen == whole


def test_a_state_from_the_body_resumes_in_another_sampler(make_loader: MakeLoader) -> None:
    sampler = make()
    batches = sampler.track(make_loader(sampler))
    seen = samples(next(batches))
    resumed = make()
    resumed.load_state_dict(sampler.state_dict())
    for batch in resumed.track(make_loader(resumed)):
        seen += samples(batch)
    assert seen == list(make())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_follow_each_other(workers: int, persistent: bool) -> None:
    sampler = make()
    loader = plain(batch_size=4, num_workers=workers, persistent_workers=persistent and workers > 0)(sampler)
    seen: dict[int, list[int]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(3):
            sampler.set_epoch(epoch)
            reference = list(sampler)
            seen[epoch] = [sample for batch in sampler.track(loader) for sample in samples(batch)]
            assert seen[epoch] == reference
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize(
    "make_batches", [plain(batch_size=4, drop_last=True), plain(batch_size=4, drop_last=False)]
)
def test_a_partial_last_batch_counts_what_it_holds(make_batches: MakeLoader) -> None:
    sampler = make()
    loader = make_batches(sampler)
    held = sum(len(batch) for batch in sampler.track(loader))
    assert held == (24 if loader.drop_last else 25)
    assert sampler.state_dict()["consumed"] == 2 * held


def test_padding_is_counted_as_consumed() -> None:
    sampler = make(world_size=4)
    assert sum(len(batch) for batch in sampler.track(plain(batch_size=4)(sampler))) == 13
    assert sampler.state_dict()["consumed"] == 52
    assert sampler.remaining == 0


def test_a_resized_run_serves_each_sample_once_in_the_reference_order() -> None:
    reference = list(make(world_size=1))
    state, seen = make().state_dict(), []
    for world_size, steps in [(2, 3), (3, 2), (1, 5), (4, 100)]:
        samplers = [make(rank, world_size) for rank in range(world_size)]
        for sampler in samplers:
            sampler.load_state_dict(state)
        tracks = [sampler.track(plain(batch_size=2)(sampler)) for sampler in samplers]
        for _, batches in zip(range(steps), zip(*tracks, strict=True), strict=False):
            seen += [sample for place in zip(*map(samples, batches), strict=True) for sample in place]
            state = samplers[-1].state_dict()
    assert seen == reference + reference[: len(seen) - N]
    assert len(seen) < N + 4


def test_with_the_same_global_batch_a_step_sees_the_same_samples() -> None:
    def steps(world_size: int) -> list[set[int]]:
        samplers = [make(rank, world_size) for rank in range(world_size)]
        tracks = [sampler.track(plain(batch_size=12 // world_size)(sampler)) for sampler in samplers]
        return [set().union(*map(samples, batches)) for batches in zip(*tracks, strict=True)]

    assert steps(1)[:-1] == steps(2)[:-1] == steps(3)[:-1] == steps(4)[:-1]
    assert steps(1)[-1] == steps(2)[-1]


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_finished_epoch_starts_over_as_stock_does_with_one_warning(drop_last: bool) -> None:
    sampler = make()
    loader = plain(batch_size=4, drop_last=drop_last)(sampler)
    first = [samples(batch) for batch in sampler.track(loader)]
    with pytest.warns(UserWarning, match="served again"):
        again = sampler.track(loader)
    second = [samples(next(again))]
    assert sampler.state_dict()["consumed"] == 8
    second += map(samples, again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.set_epoch(0)
        third = [samples(batch) for batch in sampler.track(loader)]
    assert first == second == third


def test_a_finished_epoch_starts_over_untracked_too_and_keeps_its_state() -> None:
    sampler = make()
    whole = list(sampler)
    list(sampler.track(plain(batch_size=4)(sampler)))
    with pytest.warns(UserWarning, match="served again"):
        assert list(sampler) == whole
    assert sampler.remaining == 0


def test_a_pass_left_at_its_last_batch_is_finished() -> None:
    sampler = make()
    loader = plain(batch_size=4)(sampler)
    for _ in sampler.track(loader):
        if sampler.remaining == 0:
            break
    with pytest.warns(UserWarning, match="served again"):
        assert len(list(sampler.track(loader))) == 7


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_state_of_the_very_end_yields_nothing_in_the_next_pass(drop_last: bool) -> None:
    sampler = make()
    list(sampler.track(plain(batch_size=4, drop_last=drop_last)(sampler)))
    resumed = make()
    resumed.load_state_dict(sampler.state_dict())
    loader = plain(batch_size=4, drop_last=drop_last)(resumed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(resumed.track(loader)) == []
        resumed.set_epoch(1)
        assert len(list(resumed.track(loader))) == (6 if drop_last else 7)


def test_iterating_without_tracking_counts_nothing() -> None:
    sampler = make()
    loader = plain(batch_size=4)(sampler)
    first, second = ([samples(batch) for batch in loader] for _ in range(2))
    assert first == second
    assert sampler.state_dict()["consumed"] == 0


@pytest.mark.parametrize("move", ["set_epoch", "load_state_dict", "track"])
def test_moving_the_sampler_in_the_body_is_refused(move: str) -> None:
    sampler = make()
    loader = plain(batch_size=4)(sampler)
    batches = sampler.track(loader)
    next(batches)
    if move == "set_epoch":
        sampler.set_epoch(1)
    elif move == "load_state_dict":
        sampler.load_state_dict(sampler.state_dict())
    else:
        sampler.track(loader)
    state = sampler.state_dict()
    with pytest.raises(InvalidArgument, match="moved"):
        next(batches)
    assert sampler.state_dict() == state


def test_set_epoch_of_the_same_epoch_in_the_body_is_all_right() -> None:
    sampler = make()
    for _ in sampler.track(plain(batch_size=4)(sampler)):
        sampler.set_epoch(0)
    assert sampler.remaining == 0


class Failing(Numbers):
    def __getitem__(self, index: int) -> int:
        if index % 10 == 0:
            raise KeyError(index)
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_fails_in_the_loader_is_not_counted(workers: int) -> None:
    sampler = make(shuffle=False, world_size=1)
    sampler.load_state_dict(sampler.state_dict() | {"consumed": 1})
    batches = sampler.track(DataLoader(Failing(), 3, sampler=sampler, num_workers=workers))
    for _ in range(3):
        next(batches)
    with pytest.raises(KeyError):
        next(batches)
    assert sampler.state_dict()["consumed"] == 10


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(N))


class Buckets(Sampler[list[int]]):
    """A batch sampler of its own over a sampler: no position says what it consumed."""

    def __init__(self, sampler: ElasticDistributedSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[index] for index in self.sampler])


class Sorted(BatchSampler):
    pass


REFUSED: dict[str, tuple[MakeLoader, str]] = {
    "no sampler": (lambda sampler: DataLoader(Numbers(), 4), "SequentialSampler"),
    "shuffle": (lambda sampler: DataLoader(Numbers(), 4, shuffle=True), "RandomSampler"),
    "another sampler": (lambda sampler: DataLoader(Numbers(), 4, sampler=make()), "another Elastic"),
    "stock": (lambda s: DataLoader(Numbers(), 4, sampler=DistributedSampler(Numbers(), 2, 0)), "Distributed"),
    "stream": (lambda sampler: DataLoader(Stream(), 4), "Infinite"),
    "stream without batches": (lambda sampler: DataLoader(Stream(), None), "Infinite"),
    "buckets": (lambda sampler: DataLoader(Numbers(), batch_sampler=Buckets(sampler)), "Buckets"),
    "subclass": (lambda sampler: DataLoader(Numbers(), batch_sampler=Sorted(sampler, 4, False)), "Sorted"),
    "batch sampler of another": (
        lambda sampler: DataLoader(
            Numbers(), batch_sampler=BatchSampler(SequentialSampler(Numbers()), 4, False)
        ),
        "SequentialSampler",
    ),
    "out of order": (plain(batch_size=4, num_workers=1, in_order=False), "in_order"),
    "list": (lambda sampler: [1, 2], "DataLoader itself, not list"),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_loader_that_does_not_draw_from_this_sampler_is_refused_at_the_call(case: str) -> None:
    sampler = make()
    build, named = REFUSED[case]
    before = sampler.state_dict()
    with pytest.raises(InvalidArgument, match=named):
        sampler.track(build(sampler))
    assert sampler.state_dict() == before


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loop_that_resumes_at_the_very_end_starts_over_after_one_empty_pass(drop_last):
    sampler = ElasticDistributedSampler(range(10), num_replicas=1, rank=0)
    loader = DataLoader(range(10), batch_size=4, drop_last=drop_last, sampler=sampler)  # type: ignore[var-annotated, arg-type]
    sampler.load_state_dict(sampler.state_dict() | {"consumed": 8 if drop_last else 10})  # type: ignore[arg-type]
    assert list(sampler.track(loader)) == []
    with pytest.warns(UserWarning, match="served again"):
        assert len(list(sampler.track(loader))) == (2 if drop_last else 3)
