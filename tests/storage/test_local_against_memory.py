"""The two backends beside each other: whatever is asked of them, in whatever order, they answer alike."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from dtruntime_torch.errors import DTRuntimeError
from dtruntime_torch.storage import LocalBackend, MemoryBackend, StorageBackend, run_sync
from dtruntime_torch.storage.system_calls import SystemCalls

# No path is below another: where a file is, no files may lie below it.
PATHS = ["a", "b/c", "b/d/e", "b/d/f", "b/dd", "bb/c", "b-/c"]
PREFIXES = ["", "a", "b", "b/", "b/d", "b/d/", "b/d/e", "bb", "x/y", "/", "../"]


class Unsynced(SystemCalls):
    """Spares the time that syncing folders takes."""

    def sync_folder(self, path: str) -> None:
        return


paths, data = st.sampled_from(PATHS), st.binary(max_size=4)
operations = st.one_of(
    st.tuples(st.just("write"), paths, data),
    st.tuples(st.just("create"), paths, data),
    st.tuples(st.just("read"), paths),
    st.tuples(st.just("read_range"), paths, st.integers(-1, 5), st.integers(-1, 5)),
    st.tuples(st.just("size"), paths),
    st.tuples(st.just("list"), st.sampled_from(PREFIXES), st.sampled_from([None, "/"])),
    st.tuples(st.just("delete"), paths),
)


def answer(backend: StorageBackend, operation: str, *arguments: object) -> object:
    try:
        result = run_sync(getattr(backend, operation)(*arguments))
    except DTRuntimeError as error:
        return type(error)
    if operation == "list":
        return [(entry.path, entry.size) for entry in result]
    return result


@settings(max_examples=40, deadline=None)
@given(st.lists(operations, max_size=20))
def test_local_and_memory_answer_alike(script: list[tuple[object, ...]]) -> None:
    memory = MemoryBackend()
    with tempfile.TemporaryDirectory() as folder:
        local = LocalBackend(Path(folder) / "root", calls=Unsynced())
        for operation, *arguments in script:
            assert answer(local, str(operation), *arguments) == answer(memory, str(operation), *arguments)
