"""`torch.ops.dtruntime` beside PyPI xxhash: what is digested and copied, what autograd sees, and how they are registered."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import xxhash
from torch import Tensor

from dtruntime_torch import _C, ops
from dtruntime_torch.errors import InvalidArgument
from tests.boundaries import CHUNK_BYTES, LENGTHS

digest = torch.ops.dtruntime.digest
copy_digest_ = torch.ops.dtruntime.copy_digest_

QUANTIZED = {torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4}
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)} - QUANTIZED, key=str)


def bytes_of(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def xxh3(data: bytes, chunk_bytes: int) -> bytes:
    chunks = (data[i : i + chunk_bytes] for i in range(0, len(data), chunk_bytes))
    return b"".join(xxhash.xxh3_128_digest(chunk) for chunk in chunks)


def noise(nbytes: int) -> Tensor:
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk_bytes", [1000, CHUNK_BYTES, 1 << 20])
def test_digests_are_those_of_xxhash(length, chunk_bytes):
    data = noise(length)
    assert bytes_of(digest(data, chunk_bytes)) == xxh3(bytes_of(data), chunk_bytes)


def test_digests_are_what_a_manifest_holds():
    data = noise(10_000)
    assert digest(data, CHUNK_BYTES).numpy().tobytes() == _C.digest(data.numpy(), CHUNK_BYTES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_is_digested_and_copied_as_its_bytes(dtype):
    source = noise(64 * dtype.itemsize).view(dtype).view(8, 8)
    target = torch.zeros(64 * dtype.itemsize, dtype=torch.uint8).view(dtype).view(8, 8)
    expected = xxh3(bytes_of(source), 100)
    assert bytes_of(digest(source, 100)) == expected
    assert bytes_of(copy_digest_(target, source, 100)) == expected
    assert bytes_of(target) == bytes_of(source)


@pytest.mark.parametrize("start", [1, 7, 64])
def test_a_view_is_digested_from_its_own_start(start):
    data = noise(10_000)
    view = data[start:-3]
    assert bytes_of(digest(view, CHUNK_BYTES)) == xxh3(bytes_of(data)[start:-3], CHUNK_BYTES)


def test_the_result_is_a_row_of_two_integers_a_chunk():
    digests = digest(torch.zeros(5, 7), 50)
    assert digests.shape == (3, 2) and digests.dtype == torch.int64 and digests.device.type == "cpu"
    assert digest(torch.tensor(1.0), 50).shape == (1, 2)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 5)])
def test_without_elements_there_is_no_digest(shape):
    empty = torch.zeros(shape)
    assert digest(empty, 1).shape == (0, 2)
    assert copy_digest_(torch.zeros(shape), empty, 1).shape == (0, 2)


def test_the_default_device_does_not_matter():
    data = noise(100)
    with torch.device("meta"):
        assert bytes_of(digest(data, 64)) == xxh3(bytes_of(data), 64)


@pytest.mark.parametrize("length", LENGTHS)
def test_what_is_copied_arrives_and_nothing_beside_it(length):
    source, around = noise(length), torch.full((length + 2,), 0xAA, dtype=torch.uint8)
    digests = copy_digest_(around[1:-1], source, CHUNK_BYTES)
    assert bytes_of(around) == b"\xaa" + bytes_of(source) + b"\xaa"
    assert bytes_of(digests) == xxh3(bytes_of(source), CHUNK_BYTES)


def test_shapes_may_differ_where_the_bytes_do_not():
    source, target = torch.arange(12.0).view(3, 4), torch.zeros(12)
    copy_digest_(target, source, 16)
    assert torch.equal(target, source.view(12))


def test_halves_of_one_tensor_may_be_copied_to_each_other():
    whole = noise(2000)
    copy_digest_(whole[1000:], whole[:1000], 64)
    assert torch.equal(whole[1000:], whole[:1000])


@pytest.mark.parametrize("threads", [1, 3])
def test_they_use_as_many_threads_as_torch(threads, monkeypatch):
    used = []
    fake = SimpleNamespace(
        digest_into=lambda *arguments: used.append(arguments[-1]),
        copy_digest_into=lambda *arguments: used.append(arguments[-1]),
    )
    monkeypatch.setattr(ops, "_C", fake)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        digest(noise(10), 5)
        copy_digest_(noise(10), noise(10), 5)
    finally:
        torch.set_num_threads(before)
    assert used == [threads, threads]


def test_a_parameter_is_digested_without_history():
    parameter = torch.nn.Parameter(torch.ones(10))
    digests = digest(parameter, 16)
    assert not digests.requires_grad and digests.grad_fn is None
    assert torch.equal(digests, digest(parameter.detach(), 16))


def test_a_copy_of_a_parameter_has_no_history():
    parameter, target = torch.nn.Parameter(torch.ones(10)), torch.zeros(10)
    digests = copy_digest_(target, parameter, 16)
    assert torch.equal(target, parameter)
    assert not target.requires_grad and not digests.requires_grad


def test_a_parameter_is_a_target_where_grad_mode_is_off():
    parameter = torch.nn.Parameter(torch.zeros(10))
    with torch.no_grad():
        copy_digest_(parameter, torch.ones(10), 16)
    assert torch.equal(parameter, torch.ones(10)) and parameter.is_leaf and parameter.requires_grad


def test_autograd_finds_that_a_saved_value_was_overwritten():
    weight, data = torch.ones(3, requires_grad=True), torch.ones(3)
    loss = (weight * data).sum()
    copy_digest_(data, torch.zeros(3), 16)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_digesting_does_not_count_as_writing():
    data = torch.ones(3)
    digest(data, 16)
    copy_digest_(torch.zeros(3), data, 16)
    assert data._version == 0


def test_an_inference_tensor_is_written_in_inference_mode():
    with torch.inference_mode():
        target = torch.zeros(3)
        copy_digest_(target, torch.ones(3), 16)
        assert torch.equal(target, torch.ones(3))


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_package_registers_them_if_torch_is_there():
    run(
        "import torch, dtruntime_torch\n"
        "assert torch.ops.dtruntime.digest(torch.ones(1), 4).shape == (1, 2)"
    )


def test_without_torch_the_package_stays_without_it():
    run(
        "import sys, dtruntime_torch\n"
        "assert 'torch' not in sys.modules and 'dtruntime_torch.ops' not in sys.modules\n"
        "import torch, dtruntime_torch.ops\n"
        "assert torch.ops.dtruntime.digest(torch.ones(1), 4).shape == (1, 2)"
    )


def test_they_survive_that_the_module_is_loaded_again():
    run(
        "import gc, importlib, sys, torch, dtruntime_torch.ops\n"
        "importlib.reload(dtruntime_torch.ops)\n"
        "for name in [name for name in sys.modules if name.startswith('dtruntime_torch')]: del sys.modules[name]\n"
        "del dtruntime_torch; gc.collect()\n"
        "import dtruntime_torch.ops\n"
        "gc.collect()\n"
        "assert torch.ops.dtruntime.digest(torch.ones(1), 4).shape == (1, 2)"
    )


class Device:
    """The functions that `_enqueue` calls, as `_C.pyi` describes them, done at once in the host's memory."""

    def __init__(self) -> None:
        self.streams: list[tuple[int, int]] = []

    def cuda_list_chunks(self, sources, lengths, targets, chunk_bytes, chunks, device, stream):
        self.streams.append((device, stream))
        records = []
        for i, (source, length) in enumerate(zip(sources, lengths, strict=True)):
            for start in range(0, length, chunk_bytes):
                target = targets[i] + start if targets else 0
                records += [source + start, min(chunk_bytes, length - start), target]
        assert chunks % 8 == 0
        ctypes.memmove(chunks, (ctypes.c_uint64 * len(records))(*records), 8 * len(records))

    def cuda_digest(self, chunks, count, digests, queue, device, stream, copy=False):
        self.streams.append((device, stream))
        assert digests % 16 == 0 and queue % 4 == 0 and queue >= chunks + 24 * count
        ctypes.memset(queue, 0xFF, 4)
        records = (ctypes.c_uint64 * (3 * count)).from_address(chunks)
        for i in range(count):
            source, length, target = records[3 * i : 3 * i + 3]
            _C.digest_into(digests + 16 * i, source, length, length)
            if copy:
                ctypes.memmove(target, source, length)


