"""The kernels' own source, run on the host by tests/native/cuda_on_host, beside PyPI's xxhash."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from random import Random

import pytest
import xxhash

from tests.boundaries import CHUNK_BYTES, LENGTHS
from tests.native.host_builds import kernels

DATA = Random(0).randbytes((32 << 20) + 64)
BUFFER = ctypes.create_string_buffer(DATA, len(DATA) + 16)
# The first address in it that is aligned to 16.
BASE = -ctypes.addressof(BUFFER) % 16 + ctypes.addressof(BUFFER)
ALIGNED = DATA[BASE - ctypes.addressof(BUFFER) :]

Piece = tuple[int, int]  # offset from BASE, length


class Chunk(ctypes.Structure):
    _fields_ = (("source", ctypes.c_void_p), ("length", ctypes.c_uint64), ("target", ctypes.c_void_p))


@pytest.fixture(scope="session")
def device() -> ctypes.CDLL:
    library = ctypes.CDLL(str(kernels()))
    for name in ("list_chunks", "digest_chunks", "copy_digest_chunks", "find_changed", "gather_changed"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("read_memory", "pin_memory", "unpin_memory", "device_count", "get_last_error"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def size(value: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(value)


def expected(pieces: Sequence[Piece]) -> list[bytes]:
    view = memoryview(ALIGNED)
    return [xxhash.xxh3_128_digest(view[start : start + length]) for start, length in pieces]


def table(pieces: Sequence[Piece], targets: Sequence[int] | None = None) -> ctypes.Array[Chunk]:
    chunks = (Chunk * len(pieces))()
    for i, (start, length) in enumerate(pieces):
        chunks[i] = Chunk(BASE + start, length, None if targets is None else targets[i])
    return chunks


def digests_of(
    device: ctypes.CDLL, chunks: ctypes.Array[Chunk], call: str = "digest_chunks", number: int = 0
) -> list[bytes]:
    count = len(chunks)
    # 16 canonical bytes a chunk, in memory that is aligned as the call wants it, and a canary behind.
    room = ctypes.create_string_buffer(b"\xaa" * (16 * count + 32), 16 * count + 32)
    start = -ctypes.addressof(room) % 16
    queue = ctypes.c_uint32(12345)
    address = ctypes.c_void_p(ctypes.addressof(room) + start)
    error = getattr(device, call)(chunks, size(count), address, ctypes.byref(queue), number)
    assert error is None, error
    assert set(room.raw[start + 16 * count :]) == {0xAA}
    return [room.raw[start + 16 * i : start + 16 * i + 16] for i in range(count)]


@pytest.mark.slow
def test_every_short_length_agrees_with_xxhash(device):
    pieces = [(length % 16, length) for length in range(1, 5001)]
    assert digests_of(device, table(pieces)) == expected(pieces)


@pytest.mark.parametrize("start", range(16))
def test_every_alignment_agrees_with_xxhash(device, start):
    pieces = [(start, length) for length in LENGTHS if 0 < length <= 2 * CHUNK_BYTES + 1]
    pieces += [(start, length) for length in (239, 241, 1025, 1089, 31 * 1024 + 5, 32 * 1024 + 1, 99_999)]
    assert digests_of(device, table(pieces)) == expected(pieces)


@pytest.mark.parametrize("chunk_bytes", [64 << 10, 256 << 10, 1 << 20, 16 << 20])
def test_whole_chunks_agree_with_xxhash(device, chunk_bytes):
    count = max(2, min(9, (8 << 20) // chunk_bytes))
    pieces = [(i * chunk_bytes, chunk_bytes) for i in range(count)]
    assert digests_of(device, table(pieces)) == expected(pieces)


def test_lengths_around_a_batch_of_blocks_agree_with_xxhash(device):
    edges = [n * 1024 for n in (*range(1, 9), 31, 32, 33, 63, 64, 65, 96, 128)]
    pieces = [(0, edge + off) for edge in edges for off in (-64, -63, -1, 0, 1, 15, 16, 17, 63, 64, 65)]
    assert digests_of(device, table(pieces)) == expected(pieces)


@pytest.mark.slow
def test_thousands_of_ragged_chunks_agree_with_xxhash(device):
    random = Random(1)
    pieces = [(random.randrange(1 << 20), int(10 ** random.uniform(0, 4.8)) + 1) for _ in range(4000)]
    assert digests_of(device, table(pieces)) == expected(pieces)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_fewer_chunks_than_blocks_and_a_few_more(device, count):
    pieces = [(i, 70_000 + i) for i in range(count)]
    assert digests_of(device, table(pieces)) == expected(pieces)


def test_extreme_bytes_agree_with_xxhash(device):
    for byte in (b"\x00", b"\xff", b"\x80"):
        data = ctypes.create_string_buffer(byte * 40_000, 40_000)
        chunk = (Chunk * 1)(Chunk(ctypes.addressof(data), 40_000, None))
        assert digests_of(device, chunk) == [xxhash.xxh3_128_digest(byte * 40_000)]


def test_what_is_copied_arrives_with_its_digest_and_nothing_beside_it_changes(device):
    random = Random(2)
    lengths = [n for n in LENGTHS if 0 < n < 9000] + [40_000, 70_001, (1 << 20) + 3]
    pieces = [(random.randrange(64), length) for length in lengths for _ in range(4)]
    # Targets at any alignment, with gaps, in memory that is full of canaries.
    offsets, end = [], 0
    for i, (start, length) in enumerate(pieces):
        end = (end + 79) // 64 * 64
        offsets.append(end + (start % 16 if i % 2 else random.randrange(16)))
        end = offsets[-1] + length
    arena = ctypes.create_string_buffer(b"\xcc" * (end + 64), end + 64)
    address = ctypes.addressof(arena)
    chunks = table(pieces, [address + offset for offset in offsets])
    assert digests_of(device, chunks, "copy_digest_chunks") == expected(pieces)
    image = bytearray(b"\xcc" * (end + 64))
    for offset, (start, length) in zip(offsets, pieces, strict=True):
        image[offset : offset + length] = ALIGNED[start : start + length]
    assert arena.raw == image


def test_ranges_are_cut_into_chunks_in_turn(device):
    random = Random(3)
    ranges = [(i << 32, random.choice((0, 1, 999, 1000, 1001, 5500)), i << 40) for i in range(1, 400)]
    ranges[200] = (7 << 50, 20_000_123, 0)  # more chunks than one round of all blocks lists
    wanted = [
        (source + start, min(1000, length - start), target + start if target else None)
        for source, length, target in ranges
        for start in range(0, length, 1000)
    ]
    chunks = (Chunk * (len(wanted) + 1))()
    chunks[len(wanted)] = Chunk(1, 2, 3)
    listed = (Chunk * len(ranges))(*(Chunk(s, n, t or None) for s, n, t in ranges))
    assert device.list_chunks(listed, size(len(ranges)), ctypes.c_uint64(1000), chunks, 0) is None
    assert [(c.source, c.length, c.target) for c in chunks] == [*wanted, (1, 2, 3)]


def test_no_ranges_and_empty_ranges_have_no_chunks(device):
    canary = (Chunk * 1)(Chunk(1, 2, 3))
    for ranges in ([], [Chunk(5, 0, None)] * 300):
        listed = (Chunk * len(ranges))(*ranges)
        assert device.list_chunks(listed, size(len(ranges)), ctypes.c_uint64(10), canary, 0) is None
    assert (canary[0].source, canary[0].length, canary[0].target) == (1, 2, 3)


class Tables:
    """Two tables of digests of which the second is out of date, and room for what is found."""

    def __init__(self, count: int, differ: set[int]):
        self.count = count
        self.room = ctypes.create_string_buffer(32 * count + 16)
        start = -ctypes.addressof(self.room) % 16
        self.now = ctypes.addressof(self.room) + start
        self.known = self.now + 16 * count
        table = Random(count).randbytes(16 * count)
        old = bytearray(table)
        for i in differ:
            old[16 * i + i % 16] ^= 1 << i % 8  # one bit, in each byte in turn
        ctypes.memmove(self.now, table, len(table))
        ctypes.memmove(self.known, bytes(old), len(old))
        self.changed = (ctypes.c_uint32 * (count + 1))(*[0xEEEEEEEE] * (count + 1))
        self.changed_count = ctypes.c_uint32(777)

    def find(self, device: ctypes.CDLL) -> list[int]:
        found = (self.changed, ctypes.byref(self.changed_count))
        pointers = (ctypes.c_void_p(self.now), ctypes.c_void_p(self.known))
        assert device.find_changed(*pointers, size(self.count), *found, 0) is None
        return self.changed[: self.changed_count.value]


@pytest.mark.parametrize("count", [1, 31, 32, 33, 256, 257, 1000])
@pytest.mark.parametrize("share", [0, 1, 20, 100])
def test_changed_chunks_are_found_once_and_then_known(device, count, share):
    differ = {i for i in range(count) if Random(i).randrange(100) < share}
    tables = Tables(count, differ)
    found = tables.find(device)
    assert sorted(found) == sorted(differ)
    assert set(tables.changed[len(found) :]) == {0xEEEEEEEE}
    assert ctypes.string_at(tables.known, 16 * count) == ctypes.string_at(tables.now, 16 * count)
    assert tables.find(device) == []


def test_an_empty_table_has_no_changes(device):
    changed_count = ctypes.c_uint32(5)
    assert device.find_changed(None, None, size(0), None, ctypes.byref(changed_count), 0) is None
    assert changed_count.value == 0


@pytest.mark.parametrize("to_staging", [True, False])
def test_changed_chunks_are_gathered(device, to_staging):
    random = Random(4)
    stride = 150_000
    pieces = [(random.randrange(64), random.choice((1, 15, 16, 1000, 65_536, stride))) for _ in range(40)]
    changed = random.sample(range(40), 17)
    arena = ctypes.create_string_buffer(b"\xcc" * (40 * stride + 16), 40 * stride + 16)
    address = ctypes.addressof(arena) + 3
    chunks = table(pieces, [address + i * stride for i in range(40)])
    image = bytearray(arena.raw)
    for place, number in enumerate(changed):
        start, length = pieces[number]
        offset = 3 + (place if to_staging else number) * stride
        image[offset : offset + length] = ALIGNED[start : start + length]
    listed = (ctypes.c_uint32 * 40)(
        *changed, *[4_000_000_000] * 23
    )  # what is after the count is not looked at
    count = ctypes.c_uint32(len(changed))
    staging = ctypes.c_void_p(address if to_staging else None)
    arguments = (chunks, listed, ctypes.byref(count), size(40), staging, ctypes.c_uint64(stride))
    assert device.gather_changed(*arguments, 0) is None
    assert arena.raw == image


@pytest.mark.parametrize("nbytes", [0, 1, 15, 16, 17, 4096, 1_000_003])
def test_memory_is_read_to_the_last_byte(device, nbytes):
    words = nbytes // 16 * 2
    wanted = sum(memoryview(ALIGNED[: 8 * words]).cast("Q")) + sum(ALIGNED[8 * words : nbytes])
    sink = ctypes.c_uint64(9)
    assert device.read_memory(ctypes.c_void_p(BASE), size(nbytes), ctypes.byref(sink), 0) is None
    assert sink.value == wanted % 2**64


def test_errors_carry_the_words_of_cuda_and_are_not_left_for_others(device):
    error = device.digest_chunks((Chunk * 1)(), size(1), None, None, 9)
    assert error == b"choosing device 9: invalid device ordinal (cudaErrorInvalidDevice)"
    assert device.pin_memory(None, size(10)) == b"pinning 10 bytes: invalid argument (cudaErrorInvalidValue)"
    assert device.get_last_error() == b"cudaSuccess"


def test_the_current_device_is_as_before(device):
    device.set_device(0)
    pieces = [(0, 1000)]
    assert digests_of(device, table(pieces), number=1) == expected(pieces)
    assert device.get_device() == 0


def test_memory_is_pinned_and_unpinned(device):
    assert device.pin_memory(BUFFER, size(10)) is None
    assert device.unpin_memory(BUFFER) is None


@pytest.fixture
def count_devices(device) -> Iterator[Callable[[int, int], tuple[bytes | None, int]]]:
    """Counts devices where the driver has a version (0: there is none) and CUDA gives an error."""

    def count(version: int, error: int) -> tuple[bytes | None, int]:
        device.set_driver(version, error)
        found = ctypes.c_int(-1)
        return device.device_count(ctypes.byref(found)), found.value

    yield count
    device.set_driver(13000, 0)


@pytest.mark.parametrize(
    ("version", "error", "found"),
    [
        pytest.param(13000, 0, 2, id="two devices"),
        pytest.param(13000, 100, 0, id="no device"),
        pytest.param(0, 35, 0, id="no driver"),
    ],
)
def test_devices_are_counted(version, error, found, count_devices, device):
    assert count_devices(version, error) == (None, found)
    assert device.get_last_error() == b"cudaSuccess"


def test_a_driver_that_is_too_old_is_told_from_none(count_devices):
    words = b"CUDA driver version is insufficient for CUDA runtime version (cudaErrorInsufficientDriver)"
    assert count_devices(11000, 35) == (b"counting devices: " + words, -1)
