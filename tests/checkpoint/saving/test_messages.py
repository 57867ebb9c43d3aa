"""What ranks tell each other of a save comes out of the Store as it went in."""

from __future__ import annotations

import dataclasses

import pytest

from dtruntime_torch.checkpoint.info import CheckpointInfo
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.checkpoint.saving.messages import Answer, Arrival
from tests.checkpoint.record_builders import ATTEMPT, SHA, sample_manifest

ARRIVALS = [
    Arrival(sample_manifest().parts[1], 90, 16, 2, 200, (ATTEMPT,), SHA),
    Arrival.failed(OSError("no space"), passing=True),
]
ANSWERS = [
    Answer("committed", info=CheckpointInfo.of(sample_manifest(), SHA), full_next=True),
    Answer("committed", info=CheckpointInfo.of(dataclasses.replace(sample_manifest(), parent=None), SHA)),
    Answer("again", "no space", attempt=Attempt(7, 100, 2), delay=0.5),
]


@pytest.mark.parametrize("arrival", ARRIVALS)
def test_an_arrival_comes_back_equal(arrival):
    assert Arrival.decode(arrival.encode()) == arrival


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_comes_back_equal_in_every_field(answer):
    decoded = Answer.decode(answer.encode())
    # Two infos of one checkpoint are equal whatever their fields say; their reprs leave the parts out.
    assert dataclasses.asdict(decoded) == dataclasses.asdict(answer)
    assert repr(decoded) == repr(answer)
    assert type(decoded.info) is type(answer.info)
    if answer.info is not None:
        assert decoded.info.parts == answer.info.parts
