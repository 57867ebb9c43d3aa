"""What `torch.ops.dtruntime` refuses, with what words, and that nothing was written then."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import dtruntime_torch.ops  # noqa: F401 -- registers the ops
from dtruntime_torch.errors import InvalidArgument, UnsupportedType

digest = torch.ops.dtruntime.digest
copy_digest_ = torch.ops.dtruntime.copy_digest_

COMPLEX = torch.ones(4, dtype=torch.complex64)


def quiet(make: Callable[[], Tensor]) -> Tensor:
    """Torch warns of some kinds of tensors that they are a prototype, or on their way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


WITHOUT_BYTES = {
    "sparse_coo": (lambda: torch.eye(3).to_sparse(), "to_dense"),
    "sparse_csr": (lambda: torch.eye(3).to_sparse_csr(), "to_dense"),
    "mkldnn": (lambda: torch.ones(3).to_mkldnn(), "to_dense"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "int_repr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "tensors that it holds"),
    "conjugated": (lambda: COMPLEX.conj(), "resolve_conj"),
    "negated": (lambda: COMPLEX.conj().imag, "resolve_neg"),
}


@pytest.mark.parametrize("kind", WITHOUT_BYTES)
def test_a_tensor_whose_bytes_are_not_its_elements_is_refused(kind):
    make, instead = WITHOUT_BYTES[kind]
    with pytest.raises(UnsupportedType, match=f"self is .*{instead}"):
        digest(quiet(make), 16)


@pytest.mark.parametrize("kind", WITHOUT_BYTES)
@pytest.mark.parametrize("name", ["dst", "src"])
def test_it_is_refused_on_both_sides_of_a_copy(kind, name):
    make, instead = WITHOUT_BYTES[kind]
    tensors = {"dst": torch.zeros(3), "src": torch.zeros(3), name: quiet(make)}
    with pytest.raises(UnsupportedType, match=f"{name} is .*{instead}"):
        copy_digest_(tensors["dst"], tensors["src"], 16)


def test_no_tensor_is_refused():
    with pytest.raises(UnsupportedType, match="self is None"):
        digest(None, 16)


@pytest.mark.parametrize("chunk_bytes", [0, -1])
def test_a_chunk_has_at_least_one_byte(chunk_bytes):
    with pytest.raises(InvalidArgument, match="chunk_bytes"):
        digest(torch.ones(3), chunk_bytes)
    with pytest.raises(InvalidArgument, match="chunk_bytes"):
        copy_digest_(torch.zeros(3), torch.ones(3), chunk_bytes)


STRIDED = {
    "transposed": lambda: torch.zeros(3, 4).t(),
    "stepped": lambda: torch.zeros(8)[::2],
    "expanded": lambda: torch.zeros(1).expand(4),
    "channels_last": lambda: torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_a_strided_source_is_refused(kind):
    source = STRIDED[kind]()
    with pytest.raises(InvalidArgument, match=r"self is not contiguous.*give self.contiguous\(\)"):
        digest(source, 16)
    with pytest.raises(InvalidArgument, match=r"src is not contiguous.*give src.contiguous\(\)"):
        copy_digest_(torch.zeros(source.shape), source, 16)


@pytest.mark.parametrize("kind", STRIDED)
def test_a_strided_target_is_refused(kind):
    target = STRIDED[kind]()
    with pytest.raises(InvalidArgument, match="dst is not contiguous"):
        copy_digest_(target, torch.ones(target.shape), 16)
    assert not target.any()


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (torch.ones(5), "5 of torch.float32"),
        (torch.ones(4, dtype=torch.int32), "4 of torch.int32"),
        (torch.ones(8, dtype=torch.float16), "8 of torch.float16"),
        (torch.ones(4, device="meta"), "src on meta"),
    ],
    ids=["length", "dtype", "same bytes", "device"],
)
def test_a_copy_is_between_tensors_that_are_alike(source, what):
    target = torch.zeros(4)
    with pytest.raises(InvalidArgument, match=what):
        copy_digest_(target, source, 16)
    assert not target.any() and target._version == 0


@pytest.mark.parametrize("distance", [0, 1, 99])
def test_a_copy_within_shared_memory_is_refused(distance):
    whole = torch.arange(199, dtype=torch.uint8)
    before = whole.clone()
    for dst, src in [(whole[:100], whole[distance:][:100]), (whole[distance:][:100], whole[:100])]:
        with pytest.raises(InvalidArgument, match="memory in common"):
            copy_digest_(dst, src, 16)
    assert torch.equal(whole, before)


def given_back(kept: int) -> Tensor:
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(kept)
    return tensor


@pytest.mark.parametrize("kept", [0, 15])
def test_a_tensor_whose_memory_was_given_back_is_refused(kept):
    for call in (
        lambda: digest(given_back(kept), 16),
        lambda: copy_digest_(torch.zeros(4), given_back(kept), 16),
        lambda: copy_digest_(given_back(kept), torch.zeros(4), 16),
    ):
        with pytest.raises(UnsupportedType, match=f"needs 16 bytes and its storage has {kept}"):
            call()


def test_a_view_whose_part_of_the_memory_was_given_back_is_refused():
    view = torch.zeros(8)[4:]
    view.untyped_storage().resize_(16)
    with pytest.raises(UnsupportedType, match="needs 32 bytes and its storage has 16"):
        digest(view, 16)


def test_a_leaf_that_requires_grad_is_no_target_in_grad_mode():
    leaf = torch.zeros(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        leaf.copy_(torch.ones(4))  # as torch does
    with pytest.raises(InvalidArgument, match="dst requires grad"):
        copy_digest_(leaf, torch.ones(4), 16)
    assert not leaf.any() and leaf._version == 0


def test_a_value_with_history_is_no_target_in_grad_mode():
    value = torch.zeros(4, requires_grad=True) * 2
    with pytest.raises(InvalidArgument, match="dst requires grad"):
        copy_digest_(value, torch.ones(4), 16)


def test_an_inference_tensor_is_no_target_outside_inference_mode():
    with torch.inference_mode():
        target = torch.zeros(4)
    with pytest.raises(RuntimeError, match="inference tensor"):
        target.copy_(torch.ones(4))  # as torch does
    with pytest.raises(InvalidArgument, match="dst is an inference tensor"):
        copy_digest_(target, torch.ones(4), 16)


@pytest.fixture
def dtensor():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (1,)), [Replicate()])
    finally:
        torch.distributed.destroy_process_group()


def test_a_dtensor_refuses_and_its_local_tensor_does_not(dtensor):
    with pytest.raises(NotImplementedError, match="dtruntime.digest"):
        digest(dtensor, 16)
    with pytest.raises(NotImplementedError, match="dtruntime.copy_digest_"):
        copy_digest_(dtensor, dtensor, 16)
    assert torch.equal(digest(dtensor.to_local(), 16), digest(torch.ones(4), 16))


def test_a_jagged_tensor_refuses():
    jagged = quiet(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged))
    with pytest.raises(NotImplementedError, match="dtruntime.digest"):
        digest(jagged, 16)
