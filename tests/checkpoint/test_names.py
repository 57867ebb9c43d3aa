from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtruntime_torch.checkpoint import names
from dtruntime_torch.checkpoint.names import MAX_INTEGER, Attempt, CommitKey
from dtruntime_torch.errors import InvalidArgument

NUMBERS = st.sampled_from([0, 1, 9999, 10000, 99_999_999, 100_000_000, MAX_INTEGER]) | st.integers(
    0, MAX_INTEGER
)


def test_paths_are_those_of_the_design():
    assert names.commit_path("model", CommitKey(7, 100)) == "model/commits/0007-00000100.json"
    assert names.generation_path("model", 7) == "model/generations/0007.json"
    assert names.attempt_path("model", Attempt(7, 100, 1)) == "model/step-00000100/0007-1"
    assert names.shard_file_name(0, 2, ".safetensors") == "shard-00000-of-00002.safetensors"


@given(NUMBERS, NUMBERS)
def test_a_commit_path_is_read_back(generation, step):
    key = CommitKey(generation, step)
    assert names.parse_commit(names.commit_path("a.b-C_1", key)) == key


@given(NUMBERS)
def test_a_generation_path_is_read_back(generation):
    assert names.parse_generation(names.generation_path("model", generation)) == generation


@given(NUMBERS, NUMBERS, NUMBERS)
def test_an_attempt_path_is_read_back(generation, step, number):
    attempt = Attempt(generation, step, number)
    assert names.parse_attempt(attempt.path) == attempt


@given(NUMBERS, NUMBERS)
def test_a_shard_file_name_is_read_back(a, b):
    rank, world_size = sorted((a, b))
    read = names.parse_shard_file(names.shard_file_name(rank, world_size, ".json"))
    assert read == ((rank, world_size, ".json") if rank < world_size else None)


def test_commits_are_ordered_by_generation_and_then_by_step_as_integers():
    paths = [
        "model/commits/0007-100000000.json",
        "model/commits/0007-99999999.json",
        "model/commits/0008-00000001.json",
    ]
    keys = sorted(key for key in map(names.parse_commit, paths) if key is not None)
    assert keys == [(7, 99_999_999), (7, 100_000_000), (8, 1)]


@pytest.mark.parametrize(
    "path",
    [
        "model/commits/7-100.json",
        "model/commits/00007-00000100.json",
        "model/commits/0007-000000100.json",
        "model/commits/0007-00000100.json.tmp",
        "model/commits/0007-00000100.json\n",
        "model/commits/.0007-00000100.json",
        "model/commits/x/0007-00000100.json",
        "x/model/commits/0007-00000100.json",
        "../commits/0007-00000100.json",
        "/commits/0007-00000100.json",
        "model/commits/0007-0000010\u0660.json",
        "model/commits/0007-9007199254740992.json",
        "model/commits/0007-" + "9" * 5000 + ".json",
        "model/generations/0007.json",
        "",
    ],
)
def test_what_only_resembles_a_commit_is_none(path):
    assert names.parse_commit(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "model/generations/7.json",
        "model/generations/00007.json",
        "model/generations/0007.json/",
        "generations/0007.json",
    ],
)
def test_what_only_resembles_a_generation_is_none(path):
    assert names.parse_generation(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "step-00000100/0007-01",
        "step-00000100/0007",
        "step-100/0007-1",
        "step-00000100/../0007-1",
        "/step-00000100/0007-1",
    ],
)
def test_what_only_resembles_an_attempt_is_none(path):
    assert names.parse_attempt(path) is None


@pytest.mark.parametrize(
    "file_name",
    [
        "shard-0-of-2.json",
        "shard-00002-of-00002.json",
        "shard-00000-of-00002",
        "shard-00000-of-00002.json\n",
        "../shard-00000-of-00002.json",
    ],
)
def test_what_only_resembles_a_shard_file_is_none(file_name):
    assert names.parse_shard_file(file_name) is None


@pytest.mark.parametrize("name", ["a", "A.b-c_9", "x" * 100, "-", "a."])
def test_a_name_may_be(name):
    assert names.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a\\b", "a b", "ä", "a\n", "x" * 101, None, 7])
def test_a_name_may_not_be(name):
    with pytest.raises(InvalidArgument, match="checkpoint name"):
        names.check_name(name)


@pytest.mark.parametrize("key", [CommitKey(-1, 0), CommitKey(0, -1), CommitKey(0, MAX_INTEGER + 1)])
def test_a_number_that_no_path_can_hold_is_an_error(key):
    with pytest.raises(InvalidArgument, match="part of a path"):
        names.commit_path("model", key)
