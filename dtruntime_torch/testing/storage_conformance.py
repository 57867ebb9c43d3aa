"""The suite that every storage backend passes.

A backend's own tests derive from the class, say how to make an empty one, and pytest does the rest:

    class TestMyBackend(StorageConformance):
        @pytest.fixture
        def backend(self, tmp_path):
            return MyBackend(...)

Needs pytest. `pytest.register_assert_rewrite("dtruntime_torch.testing.storage_conformance")` in a conftest.py
makes its failures speak.
"""

from __future__ import annotations

import array
import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from typing_extensions import Buffer

from dtruntime_torch import _C
from dtruntime_torch.errors import AlreadyExists, InvalidArgument, NotFound, StorageError
from dtruntime_torch.storage.backend import Entry, ReadsChunks, StorageBackend, reads_chunks
from dtruntime_torch.storage.sync import run_sync

BAD_PATHS = [
    "",
    "/",
    "/absolute",
    "trailing/",
    "a//b",
    ".",
    "..",
    "./a",
    "a/.",
    "../a",
    "a/../b",
    "a/..",
    "back\\slash",
    "nul\0",
    "lone\ud800surrogate",
    ".tmp-0123456789abcdef",
]
SIZES = [0, 1, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (9 << 20) + 5]
CREATORS = 32


def _reads_chunks(backend: StorageBackend) -> ReadsChunks:
    reader = reads_chunks(backend)
    if reader is None:
        pytest.skip("it reads no chunks")
    return reader


