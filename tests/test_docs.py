"""The documentation says what is there: its examples run, and what it names exists."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dtruntime_torch as dt

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path for pattern in ("*.md", ".github/*.md", "csrc/*.md", "docs/**/*.md") for path in ROOT.glob(pattern)
)
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "dtruntime_torch").rglob("*.py")
    if path.name != "__main__.py"
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def code(page: Path) -> str:
    """All that a page shows as code, in lines and in blocks."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*blocks, *lines])


def anchors(page: Path) -> set[str]:
    """The names that links may use after "#", as GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The files and anchors of this repository that a page links to."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            file, _, anchor = target.partition("#")
            yield (page.parent / file if file else page), anchor


@pytest.mark.usefixtures("own_codecs")
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


@pytest.mark.parametrize("name", sorted(dt.__all__))
def test_every_public_name_is_there_and_explained(name):
    if name != "__version__":
        assert getattr(dt, name).__doc__


def test_the_example_of_the_readme_trains_saves_and_resumes(tmp_path):
    (example,) = code_blocks(ROOT / "README.md", "python")
    assert len(ast.unparse(ast.parse(example)).splitlines()) <= 25
    (tmp_path / "example.py").write_text(example)
    for _ in range(2):
        subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True, timeout=120)
    with dt.CheckpointManager(tmp_path / "checkpoints") as manager:
        assert manager.latest() is not None
        assert manager.verify().ok


Names = dict[str, Any]  # what an example is given and what it assigns


def tells_how_a_save_went(names: Names) -> None:
    assert names["handle"].staged() and names["handle"].result().step == 900


def saves_only_what_changed(names: Names) -> None:
    saved = [names["manager"].save(names["state"], step) for step in (900, 901)]
    assert [info.full for info in saved] == [True, False]


def loads_the_newest(names: Names) -> None:
    saved = torch.full((4, 4), 800.0)
    assert names["info"].step == 800
    assert torch.equal(names["model"]["encoder"].weight, saved)
    assert torch.equal(names["state"]["model"]["encoder.weight"], saved)


def saves_and_loads_through_dcp(names: Names) -> None:
    weights = [dt.StorageReader(f"dcp/{step}").read_metadata().state_dict_metadata for step in (1000, 1001)]
    assert [list(found) for found in weights] == [
        [f"model.{name}" for name in names["model"].state_dict()]
    ] * 2


def keeps_the_last_and_the_pinned(names: Names) -> None:
    assert [info.step for info in names["manager"].list()] == [500, 700, 800, 900]


# What each example of the guide leaves, in their order.
LEAVES = (
    tells_how_a_save_went,
    saves_only_what_changed,
    loads_the_newest,
    keeps_the_last_and_the_pinned,
    saves_and_loads_through_dcp,
)


def test_what_each_example_of_the_guide_leaves_is_known():
    assert len(code_blocks(ROOT / "docs" / "GUIDE.md", "python")) == len(LEAVES)


@pytest.mark.parametrize("check", LEAVES)
def test_an_example_of_the_guide_does_what_it_shows(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = code_blocks(ROOT / "docs" / "GUIDE.md", "python")[LEAVES.index(check)]
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)})
    with dt.CheckpointManager("checkpoints/", keep_last_n=None) as manager, torch.no_grad():
        for step in (500, 600, 700, 800):
            model["encoder"].weight.fill_(step)
            manager.save({"model": model}, step)
        model["encoder"].weight.zero_()
        names = {"dt": dt, "manager": manager, "model": model, "state": {"model": model}, "step": 900}
        exec(example, names)
        with names["manager"]:
            check(names)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_what_a_page_links_to_exists(page):
    for file, anchor in links(page):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), f"{file}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_the_commands_of_a_page_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    shown = code(page)
    assert set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", shown)) <= targets
    commands = ROOT / "dtruntime_torch" / "cli"
    assert all((commands / f"{name}.py").exists() for name in re.findall(r"\bdtruntime ([a-z]+)\b", shown))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_the_files_that_a_page_names_exist(page):
    named = re.findall(
        r"(?<![\w./-])((?:benchmarks|csrc|docs|dtruntime_torch|examples|scripts|tests)/[\w./-]*\w)",
        code(page),
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_the_public_names_that_a_page_uses_exist(page):
    assert [name for name in re.findall(r"\bdt\.(\w+)", code(page)) if not hasattr(dt, name)] == []
