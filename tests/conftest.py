"""What all tests share."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from dtruntime_torch.checkpoint import objects

# No deadline: how long an example takes depends on what else the machine does, and says nothing of the code.
settings.register_profile("dtruntime", deadline=None, print_blob=True)
settings.load_profile("dtruntime")

Mount = Callable[..., Path]


@pytest.fixture
def own_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The codecs that are registered, as a copy: those that a test adds go with it.

    A codec is registered for as long as the process lives, nothing public takes it back, and a second one of its type or tag
    is refused; so what one test leaves would decide what another finds.
    """
    importlib.import_module("dtruntime_torch.checkpoint.flatten")  # registers ours, which are to stay
    for registry in ("_codecs_by_type", "_codecs_by_tag"):
        monkeypatch.setattr(objects, registry, dict(getattr(objects, registry)))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a tmpfs with the options given; skips where this user may not."""
    mounted: list[Path] = []

    def mount_tmpfs(options: str) -> Path:
        place = tmp_path / f"mount-{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(place)], capture_output=True
        )
        if done.returncode != 0:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(place)
        return place

    yield mount_tmpfs
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)