@pytest.fixture
def device(monkeypatch) -> Device:
    """Lets the CUDA kernels run on host tensors."""
    fake = Device()
    monkeypatch.setattr(ops, "_C", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    return fake


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 100_000])
def test_on_a_device_chunks_are_listed_and_digested(length, device):
    data = noise(length)
    assert bytes_of(ops._digest_cuda(data, CHUNK_BYTES)) == xxh3(bytes_of(data), CHUNK_BYTES)


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 100_000])
def test_on_a_device_chunks_are_copied_to_their_places(length, device):
    source, target = noise(length), torch.zeros(length, dtype=torch.uint8)
    digests = ops._copy_digest_cuda(target, source, CHUNK_BYTES)
    assert bytes_of(digests) == xxh3(bytes_of(source), CHUNK_BYTES)
    assert torch.equal(target, source)
    assert target._version == 1


def test_on_a_device_all_work_goes_to_the_current_stream(device):
    ops._digest_cuda(noise(10), 5)
    assert device.streams == [(-1, 77)] * 2  # torch's number for the host


@pytest.mark.parametrize("kernel", [ops._copy_digest_cuda, ops._copy_digest_cpu])
def test_both_kernels_refuse_before_they_write(kernel, device):
    whole = noise(100)
    before = whole.clone()
    with pytest.raises(InvalidArgument):
        kernel(whole[1:], whole[:-1], 10)
    assert torch.equal(whole, before) and whole._version == 0


