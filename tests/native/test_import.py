"""What one gets by importing the native module: no torch, what the manual lists, and no hold on other threads."""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dtruntime_torch import _C

MANUAL = Path(_C.__file__).with_name("_C.pyi").read_text()


def test_it_works_without_torch():
    program = (
        "import sys\n"
        "import dtruntime_torch._C as _C\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert len(_C.digest(b'abc', 1)) == 48\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_it_loads_no_library_of_torch():
    program = (
        "import dtruntime_torch._C\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert '_C.' in maps and not [name for name in ('libc10', 'libtorch') if name in maps]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_manual_lists_what_is_there():
    documented = {
        node.name for node in ast.parse(MANUAL).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert documented == {name for name in vars(_C) if not name.startswith("_")}


def test_the_examples_of_the_manual_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nodes = [node for node in ast.walk(ast.parse(MANUAL)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    runner = doctest.DocTestRunner()
    for node in nodes:
        text = ast.get_docstring(node) or ""
        runner.run(doctest.DocTestParser().get_doctest(text, {}, node.name, "_C.pyi", None))
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries > 5


def test_it_says_how_it_was_built():
    info = _C.build_info()
    assert set(info) == {"compiler", "cuda", "simd"}
    assert str(info["compiler"]).split()[0] in {"gcc", "clang"}
    assert info["cuda"] is False or "." in str(info["cuda"])
    assert info["simd"] in _C.digest_impls()


DATA = bytes(1 << 20)
ARENA = _C.Arena(1 << 20)
SOURCE = _C.Arena(1 << 20)
DIGESTS = _C.Arena(1 << 20)
LONG_CALLS: dict[str, Callable[[], object]] = {
    "digest": lambda: _C.digest(DATA, 4096),
    "digest_ranges": lambda: _C.digest_ranges(DATA, [0], [len(DATA)], 4096),
    "Arena": lambda: _C.Arena(1 << 20),
    "Arena.populate": lambda: ARENA.populate(),
    "CopyJob.wait": lambda: _C.CopyJob(ARENA, [SOURCE.address], [1 << 20], [0], 4096).wait(),
    "copy_digest": lambda: _C.copy_digest(ARENA, [SOURCE.address], [1 << 20], [0], 4096),
    "digest_into": lambda: _C.digest_into(DIGESTS.address, SOURCE.address, 1 << 20, 4096),
    "copy_digest_into": lambda: _C.copy_digest_into(
        DIGESTS.address, ARENA.address, SOURCE.address, 1 << 20, 4096
    ),
    "read_memory": lambda: _C.read_memory(DATA),
    "copy_streaming": lambda: _C.copy_streaming(ARENA, SOURCE),
    "write_file": lambda: _C.write_file(__file__, [DATA]),  # it exists: an error, after the disk was asked
    "write_extents": lambda: _C.write_extents(__file__, DATA, [(0, 0, len(DATA))]),  # the same
    "read_file": lambda: _C.read_file(__file__, 0, 10),
    "read_extents": lambda: _C.read_extents(__file__, ARENA, [(0, 0, 10)]),
    "rename_noreplace": lambda: _C.rename_noreplace(__file__, __file__),
    "permute": lambda: _C.permute(1000, (0, 0), 0, 1, 1000),
    # There is no such device: an error, after the driver was asked.
    "cuda_device_count": _C.cuda_device_count,
    "cuda_list_chunks": lambda: _C.cuda_list_chunks([], [], [], 1, 0, 9999, 0),
    "cuda_digest": lambda: _C.cuda_digest(0, 1, 0, 0, 9999, 0),
    "cuda_find_changed": lambda: _C.cuda_find_changed(0, 0, 1, 0, 0, 9999, 0),
    "cuda_gather_changed": lambda: _C.cuda_gather_changed(0, 0, 0, 1, 0, 1, 9999, 0),
    "cuda_read": lambda: _C.cuda_read(0, 1, 0, 9999, 0),
}


@pytest.mark.parametrize("name", LONG_CALLS)
def test_other_threads_run_during_a_call(name):
    """With threads never switched by time, another one runs only when a call lets go of the GIL."""
    call = LONG_CALLS[name]
    go, others = threading.Event(), []
    thread = threading.Thread(target=lambda: (go.wait(), others.append(1)))
    before = sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(1000)
    try:
        go.set()
        tries = 0
        while not others and tries < 20_000:
            with suppress(FileExistsError, RuntimeError):
                call()
            tries += 1
        ran = bool(others)
    finally:
        sys.setswitchinterval(before)
        thread.join()
    assert ran
