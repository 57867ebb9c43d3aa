"""The functions `cuda_*` of the native module: what they refuse, what they hand on, and what is said without CUDA."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from dtruntime_torch import _C
from tests.native.host_builds import ROOT, bindings

NO_SUCH_DEVICE = 9999

CALLS: dict[str, Callable[[ModuleType], object]] = {
    "list_chunks": lambda module: module.cuda_list_chunks([16], [1], [], 1, 16, NO_SUCH_DEVICE, 0),
    "digest": lambda module: module.cuda_digest(16, 1, 16, 16, NO_SUCH_DEVICE, 0),
    "copy_digest": lambda module: module.cuda_digest(16, 1, 16, 16, NO_SUCH_DEVICE, 0, copy=True),
    "find_changed": lambda module: module.cuda_find_changed(16, 16, 1, 16, 16, NO_SUCH_DEVICE, 0),
    "gather_changed": lambda module: module.cuda_gather_changed(16, 16, 16, 1, 16, 1, NO_SUCH_DEVICE, 0),
    "read": lambda module: module.cuda_read(16, 16, 16, NO_SUCH_DEVICE, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_enqueued_is_an_error(name):
    with pytest.raises(RuntimeError, match="cudaError" if _C.build_info()["cuda"] else "without CUDA"):
        CALLS[name](_C)


@pytest.mark.slow
def test_a_build_without_cuda_says_how_to_build_with_it():
    absent = bindings(ROOT / "tests" / "native" / "cuda_absent.cpp")
    for call in CALLS.values():
        with pytest.raises(RuntimeError, match="built without CUDA; build it again with CUDA_HOME"):
            call(absent)
    assert absent.cuda_device_count() == 0


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: _C.cuda_list_chunks([16, 32], [1], [], 1, 16, 0, 0), "sources and lengths"),
        (lambda: _C.cuda_list_chunks([16], [1], [16, 16], 1, 16, 0, 0), "sources and targets"),
        (lambda: _C.cuda_list_chunks([16], [-1], [], 1, 16, 0, 0), "length must not be negative"),
        (lambda: _C.cuda_list_chunks([16], [1], [], 0, 16, 0, 0), "chunk_bytes must be at least 1"),
        (lambda: _C.cuda_digest(16, -1, 16, 16, 0, 0), "count must not be negative"),
        (lambda: _C.cuda_digest(16, 1 << 31, 16, 16, 0, 0), r"count must be below 2\*\*31"),
        (lambda: _C.cuda_digest(16, 1, 24, 16, 0, 0), "digests must be aligned to 16"),
        (lambda: _C.cuda_find_changed(24, 16, 1, 16, 16, 0, 0), "digests must be aligned"),
        (lambda: _C.cuda_find_changed(16, 24, 1, 16, 16, 0, 0), "known must be aligned"),
        (lambda: _C.cuda_find_changed(16, 16, 1 << 31, 16, 16, 0, 0), "count must be below"),
        (lambda: _C.cuda_gather_changed(16, 16, 16, 1 << 31, 16, 1, 0, 0), "most must be below"),
        (lambda: _C.cuda_gather_changed(16, 16, 16, 1, 16, -1, 0, 0), "stride must not be negative"),
        (lambda: _C.cuda_read(8, 1, 16, 0, 0), "data must be aligned"),
        (lambda: _C.cuda_read(16, -1, 16, 0, 0), "nbytes must not be negative"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_what_is_out_of_range_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call()


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    """The same bindings over functions that write down how they were called."""
    return bindings(ROOT / "tests" / "native" / "cuda_recorder.cpp")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "calls"),
    [
        (
            "cuda_list_chunks",
            ([1, 2], [10, 20], [], 5, 7, 3, 9),
            ["range 1 10 0 on 3:9", "range 2 20 0 on 3:9", "list_chunks 5 7 on 3:9"],
        ),
        (
            "cuda_list_chunks",
            ([1, 2], [10, 20], [0, 4], 5, 7, 3, 9),
            ["range 1 10 0 on 3:9", "range 2 20 4 on 3:9", "list_chunks 5 7 on 3:9"],
        ),
        ("cuda_digest", (1, 2, 16, 4, 3, 9), ["digest_chunks 1 2 16 4 on 3:9"]),
        ("cuda_digest", (1, 2, 16, 4, 3, 9, True), ["copy_digest_chunks 1 2 16 4 on 3:9"]),
        ("cuda_find_changed", (16, 32, 2, 4, 5, 3, 9), ["find_changed 16 32 2 4 5 on 3:9"]),
        ("cuda_gather_changed", (1, 2, 4, 5, 6, 7, 3, 9), ["gather_changed 1 2 4 5 6 7 on 3:9"]),
        ("cuda_read", (16, 2, 4, 3, 9), ["read_memory 16 2 4 on 3:9"]),
        ("cuda_read", (16, 2, 4, 3, (1 << 64) - 1), [f"read_memory 16 2 4 on 3:{(1 << 64) - 1}"]),
    ],
)
def test_every_argument_goes_to_its_place(recorder, name, arguments, calls):
    recorder.calls()
    getattr(recorder, name)(*arguments)
    assert recorder.calls() == calls


@pytest.mark.slow
def test_the_number_of_devices_is_handed_back(recorder):
    assert recorder.cuda_device_count() == 3


@pytest.mark.slow
def test_why_devices_cannot_be_counted_is_said(recorder):
    recorder.refuse("the driver is too old")
    with pytest.raises(RuntimeError, match="^the driver is too old$"):
        recorder.cuda_device_count()
    recorder.refuse("")
    assert recorder.cuda_device_count() == 3
