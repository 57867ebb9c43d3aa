"""The checks of `examples/kill_and_resume.py` notice what they are there for; `make demo` runs the script itself."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("kill_and_resume", EXAMPLES / "kill_and_resume.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def steps(demo: ModuleType) -> dict[int, object]:
    """Two epochs of six samples and a half, two samples a step, on two ranks."""
    order = [3, 0, 5, 1, 4, 2, 5, 4, 0, 2, 1, 3, 0, 1]
    return {i + 1: demo.Step(i // 3, tuple(order[2 * i : 2 * i + 2]), (i, i + 0.5)) for i in range(7)}


def write_record(folder: Path, *ranks: list[dict[str, object]]) -> Path:
    for rank, lines in enumerate(ranks):
        (folder / f"rank-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(step: int, *samples: int) -> dict[str, object]:
    return {
        "step": step,
        "epoch": 0,
        "loss": 1.5,
        "samples": samples,
        "called": 0.1,
        "waited": 0.2,
        "seconds": float(step),
    }


def test_equal_runs_hold(demo: ModuleType, steps: dict[int, object]) -> None:
    assert demo.compare_samples(steps, dict(steps), 6).holds
    assert demo.compare_losses(steps, dict(steps)).holds
    assert demo.compare_resized(steps, {6: steps[6], 7: steps[7]}, 5, 4).holds


@pytest.mark.parametrize(
    "samples", [(0, 3), (3, 3), (3, 5), (3,), ()], ids=["swapped", "twice", "early", "missing", "none"]
)
def test_other_samples_in_one_step_are_noticed(demo: ModuleType, steps: dict[int, object], samples) -> None:
    other = {**steps, 1: steps[1]._replace(samples=samples)}  # type: ignore[attr-defined]
    assert demo.compare_samples(steps, other, 6).holds is False
    assert demo.compare_resized(steps, other, 0, 4).holds is False


def test_a_sample_that_both_runs_repeat_is_noticed(demo: ModuleType, steps: dict[int, object]) -> None:
    for number in (1, 7):
        both = {**steps, number: steps[number]._replace(samples=(3, 3))}  # type: ignore[attr-defined]
        assert demo.compare_samples(both, both, 6).holds is False


def test_a_step_that_is_lost_is_noticed(demo: ModuleType, steps: dict[int, object]) -> None:
    for number in (1, 4, 7):
        other = {i: step for i, step in steps.items() if i != number}
        assert demo.compare_samples(steps, other, 6).holds is False
        assert demo.compare_losses(steps, other).holds is False
    assert demo.compare_resized(steps, {7: steps[7]}, 5, 4).holds is False


def test_another_epoch_number_is_noticed(demo: ModuleType, steps: dict[int, object]) -> None:
    other = {**steps, 7: steps[7]._replace(epoch=5)}  # type: ignore[attr-defined]
    assert demo.compare_samples(steps, other, 6).holds is False


def test_another_loss_on_one_rank_is_noticed(demo: ModuleType, steps: dict[int, object]) -> None:
    other = {**steps, 5: steps[5]._replace(losses=(4, 4.500001))}  # type: ignore[attr-defined]
    row = demo.compare_losses(steps, other)
    assert (row.holds, row.found) == (False, "first differs at step 5")


@pytest.mark.parametrize(("a", "c"), [("xx", "xy"), ("xx", "yy"), ("xx", "x"), ("", "")])
def test_other_final_weights_are_noticed(demo: ModuleType, a: str, c: str) -> None:
    runs = [demo.Run({}, tuple(weights), demo.Clock(0.0, 0.0, 1.0, 1.0)) for weights in (a, c)]
    assert demo.compare_weights(*runs).holds is False


def test_a_record_puts_the_samples_into_the_global_order(demo: ModuleType, tmp_path: Path) -> None:
    run = demo.read_run(write_record(tmp_path, [line(4, 0, 2)], [line(4, 1, 3)]), 2)
    assert run.steps == {4: demo.Step(0, (0, 1, 2, 3), (1.5, 1.5))}


def test_a_record_that_was_cut_off_counts_up_to_the_last_step_of_all_ranks(
    demo: ModuleType, tmp_path: Path
) -> None:
    write_record(tmp_path, [line(1, 0), line(2, 2), line(3, 4)], [line(1, 1), line(2, 3)])
    with (tmp_path / "rank-1.jsonl").open("a") as file:
        file.write(json.dumps(line(3, 5))[:20])
    assert list(demo.read_run(tmp_path, 2).steps) == [1, 2]


@pytest.mark.parametrize("second", [[1, 3], [2, 3], [1, 1]], ids=["gap", "other step", "twice"])
def test_a_record_with_steps_out_of_turn_is_refused(
    demo: ModuleType, tmp_path: Path, second: list[int]
) -> None:
    write_record(tmp_path, [line(1, 0), line(2, 2)], [line(step, 1) for step in second])
    with pytest.raises(demo.PhaseFailed, match="out of turn"):
        demo.read_run(tmp_path, 2)


def test_a_process_in_a_session_of_its_own_is_found_by_its_mark(demo: ModuleType) -> None:
    code = "import subprocess as s; print(s.Popen(['sleep', '60'], stdout=2, start_new_session=True).pid)"
    launcher = [sys.executable, "-c", code]
    result = subprocess.run(launcher, env={demo.MARK: "test-mark"}, stdout=subprocess.PIPE, check=True)
    orphan = int(result.stdout)
    assert demo.marked_processes("test-mark") == [orphan]
    demo.os.kill(orphan, demo.signal.SIGKILL)


def test_the_loss_curve_shows_where_the_run_was_resumed(demo: ModuleType) -> None:
    steps = {i: demo.Step(0, (), (10.0 - i / 10,)) for i in range(1, 81)}
    text = demo.draw(steps, 40)
    assert text.index("|") - text.index("█") == 20
    assert (text[:5], text[-5:]) == ("9.90 ", " 2.00")


def test_the_stall_tells_calls_from_steps_that_waited(demo: ModuleType, tmp_path: Path) -> None:
    run = demo.read_run(write_record(tmp_path, [line(1, 0), line(2, 2), line(3, 4)]), 1)
    assert (
        demo.tell_stall(run, run).found
        == "0.60 of 6.0 s, 10.0%: 0.20 s in calls, 0.40 s in steps that waited"
    )


def test_the_pace_leaves_out_the_first_step_of_a_run(demo: ModuleType) -> None:
    steps = dict.fromkeys(range(4))
    slow, fast = (demo.Run(steps, (), demo.Clock(0.0, 0.0, 9.0, seconds)) for seconds in (0.33, 0.3))
    assert demo.tell_pace(fast, slow, slow).found == "110 ms, without saves 100 ms: +10.0%"
