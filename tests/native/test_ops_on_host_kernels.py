"""The CUDA side of the ops from end to end, without a device: the real bindings and kernels, built for the host.

CPU tensors play the device's memory. What streams, graphs and the allocator of a device add is not shown here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from random import Random
from types import ModuleType, SimpleNamespace

import pytest
import torch
import xxhash
from torch import Tensor

from dtruntime_torch import ops
from tests.boundaries import CHUNK_BYTES, LENGTHS, XXH3_SEAMS, around
from tests.native.host_builds import STAND_IN, bindings, kernels

pytestmark = pytest.mark.slow  # kernels and bindings are built first

DEVICE, STREAM = 1, 77  # the stand-in has two devices, and looks at no stream
CANARY = 0xA5
MARGIN = 64
RECORD_BYTES = 24
DTYPES = [torch.bool, torch.int16, torch.bfloat16, torch.float32, torch.float64, torch.complex128]

digest_on_cpu = torch.ops.dtruntime.digest


def bytes_of(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def xxh3(data: bytes, chunk_bytes: int) -> bytes:
    chunks = (data[i : i + chunk_bytes] for i in range(0, len(data), chunk_bytes))
    return b"".join(xxhash.xxh3_128_digest(chunk) for chunk in chunks)


class Room:
    """Memory that starts `start` bytes after an address that is aligned to 16; canaries in it and on both sides."""

    def __init__(self, nbytes: int, start: int = 0):
        self.block = torch.full((nbytes + 2 * MARGIN + 16,), CANARY, dtype=torch.uint8)
        self.first = MARGIN - self.block.data_ptr() % 16 + start
        self.data = self.block[self.first : self.first + nbytes]
        self.address = self.data.data_ptr()

    def check(self) -> None:
        whole, end = bytes_of(self.block), self.first + self.data.nbytes
        assert set(whole[: self.first]) == set(whole[end:]) == {CANARY}


def noise(nbytes: int, start: int = 0) -> Tensor:
    data = Room(nbytes, start).data
    return data.random_(256, generator=torch.Generator().manual_seed(nbytes))


class HostDevice:
    """The CUDA side of the ops, for tensors of the host, and the functions of `_C` that it calls meanwhile."""

    def __init__(self, native: ModuleType):
        self.native = native

    def digest(self, source: Tensor, chunk_bytes: int) -> bytes:
        return self._run(lambda: ops._digest_cuda(source, chunk_bytes))

    def copy_digest(self, target: Tensor, source: Tensor, chunk_bytes: int) -> bytes:
        return self._run(lambda: ops._copy_digest_cuda(target, source, chunk_bytes))

    def _run(self, work: Callable[[], Tensor]) -> bytes:
        rooms = []

        def empty(shape: int | tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
            sizes = torch.Size([shape] if isinstance(shape, int) else shape)
            rooms.append(Room(sizes.numel() * dtype.itemsize))
            return rooms[-1].data.view(dtype).view(sizes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "_C", self)
            patch.setattr(torch, "empty", empty)  # gives what others left, and theirs lies on both sides
            patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
            digests = work()
        for room in rooms:
            room.check()
        return bytes_of(digests)

    # torch numbers the host -1.
    def cuda_list_chunks(self, sources, lengths, targets, chunk_bytes, chunks, device, stream):
        assert (device, stream) == (-1, STREAM)
        self.native.cuda_list_chunks(sources, lengths, targets, chunk_bytes, chunks, DEVICE, stream)

    def cuda_digest(self, chunks, count, digests, queue, device, stream, copy):
        assert (device, stream) == (-1, STREAM)
        self.native.cuda_digest(chunks, count, digests, queue, DEVICE, stream, copy)


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return bindings(STAND_IN / "module.cpp", kernels())


@pytest.fixture(scope="module")
def device(native) -> HostDevice:
    return HostDevice(native)


def check_copy(device: HostDevice, source: Tensor, chunk_bytes: int, start: int = 0) -> None:
    room, before = Room(source.nbytes, start), bytes_of(source)
    target = room.data.view(source.dtype).view(source.shape)
    version = target._version
    assert device.copy_digest(target, source, chunk_bytes) == xxh3(before, chunk_bytes)
    assert bytes_of(target) == bytes_of(source) == before
    assert target._version == version + 1
    room.check()


@pytest.mark.parametrize("chunk_bytes", [1000, CHUNK_BYTES, (1 << 16) + 8, 1 << 20])
def test_every_length_is_digested_and_copied(device, chunk_bytes):
    for length in (n for n in LENGTHS if n <= 300 * chunk_bytes):
        data = noise(length)
        assert device.digest(data, chunk_bytes) == xxh3(bytes_of(data), chunk_bytes), length
        check_copy(device, data, chunk_bytes)


@pytest.mark.parametrize("chunk_bytes", [n for n in around(*XXH3_SEAMS) if n > 0])
def test_chunks_as_long_as_the_seams_of_xxh3_are_digested_and_copied(device, chunk_bytes):
    for length in around(chunk_bytes, 7 * chunk_bytes):
        data = noise(length, length % 16)
        assert device.digest(data, chunk_bytes) == xxh3(bytes_of(data), chunk_bytes), length
        check_copy(device, data, chunk_bytes, length % 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_bytes", [100, CHUNK_BYTES])
def test_a_slice_of_any_dtype_has_the_digests_of_the_cpu(device, dtype, chunk_bytes):
    data = noise(7 * 501 * dtype.itemsize)
    tensor = (data & 1 if dtype is torch.bool else data).view(dtype)[501:-501].view(5, 3, 167)
    assert tensor.storage_offset() >= 501
    assert device.digest(tensor, chunk_bytes) == bytes_of(digest_on_cpu(tensor, chunk_bytes))
    check_copy(device, tensor, chunk_bytes)


@pytest.mark.parametrize("start", range(16))
def test_every_alignment_of_source_and_target(device, start):
    source = noise(20_011, start)
    assert device.digest(source, CHUNK_BYTES) == xxh3(bytes_of(source), CHUNK_BYTES)
    for other in {start, 0, 1, (start + 2) % 16, (start + 4) % 16, (start + 8) % 16}:
        check_copy(device, source, CHUNK_BYTES, other)


@pytest.mark.parametrize("chunk_bytes", [1, 17])
def test_more_chunks_than_one_round_lists(device, chunk_bytes):
    data = noise(17_001 * chunk_bytes)  # all blocks list 64 * 256 chunks at once
    assert device.digest(data, chunk_bytes) == bytes_of(digest_on_cpu(data, chunk_bytes))
    check_copy(device, data, chunk_bytes)


def test_any_length_alignment_and_chunk_size(device):
    random = Random(5)
    for _ in range(60):
        data = noise(int(10 ** random.uniform(0, 5)), random.randrange(16))
        chunk_bytes = max(1, int(data.nbytes / random.uniform(0.5, 50)))
        assert device.digest(data, chunk_bytes) == xxh3(bytes_of(data), chunk_bytes)
        check_copy(device, data, chunk_bytes, random.randrange(16))


def test_what_the_runtime_refuses_is_raised_in_its_words(device, monkeypatch):
    monkeypatch.setattr(f"{__name__}.DEVICE", 7)
    with pytest.raises(RuntimeError, match=r"choosing device 7: invalid device ordinal \(cudaErrorInvalid"):
        device.digest(noise(100), 10)
    monkeypatch.undo()
    assert device.digest(noise(100), 10) == xxh3(bytes_of(noise(100)), 10)


@pytest.mark.parametrize("nbytes", [0, 1, 16, 100_003])
def test_memory_is_read_to_the_last_byte(native, nbytes):
    data, sink = noise(nbytes), Room(8)
    native.cuda_read(data.data_ptr(), nbytes, sink.address, DEVICE, STREAM)
    words = data[: nbytes // 16 * 16].view(torch.int64)
    assert sink.data.view(torch.int64).item() == (words.sum() + data[words.nbytes :].sum()).item()
    sink.check()


class Saves:
    """A state on the device, saved as delta saves would do it: all of it into an image, then what changed.

    Args:
        native: the bindings.
        tensors: the state.
        chunk_bytes: bytes of a chunk.
    """

    def __init__(self, native: ModuleType, tensors: Sequence[Tensor], chunk_bytes: int):
        self.native, self.tensors, self.chunk_bytes = native, tensors, chunk_bytes
        self.pieces = [
            tensor[start : start + chunk_bytes]
            for tensor in tensors
            for start in range(0, tensor.nbytes, chunk_bytes)
        ]
        self.count = len(self.pieces)
        self.image = Room(sum(tensor.nbytes for tensor in tensors), start=8)
        self.chunks = Room(RECORD_BYTES * self.count)
        self.now, self.known = Room(16 * self.count), Room(16 * self.count)
        self.changed, self.changed_count, self.queue = Room(4 * self.count), Room(4), Room(4)
        self.staging = Room(self.count * chunk_bytes, start=4)
        sources = [tensor.data_ptr() for tensor in tensors]
        lengths = [tensor.nbytes for tensor in tensors]
        targets = [self.image.address + sum(lengths[:i]) for i in range(len(lengths))]
        place = (self.chunks.address, DEVICE, STREAM)
        native.cuda_list_chunks(sources, lengths, targets, chunk_bytes, *place)

    def digest(self, table: Room, copy: bool = False) -> None:
        tables = (table.address, self.queue.address)
        self.native.cuda_digest(self.chunks.address, self.count, *tables, DEVICE, STREAM, copy=copy)
        assert bytes_of(table.data) == b"".join(xxhash.xxh3_128_digest(bytes_of(p)) for p in self.pieces)

    def find(self) -> list[int]:
        """Returns the numbers of the chunks that are not as known, in the order in which they are gathered."""
        tables = (self.now.address, self.known.address, self.count)
        self.native.cuda_find_changed(
            *tables, self.changed.address, self.changed_count.address, DEVICE, STREAM
        )
        found = self.changed_count.data.view(torch.int32).item()
        return self.changed.data.view(torch.int32)[:found].tolist()

    def gather(self, most: int, staging: int) -> None:
        listed = (self.chunks.address, self.changed.address, self.changed_count.address)
        self.native.cuda_gather_changed(*listed, most, staging, self.chunk_bytes, DEVICE, STREAM)

    def check(self) -> None:
        for room in vars(self).values():
            if isinstance(room, Room):
                room.check()


def state() -> tuple[Tensor, list[Tensor]]:
    """More tensors than one launch lists, at any alignment; the first result is the memory that they lie in."""
    random = Random(0)
    lengths = [0, 1, 240, 241, 999, 1000, 1001, 5 * CHUNK_BYTES, 0, (1 << 16) + 1, 250_007]
    lengths += [random.choice((0, 4, 500, 1000, 2500)) for _ in range(120)]
    memory, tensors, end = noise(sum(lengths) + 16 * len(lengths)), [], 0
    for length in lengths:
        end += random.randrange(16)
        tensors.append(memory[end : end + length])
        end += length
    return memory, tensors


@pytest.mark.parametrize("chunk_bytes", [240, 1000, CHUNK_BYTES, 150_000])
@pytest.mark.parametrize("percent", [0, 1, 20, 100])
def test_a_delta_save_finds_and_gathers_what_changed(native, chunk_bytes, percent):
    memory, tensors = state()
    saves = Saves(native, tensors, chunk_bytes)
    saves.digest(saves.known, copy=True)
    assert bytes_of(saves.image.data) == b"".join(map(bytes_of, tensors))

    random = Random(percent)
    changes = random.sample(range(saves.count), -(-saves.count * percent // 100))
    for number in changes:  # one bit, often in the first or the last byte
        piece = saves.pieces[number]
        piece[random.choice((0, -1, random.randrange(piece.nbytes)))] ^= 1 << random.randrange(8)
    before = bytes_of(memory)
    saves.digest(saves.now)
    found = saves.find()
    assert sorted(found) == sorted(changes)
    assert bytes_of(saves.known.data) == bytes_of(saves.now.data)

    saves.gather(saves.count, saves.staging.address)
    staged = bytearray([CANARY]) * saves.staging.data.nbytes
    for place, number in enumerate(found):
        data = bytes_of(saves.pieces[number])
        staged[place * chunk_bytes : place * chunk_bytes + len(data)] = data
    assert bytes_of(saves.staging.data) == staged

    saves.gather(len(changes), 0)  # brings the image up to date
    assert bytes_of(saves.image.data) == b"".join(map(bytes_of, tensors))

    saves.digest(saves.now)
    assert saves.find() == []
    saves.staging.data.fill_(CANARY)
    saves.gather(saves.count, saves.staging.address)
    assert set(bytes_of(saves.staging.data)) == {CANARY}
    assert bytes_of(memory) == before
    saves.check()