def test_a_device_refuses_more_chunks_than_it_can_number(device):
    with pytest.raises(InvalidArgument, match="2147483648 chunks of 1 bytes"):
        ops._enqueue(torch.empty(1 << 31, dtype=torch.uint8, device="meta"), None, 1, 0)


@pytest.mark.skipif(_C.build_info()["cuda"] is not False, reason="shows what a build without CUDA says")
def test_a_build_without_cuda_says_how_to_build_with_it():
    with pytest.raises(RuntimeError, match="CUDA_HOME"):
        ops._enqueue(noise(10), None, 5, stream=0)


# In this order: where torch finds none, a driver that is too old for the module is no error here.
found_gpu = torch.cuda.is_available() and _C.cuda_device_count() > 0
on_a_gpu = pytest.mark.skipif(not found_gpu, reason="needs a GPU and a build with CUDA")


@on_a_gpu
@pytest.mark.parametrize("chunk_bytes", [1000, CHUNK_BYTES, 1 << 20])
def test_a_gpu_gives_the_same_digests(chunk_bytes):
    for length in LENGTHS:
        source = noise(length)
        expected = xxh3(bytes_of(source), chunk_bytes)
        target = torch.zeros(length, dtype=torch.uint8, device="cuda")
        for digests in (digest(source.cuda(), chunk_bytes), copy_digest_(target, source.cuda(), chunk_bytes)):
            assert digests.is_cuda and bytes_of(digests.cpu()) == expected, length
        assert torch.equal(target.cpu(), source)


@on_a_gpu
def test_on_a_gpu_work_is_done_in_the_order_of_its_stream():
    data = torch.zeros(1 << 26, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        data.fill_(1)
        ones = digest(data, 1 << 20)
        data.fill_(2)
        twos = digest(data, 1 << 20)
    stream.synchronize()
    for digests, byte in ((ones, b"\x01"), (twos, b"\x02")):
        assert bytes_of(digests.cpu()) == xxh3(byte * (1 << 20), 1 << 20) * 64


@on_a_gpu
def test_on_a_gpu_they_can_be_captured_into_a_graph():
    source, target = torch.zeros(100_000, device="cuda"), torch.zeros(100_000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        digests = copy_digest_(target, source, CHUNK_BYTES)
        again = digest(target, CHUNK_BYTES)
    for value in (1.0, 2.0):
        source.fill_(value)
        graph.replay()
        assert torch.equal(target, source)
        assert bytes_of(digests.cpu()) == bytes_of(again.cpu()) == xxh3(bytes_of(source.cpu()), CHUNK_BYTES)
