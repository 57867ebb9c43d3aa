from __future__ import annotations

from dtruntime_torch.storage import MemoryBackend, run_sync


def test_each_write_is_a_second_after_the_last() -> None:
    backend = MemoryBackend()
    run_sync(backend.write("a", b""))
    run_sync(backend.create("b", b""))
    run_sync(backend.write("a", b""))
    assert {entry.path: entry.modified for entry in run_sync(backend.list(""))} == {"a": 3.0, "b": 2.0}


def test_two_backends_share_nothing() -> None:
    run_sync(MemoryBackend().write("a", b""))
    assert run_sync(MemoryBackend().list("")) == []


def test_a_buffer_may_change_once_it_was_stored() -> None:
    backend, buffer = MemoryBackend(), bytearray(b"before")
    run_sync(backend.write("file", buffer))
    buffer[:] = b"after!"
    assert run_sync(backend.read("file")) == b"before"
