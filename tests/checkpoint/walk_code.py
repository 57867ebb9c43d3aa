"""The modules that a walk drives: as they are, or as copies in which a rule of commit_model.py is switched off."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dtruntime_torch.checkpoint.cleaning.retention import RetentionPolicy
from tests.checkpoint.commits import NAME
from tests.checkpoint.walk_storage import Scheduled

# In the order in which they import each other.
MODULES = (
    "commit",
    "cleaning.look",
    "cleaning.stock",
    "cleaning.prune_plan",
    "cleaning.removal_kinds",
    "cleaning.removals",
    "cleaning.cleaner",
)

# Which lines hold a rule of commit_model.py, and what is there without it.
WITHOUT: dict[str, dict[str, list[tuple[str, str]]]] = {
    "intent": {
        "commit": [
            (
                "    data = encode_manifest(manifest)\n",
                "    data = encode_manifest(manifest)\n"
                "    still = parent is None or await _is_still_committed(backend, parent, patience)\n",
            ),
            (
                "if parent is not None and not await _is_still_committed(backend, parent, patience):",
                "if not still:",
            ),
        ]
    },
    "parent": {
        "commit": [
            (
                "if parent is not None and not await _is_still_committed(backend, parent, patience):",
                "if False:",
            )
        ]
    },
    "readback": {
        "commit": [
            (
                "        return bytes(await asyncio.wait_for(backend.read(path), patience.call_seconds))",
                "        raise",
            ),
            ("if waited >= patience.seconds:", "if True:"),
            ('return Outcome("unknown", ', 'return Outcome("lost", '),
        ]
    },
    "first": {
        "removals": [
            (
                "        await self._clear_all(faults)\n",
                "        going = {r.commit.attempt if hasattr(r, 'commit') else r.attempt.path\n"
                "                 for r in (p.removal for p in self.pending)}\n"
                "        early = await look.needed(self._backend, self._name, self._manifests, going)\n"
                "        await self._clear_all(faults)\n",
            ),
            ("return await self._delete_all(faults)", "return await self._delete_all(faults, early)"),
            ("def _delete_all(self, faults: list[str])", "def _delete_all(self, faults, needed)"),
            (
                "            needed = await look.needed(self._backend, self._name, self._manifests)\n",
                "            pass\n",
            ),
        ],
        "look": [
            (
                "manifests: Manifests) -> frozenset[str]:",
                "manifests: Manifests, going=()) -> frozenset[str]:",
            ),
            (
                "return frozenset(attempt for one in noted for attempt in one.uses)",
                "return frozenset(a for at, one in zip(listed, noted) if at not in going for a in one.uses)",
            ),
        ],
    },
    "void": {"removal_kinds": [("        if self.removable:", "        if True:")]},
    "fence": {
        "removal_kinds": [
            (
                "        there = await forbid(backend, self.name, self.attempt.key, patience)\n        if there",
                "        there = await _find(backend, self.name, self.attempt.key)\n        if there",
            ),
            (
                "async def write_void(",
                "async def _find(backend, name, key):\n"
                "    from dtruntime_torch.checkpoint import catalog, manifest\n"
                "    from dtruntime_torch.errors import NotFound\n"
                "    try:\n"
                "        return await catalog.read_commit(backend, name, key)\n"
                "    except NotFound:\n"
                '        return manifest.Commit(name, *key, "", "", void=True)\n\n\n'
                "async def write_void(",
            ),
        ]
    },
    "twice": {
        "look": [
            (
                "        if noted is None:\n            return None\n",
                "        if noted is None:\n            continue\n",
            ),
            ("if noted is not None and again == listed:", "if True:"),
        ]
    },
    "loser": {
        "removals": [
            (
                "*(pending.removal.victims for pending in due)) - needed",
                "*(p.removal.victims - (set() if type(p.removal).__name__ == 'GivenUp' else needed) for p in due))",
            )
        ]
    },
}


@dataclass(frozen=True)
class Code:
    """The modules under test, or copies in which a rule is switched off."""

    commit: Any
    cleaning: Any

    def cleaner(self) -> Any:
        policy = RetentionPolicy(keep_last_n=1)
        return self.cleaning.Cleaner(Scheduled(), NAME, policy, clock=no_clock, sleep=no_time_passes)

    def patience(self) -> Any:
        return self.commit.Patience(clock=no_clock, sleep=no_time_passes)


def load_code(monkeypatch: pytest.MonkeyPatch, changes: dict[str, list[tuple[str, str]]]) -> Code:
    """Copies the modules with these replacements, in which nothing takes time.

    Args:
        monkeypatch: takes the copies away again.
        changes: module -> (old, new); each old is there exactly once.
    """
    copies: dict[str, ModuleType] = {}
    for path in MODULES:
        original = importlib.import_module(f"dtruntime_torch.checkpoint.{path}")
        package, _, name = original.__name__.rpartition(".")
        source = Path(original.__file__).read_text()
        for old, new in changes.get(name, ()):
            assert source.count(old) == 1, f"{name}: {old}"
            source = source.replace(old, new)
        copy = ModuleType(original.__name__)
        monkeypatch.setitem(sys.modules, original.__name__, copy)
        exec(compile(source, original.__file__, "exec"), copy.__dict__)
        monkeypatch.setattr(sys.modules[package], name, copy)
        if hasattr(copy, "asyncio"):
            copy.asyncio = SimpleNamespace(wait_for=wait_for, TimeoutError=asyncio.TimeoutError)  # type: ignore[attr-defined]
        copies[name] = copy
    return Code(copies["commit"], copies["cleaner"])


def no_clock() -> float:
    return 0.0


async def no_time_passes(seconds: float) -> None:
    return None


async def wait_for(work: Awaitable[Any], seconds: float | None) -> Any:
    return await work