class StorageConformance:
    """Derive from it, and give a fixture `backend`: an empty backend for each test."""

    def test_is_a_storage_backend(self, backend: StorageBackend) -> None:
        assert isinstance(backend, StorageBackend)

    @pytest.mark.parametrize("store", ["write", "create"])
    @pytest.mark.parametrize("size", SIZES)
    def test_bytes_come_back_as_they_were(self, backend: StorageBackend, size: int, store: str) -> None:
        data = pattern(size)
        run_sync(getattr(backend, store)("folder/sub/file", data))
        assert bytes(run_sync(backend.read("folder/sub/file"))) == data
        assert run_sync(backend.size("folder/sub/file")) == size

    @pytest.mark.parametrize("store", ["write", "create"])
    def test_a_sequence_of_buffers_is_stored_as_one(self, backend: StorageBackend, store: str) -> None:
        pieces: list[Buffer] = [
            b"",
            pattern(5),
            bytearray(pattern(4096)),
            memoryview(pattern(10_001))[1:],
            b"",
            b"end",
        ]
        run_sync(getattr(backend, store)("file", pieces))
        assert bytes(run_sync(backend.read("file"))) == b"".join(pieces)

    def test_a_sequence_of_no_buffers_is_an_empty_file(self, backend: StorageBackend) -> None:
        run_sync(backend.write("file", []))
        assert run_sync(backend.size("file")) == 0

    def test_buffers_are_stored_as_bytes_whatever_their_elements(self, backend: StorageBackend) -> None:
        numbers = array.array("d", [1.5, -2.0, 3.25, 0.0])
        grid = memoryview(numbers).cast("B").cast("d", shape=[2, 2])
        run_sync(backend.write("file", (numbers, grid)))
        assert bytes(run_sync(backend.read("file"))) == numbers.tobytes() * 2

    @pytest.mark.parametrize("data", ["text", 7, None, [b"good", "bad"], memoryview(b"abcdef")[::2]])
    def test_what_is_no_buffer_is_refused(self, backend: StorageBackend, data: object) -> None:
        with pytest.raises(InvalidArgument):
            run_sync(backend.write("file", data))  # type: ignore[arg-type]
        assert run_sync(backend.list("")) == []

    def test_a_write_replaces_what_was_there(self, backend: StorageBackend) -> None:
        for data in (b"long before", b"short", b"", b"longer than all before"):
            run_sync(backend.write("file", data))
            assert bytes(run_sync(backend.read("file"))) == data

    def test_what_was_read_does_not_change_when_the_file_does(self, backend: StorageBackend) -> None:
        before, after = pattern(2 << 20), bytes(2 << 20)
        run_sync(backend.write("file", before))
        seen = run_sync(backend.read("file"))
        run_sync(backend.write("file", after))
        assert bytes(seen) == before

    def test_a_reader_sees_the_old_bytes_or_all_of_the_new(self, backend: StorageBackend) -> None:
        versions = [bytes([n]) * ((1 << 20) + 4096 * n) for n in range(8)]
        run_sync(backend.write("file", versions[0]))

        async def write_all() -> None:
            for version in versions:
                await backend.write("file", version)

        async def read_some() -> list[bytes]:
            return [bytes(await backend.read("file")) for _ in versions]

        with ThreadPoolExecutor() as pool:
            writer, reader = pool.submit(run_sync, write_all()), pool.submit(run_sync, read_some())
            writer.result()
            assert all(seen in versions for seen in reader.result())

    def test_create_refuses_what_exists_and_leaves_it_alone(self, backend: StorageBackend) -> None:
        run_sync(backend.create("commits/1.json", b"first"))
        with pytest.raises(AlreadyExists, match=r"commits/1\.json"):
            run_sync(backend.create("commits/1.json", b"second"))
        assert bytes(run_sync(backend.read("commits/1.json"))) == b"first"

    def test_create_refuses_what_was_written(self, backend: StorageBackend) -> None:
        run_sync(backend.write("file", b"written"))
        with pytest.raises(AlreadyExists):
            run_sync(backend.create("file", b"created"))

    def test_create_works_again_after_a_delete(self, backend: StorageBackend) -> None:
        for data in (b"one", b"two"):
            run_sync(backend.create("file", data))
            run_sync(backend.delete("file"))
        run_sync(backend.create("file", b"three"))
        assert bytes(run_sync(backend.read("file"))) == b"three"

    def test_of_many_creators_exactly_one_wins(self, backend: StorageBackend) -> None:
        start = threading.Barrier(CREATORS)

        def create(creator: int) -> int | None:
            start.wait(timeout=60)
            try:
                run_sync(backend.create("new/folder/file", b"creator %d" % creator))
            except AlreadyExists:
                return None
            return creator

        with ThreadPoolExecutor(CREATORS) as pool:
            winners = [winner for winner in pool.map(create, range(CREATORS)) if winner is not None]
        assert len(winners) == 1
        assert bytes(run_sync(backend.read("new/folder/file"))) == b"creator %d" % winners[0]
        assert [entry.path for entry in run_sync(backend.list(""))] == ["new/folder/file"]

    @pytest.mark.parametrize("size", [10, (2 << 20) + 10])
    def test_ranges_are_exact(self, backend: StorageBackend, size: int) -> None:
        data = pattern(size)
        run_sync(backend.write("file", data))
        for offset, length in [(0, 0), (0, 1), (3, 4), (0, size), (1, size - 1), (size - 1, 1), (size, 0)]:
            assert (
                bytes(run_sync(backend.read_range("file", offset, length))) == data[offset : offset + length]
            )

    @pytest.mark.parametrize("size", [s for s in SIZES if s])
    def test_a_range_goes_where_it_is_told(self, backend: StorageBackend, size: int) -> None:
        data = pattern(size)
        run_sync(backend.write("file", data))
        for offset, length in [(0, 0), (0, size), (1, size - 1), (size - 1, 1), (size // 3, size // 2)]:
            memory = bytearray(b"\xa5" * (length + 2))
            into = memoryview(memory)[1 : length + 1]
            assert run_sync(backend.read_range("file", offset, length, into=into)) is into
            assert memory == b"\xa5" + data[offset : offset + length] + b"\xa5"

    def test_chunks_go_where_they_are_told_with_their_digests(self, backend: StorageBackend) -> None:
        reader = _reads_chunks(backend)
        data = pattern(5000)
        run_sync(backend.write("file", data))
        memory = bytearray(b"\xa5" * 3002)
        view = memoryview(memory)
        found = run_sync(
            reader.read_chunks("file", [4000, 0, 7], [view[1:1001], view[1001:1001], view[1001:3001]], 64)
        )
        assert memory == b"\xa5" + data[4000:] + data[7:2007] + b"\xa5"
        assert found == _C.digest(data[4000:], 64) + _C.digest(data[7:2007], 64)

    def test_chunks_past_the_end_and_of_no_file_are_refused(self, backend: StorageBackend) -> None:
        reader = _reads_chunks(backend)
        run_sync(backend.write("file", pattern(10)))
        with pytest.raises(StorageError, match="file.*10"):
            run_sync(reader.read_chunks("file", [5], [memoryview(bytearray(6))], 64))
        with pytest.raises(NotFound):
            run_sync(reader.read_chunks("nothing", [0], [memoryview(bytearray(6))], 64))
        with pytest.raises(InvalidArgument):
            run_sync(reader.read_chunks("file", [0], [memoryview(bytes(6))], 64))

    @pytest.mark.parametrize("memory", [bytearray(3), bytearray(5), bytes(4)])
    def test_memory_that_a_range_does_not_fit_is_refused(
        self, backend: StorageBackend, memory: bytes
    ) -> None:
        run_sync(backend.write("file", pattern(10)))
        with pytest.raises(InvalidArgument, match="4 bytes of file"):
            run_sync(backend.read_range("file", 0, 4, into=memoryview(memory)))

    def test_a_range_past_the_end_goes_nowhere(self, backend: StorageBackend) -> None:
        run_sync(backend.write("file", pattern(10)))
        memory = bytearray(b"\xa5" * 11)
        with pytest.raises(StorageError, match="file.*10"):
            run_sync(backend.read_range("file", 0, 11, into=memoryview(memory)))
        assert memory == b"\xa5" * 11

    @pytest.mark.parametrize(
        ("offset", "length"), [(0, 11), (10, 1), (11, 0), (5, 1 << 50), (1 << 60, 1 << 60)]
    )
    def test_a_range_past_the_end_is_refused(self, backend: StorageBackend, offset: int, length: int) -> None:
        run_sync(backend.write("file", pattern(10)))
        with pytest.raises(StorageError, match="file.*10") as caught:
            run_sync(backend.read_range("file", offset, length))
        assert not isinstance(caught.value, NotFound)

    @pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1)])
    def test_a_negative_range_is_refused(self, backend: StorageBackend, offset: int, length: int) -> None:
        run_sync(backend.write("file", pattern(10)))
        with pytest.raises(InvalidArgument):
            run_sync(backend.read_range("file", offset, length))

    def test_what_is_not_there_is_not_found(self, backend: StorageBackend) -> None:
        run_sync(backend.write("folder/file", b"a file"))
        for path in ("absent", "folder/absent", "absent/file", "folder", "folder/file/below"):
            for look in (backend.read, backend.size, lambda path: backend.read_range(path, 0, 0)):
                with pytest.raises(NotFound, match=path):
                    run_sync(_await(look(path)))

    def test_a_deleted_file_is_not_found(self, backend: StorageBackend) -> None:
        run_sync(backend.write("folder/file", b"bytes"))
        run_sync(backend.write("folder/other", b"stays"))
        run_sync(backend.delete("folder/file"))
        with pytest.raises(NotFound):
            run_sync(backend.read("folder/file"))
        assert [entry.path for entry in run_sync(backend.list(""))] == ["folder/other"]

    @pytest.mark.parametrize("path", ["absent", "absent/file", "folder", "folder/file/below"])
    def test_deleting_what_is_absent_is_no_error(self, backend: StorageBackend, path: str) -> None:
        run_sync(backend.write("folder/file", b"bytes"))
        run_sync(backend.delete(path))
        assert bytes(run_sync(backend.read("folder/file"))) == b"bytes"

    def test_an_empty_backend_lists_nothing(self, backend: StorageBackend) -> None:
        assert run_sync(backend.list("")) == []
        assert run_sync(backend.list("some/prefix", "/")) == []

    @pytest.mark.parametrize(
        ("prefix", "delimiter", "expected"),
        [
            ("", None, ["a", "b/1", "b/2/x", "b/2/y", "b/22", "b2/z", "c-d"]),
            ("", "/", ["a", "b/", "b2/", "c-d"]),
            ("b", None, ["b/1", "b/2/x", "b/2/y", "b/22", "b2/z"]),
            ("b", "/", ["b/", "b2/"]),
            ("b/", None, ["b/1", "b/2/x", "b/2/y", "b/22"]),
            ("b/", "/", ["b/1", "b/2/", "b/22"]),
            ("b/2", None, ["b/2/x", "b/2/y", "b/22"]),
            ("b/2", "/", ["b/2/", "b/22"]),
            ("b/2/", "/", ["b/2/x", "b/2/y"]),
            ("a", None, ["a"]),
            ("a/", None, []),
            ("absent/", "/", []),
        ],
    )
    def test_a_listing_is_by_prefix_and_in_order(
        self, backend: StorageBackend, prefix: str, delimiter: str | None, expected: list[str]
    ) -> None:
        for path in ("c-d", "b/2/y", "b/1", "b2/z", "a", "b/22", "b/2/x"):
            run_sync(backend.write(path, path.encode()))
        entries = run_sync(backend.list(prefix, delimiter))
        assert [entry.path for entry in entries] == expected
        for entry in entries:
            if entry.path.endswith("/"):
                assert entry == Entry(entry.path, 0, 0.0)
            else:
                assert entry.size == len(entry.path)
                assert entry.modified > 0.0

    def test_a_later_write_is_modified_no_earlier(self, backend: StorageBackend) -> None:
        run_sync(backend.write("first", b""))
        run_sync(backend.write("second", b""))
        first, second = run_sync(backend.list(""))
        assert first.modified <= second.modified

    def test_a_folder_whose_files_are_gone_is_not_listed(self, backend: StorageBackend) -> None:
        run_sync(backend.write("kept", b""))
        run_sync(backend.write("deep/er/file", b""))
        run_sync(backend.delete("deep/er/file"))
        assert [entry.path for entry in run_sync(backend.list("", "/"))] == ["kept"]

    def test_a_thousand_entries_are_listed(self, backend: StorageBackend) -> None:
        paths = [f"commits/{number:04d}.json" for number in range(1000)]

        async def create_all() -> None:
            await asyncio.gather(*(backend.create(path, path.encode()) for path in paths))

        run_sync(create_all())
        assert [entry.path for entry in run_sync(backend.list("commits/"))] == paths

    def test_it_says_how_long_a_change_takes_to_be_seen(self, backend: StorageBackend) -> None:
        assert backend.settle_seconds >= 0.0

    def test_what_is_whole_is_not_unfinished_and_is_not_discarded(self, backend: StorageBackend) -> None:
        for path in ("folder/file", "folder/.hidden", "folder/.tmp-mine"):
            run_sync(backend.write(path, b"bytes"))
        for prefix in ("", "folder/", "fold", "folder/file", "absent/"):
            assert run_sync(backend.unfinished(prefix)) == []
            assert run_sync(backend.discard_unfinished(prefix)) == 0
        assert len(run_sync(backend.list(""))) == 3

    def test_a_write_that_failed_is_discarded_with_its_bytes(self, backend: StorageBackend) -> None:
        run_sync(backend.create("folder/file", b"bytes"))
        with pytest.raises(AlreadyExists):
            run_sync(backend.create("folder/file", b"bytes"))
        left = run_sync(backend.unfinished(""))
        assert run_sync(backend.discard_unfinished("")) == sum(entry.size for entry in left)
        assert run_sync(backend.unfinished("")) == []
        assert bytes(run_sync(backend.read("folder/file"))) == b"bytes"

    @pytest.mark.parametrize("path", BAD_PATHS)
    def test_a_bad_path_is_refused(self, backend: StorageBackend, path: str) -> None:
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: backend.write(path, b""),
            lambda: backend.create(path, b""),
            lambda: backend.read(path),
            lambda: backend.read_range(path, 0, 0),
            lambda: backend.size(path),
            lambda: backend.delete(path),
        ]
        for call in calls:
            with pytest.raises(InvalidArgument):
                run_sync(_await(call()))
        assert run_sync(backend.list("")) == []

    @pytest.mark.parametrize("prefix", ["/", "/a", "..", "../", "a/../b", "a//", ".", "back\\slash", "nul\0"])
    def test_a_bad_prefix_is_refused(self, backend: StorageBackend, prefix: str) -> None:
        for call in (backend.list, backend.unfinished, backend.discard_unfinished):
            with pytest.raises(InvalidArgument):
                run_sync(_await(call(prefix)))

    def test_another_delimiter_is_refused(self, backend: StorageBackend) -> None:
        with pytest.raises(InvalidArgument):
            run_sync(backend.list("", "-"))

    @pytest.mark.parametrize("path", ["with space", "ünï/cödé", ".hidden", "..two", "a:b*c?", "n" * 255])
    def test_any_other_name_is_fine(self, backend: StorageBackend, path: str) -> None:
        run_sync(backend.write(path, b"bytes"))
        run_sync(backend.create(path + "2" if len(path) < 255 else "other", b"bytes"))
        assert bytes(run_sync(backend.read(path))) == b"bytes"
        assert path in [entry.path for entry in run_sync(backend.list(""))]

    def test_many_calls_may_be_gathered(self, backend: StorageBackend) -> None:
        contents = {f"folder-{n % 3}/file-{n}": pattern(1000 * n) for n in range(24)}

        async def round_trip(path: str, data: bytes) -> bool:
            await backend.write(path, data)
            return bytes(await backend.read(path)) == data

        async def gathered() -> list[bool]:
            return await asyncio.gather(*(round_trip(*item) for item in contents.items()))

        assert all(run_sync(gathered()))


def pattern(size: int) -> bytes:
    """Returns `size` bytes of which no two neighbouring blocks are alike."""
    words = array.array("I", range(size // 4 + 1))
    return words.tobytes()[:size]


async def _await(awaitable: Awaitable[object]) -> object:
    return await awaitable
