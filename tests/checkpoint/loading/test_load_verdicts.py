"""What the leader makes of the reports of all ranks."""

from __future__ import annotations

import pytest

from dtruntime_torch.checkpoint.arguments import LoadOptions
from dtruntime_torch.checkpoint.loading.load_verdicts import MOST_LINES, decode, encode, judge, judge_surveys

DAMAGE = {"file": "f", "tensor": None, "start": 0, "stop": 1, "expected": "a", "actual": "b"}


def sound(**more: object) -> dict[str, object]:
    return {
        "kind": "sound",
        "differences": [],
        "missing": [],
        "unexpected": [],
        "in_place": False,
        "node": "one",
        "needs": [0, 0, 1, 0, 1],
        **more,
    }


def verdict(*reports: dict[str, object], strict: bool = True, is_committed: bool = True) -> dict[str, object]:
    return judge_surveys("step 1 of model", reports, LoadOptions(strict=strict), lambda: is_committed)


def test_a_report_comes_back_as_it_was():
    assert decode(encode(sound(missing=["ä"]))) == sound(missing=["ä"])


def test_what_failed_outranks_damage_and_names_its_ranks():
    failed = {"kind": "failed", "type": "StorageError", "message": "no disk"}
    found = judge(
        "step 1", [sound(), failed, {"kind": "damaged", "message": "m", "damage": []}], lambda: True
    )
    assert (found["verdict"], found["type"]) == ("failed", "StorageError")
    assert "rank 1: no disk" in found["message"]


def test_failures_of_two_kinds_are_none_of_both():
    reports = [{"kind": "failed", "type": kind, "message": "m"} for kind in ("StorageError", "")]
    assert judge("step 1", reports, lambda: True)["type"] == ""


def test_an_errno_that_all_failures_have_is_kept():
    one, other = (
        {"kind": "failed", "type": "StorageError", "message": "m", "errno": code} for code in (5, 13)
    )
    assert judge("step 1", [one, sound(), one], lambda: True)["errno"] == 5
    assert judge("step 1", [one, other], lambda: True)["errno"] is None


def test_who_gave_keys_is_not_told_to_give_some():
    differs = [sound(differences=["hed: a key that names nothing"])]
    found = judge_surveys("step 1", differs, LoadOptions(keys=("hed",)), lambda: True)
    assert "give keys" not in str(found["message"]) and "give keys" in str(verdict(*differs)["message"])


def test_damage_of_many_ranks_is_named_once():
    damaged = {"kind": "damaged", "message": "m", "damage": [DAMAGE]}
    found = judge("step 1", [damaged, sound(), damaged], lambda: True)
    assert (found["verdict"], found["damage"]) == ("older", [DAMAGE])


def test_what_a_prune_took_is_not_damaged():
    damaged = {"kind": "damaged", "message": "m", "damage": [DAMAGE]}
    assert judge("step 1", [damaged], lambda: False)["verdict"] == "again"


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_that_differ_are_an_error_in_any_case(strict):
    found = verdict(sound(differences=["a: checkpoint (2,), state (3,)"]), strict=strict)
    assert found["verdict"] == "differs" and "a: checkpoint" in str(found["message"])


def test_names_that_only_one_side_has_are_an_error_if_strict():
    found = verdict(sound(missing=["new"], unexpected=["old"]))
    assert found["verdict"] == "differs"
    assert "new: in the state, not in the checkpoint" in str(found["message"])
    assert "old: in the checkpoint, not in the state" in str(found["message"])


def test_names_that_only_one_side_has_are_returned_if_not_strict():
    found = verdict(
        sound(missing=["a", "b"], unexpected=["x", "y"]),
        sound(missing=["b", "c"], unexpected=["y", "z"]),
        strict=False,
    )
    assert (found["verdict"], found["missing"], found["unexpected"]) == ("go", ["a", "b", "c"], ["y"])


def test_a_line_names_the_ranks_where_only_some_have_it():
    found = verdict(sound(missing=["all", "one"]), sound(missing=["all"]), sound(missing=["all", "two"]))
    lines = str(found["message"]).splitlines()[1:]
    assert lines == [
        "  all: in the state, not in the checkpoint",
        "  one: in the state, not in the checkpoint (rank 0)",
        "  two: in the state, not in the checkpoint (rank 2)",
    ]


def test_a_long_list_is_cut():
    found = verdict(sound(differences=[f"t{n}: differs" for n in range(1000)]))
    lines = str(found["message"]).splitlines()
    assert len(lines) == 1 + MOST_LINES + 1 and lines[-1] == f"  and {1000 - MOST_LINES} more"


def test_ranks_of_a_node_that_need_the_same_are_told_once():
    found = verdict(sound(), sound(node="two"), sound(), sound(node="two", needs=[0, 1, 1, 0, 1]))
    assert found["nodes"] == [{"ranks": [0, 2], "needs": [[0, 0, 1, 0, 1]]}]


def test_ranks_that_need_some_in_common_are_told_all_needs():
    needs = [[0, 0, 1, 0, 1], [0, 0, 1, 0, 2], [0, 7, 1, 0, 1]]
    found = verdict(*(sound(needs=one) for one in needs))
    assert found["nodes"] == [{"ranks": [0, 1, 2], "needs": needs}]


def test_ranks_that_need_nothing_in_common_share_nothing():
    assert verdict(sound(), sound(needs=[0, 1, 1, 0, 1]))["nodes"] == []


@pytest.mark.parametrize(
    ("differences", "missing", "strict", "advised"),
    [
        ([], ["new"], True, True),
        (["a: checkpoint (2,), state (3,)"], [], True, False),
        (["a: checkpoint (2,), state (3,)"], ["new"], True, False),
        (["a: checkpoint (2,), state (3,)"], ["new"], False, False),
    ],
)
def test_what_would_not_help_is_not_advised(differences, missing, strict, advised):
    found = verdict(sound(differences=differences, missing=missing), strict=strict)
    assert found["verdict"] == "differs"
    assert ("strict=False" in str(found["message"])) == advised and "give keys" in str(found["message"])
