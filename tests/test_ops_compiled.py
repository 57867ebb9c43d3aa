"""`torch.ops.dtruntime` where no data is: opcheck, fake and meta tensors, torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import dtruntime_torch.ops  # noqa: F401 -- registers the ops
from dtruntime_torch.errors import InvalidArgument, UnsupportedType

digest = torch.ops.dtruntime.digest
copy_digest_ = torch.ops.dtruntime.copy_digest_

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.complex64,
]  # those that opcheck can compare
CHUNK = 7


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (5, 3), ()], ids=str)
def test_torch_finds_digest_well_made(dtype, shape):
    torch.library.opcheck(digest.default, (torch.zeros(shape, dtype=dtype), CHUNK))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (5, 3), ()], ids=str)
def test_torch_finds_copy_digest_well_made(dtype, shape):
    dst, src = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=torch.uint8).to(dtype)
    torch.library.opcheck(copy_digest_.default, (dst, src, CHUNK))


def test_torch_finds_them_well_made_where_gradients_are_asked_for():
    weight = torch.ones(5, 3, requires_grad=True)
    torch.library.opcheck(digest.default, (weight, CHUNK))
    torch.library.opcheck(copy_digest_.default, (torch.zeros(5, 3), weight, CHUNK))


def digest_of_a_product(x: Tensor) -> Tensor:
    return digest(x * 2, CHUNK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_digest_compiles_into_one_graph(backend, dynamic):
    compiled = torch.compile(digest_of_a_product, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (0, 1, 5, 8):
        x = torch.arange(3.0 * rows).view(rows, 3)
        assert torch.equal(compiled(x), digest_of_a_product(x))


def copy_into_a_parameter(dst: Tensor, src: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        digests = copy_digest_(dst, src, CHUNK)
    return digests, dst + 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_copy_digest_compiles_into_one_graph(backend, dynamic):
    compiled = torch.compile(copy_into_a_parameter, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (0, 1, 5, 8):
        parameter, source = torch.nn.Parameter(torch.zeros(rows, 3)), torch.arange(3.0 * rows).view(rows, 3)
        version = parameter._version
        digests, after = compiled(parameter, source)
        assert torch.equal(digests, digest(source, CHUNK))
        assert torch.equal(parameter, source) and torch.equal(after, source + 1)
        assert parameter._version > version


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_beside_a_digest_has_its_gradient(backend):
    def step(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        return (x * x).sum(), copy_digest_(kept, x, CHUNK)

    x, kept = torch.arange(3.0, requires_grad=True), torch.zeros(3)
    loss, digests = torch.compile(step, fullgraph=True, backend=backend)(x, kept)
    loss.backward()
    assert torch.equal(x.grad, 2 * x) and torch.equal(kept, x)
    assert torch.equal(digests, digest(x, CHUNK)) and not digests.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_length_that_depends_on_data_breaks_no_graph(backend):
    def digest_of_places(x: Tensor) -> Tensor:
        return digest(x.nonzero(), CHUNK)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(digest_of_places, fullgraph=True, backend=backend)
        for x in (torch.tensor([1.0, 0, 2]), torch.ones(7), torch.zeros(2)):
            assert torch.equal(compiled(x), digest_of_places(x))


def test_the_size_of_a_chunk_may_change():
    compiled = torch.compile(
        lambda x, chunk_bytes: digest(x, chunk_bytes), fullgraph=True, backend="aot_eager"
    )
    x = torch.arange(10.0)
    for chunk_bytes in (7, 16, 1 << 40):
        assert torch.equal(compiled(x, chunk_bytes), digest(x, chunk_bytes))


@pytest.mark.slow
def test_the_compiler_keeps_what_is_digested_contiguous():
    convolution = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)

    def digest_of_a_convolution(x: Tensor) -> tuple[Tensor, Tensor]:
        y = convolution(x).contiguous()
        return digest(y, 256), y

    digests, y = torch.compile(digest_of_a_convolution, fullgraph=True)(torch.ones(2, 3, 16, 16))
    assert torch.equal(digests, digest(y, 256))


def test_an_error_is_met_while_compiling():
    compiled = torch.compile(lambda x: digest(x.t(), CHUNK), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="self is not contiguous"):
        compiled(torch.zeros(2, 3))


def test_a_program_with_a_digest_can_be_exported():
    class Digest(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return digest(x, CHUNK)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Digest(), (torch.zeros(4, 3),), dynamic_shapes=({0: rows},))
    x = torch.arange(27.0).view(9, 3)
    assert torch.equal(program.module()(x), digest(x, CHUNK))


@pytest.mark.parametrize(("length", "chunks"), [(0, 0), (1, 1), (6, 1), (7, 1), (8, 2), (14, 2), (15, 3)])
def test_on_meta_there_are_as_many_chunks(length, chunks):
    data = torch.empty(length, dtype=torch.uint8, device="meta")
    for digests in (digest(data, CHUNK), copy_digest_(torch.empty_like(data), data, CHUNK)):
        assert digests.shape == (chunks, 2) and digests.dtype == torch.int64 and digests.is_meta


def test_on_meta_the_same_is_refused():
    data = torch.empty(2, 3, device="meta")
    with pytest.raises(InvalidArgument, match="contiguous"):
        digest(data.t(), CHUNK)
    with pytest.raises(InvalidArgument, match="elements"):
        copy_digest_(data, data[0], CHUNK)
    with pytest.raises(UnsupportedType, match="resolve_conj"):
        digest(torch.empty(3, dtype=torch.complex64, device="meta").conj(), CHUNK)


def test_on_meta_a_write_counts():
    target = torch.empty(3, device="meta")
    copy_digest_(target, torch.empty(3, device="meta"), CHUNK)
    assert target._version == 1


def test_a_symbolic_length_gives_a_symbolic_number_of_chunks():
    any_size = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
    real = torch.ones(10, 3)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        digests = digest(mode.from_tensor(real, symbolic_context=any_size), CHUNK)
        assert isinstance(digests.shape[0], torch.SymInt)
        assert digests.shape == (18, 2) and digests.device.type == "cpu"
