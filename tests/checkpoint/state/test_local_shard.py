"""Which tensors can be stored, and what lies on a rank. DTensors on several ranks: tests/distributed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.two_tensor import TwoTensor

from dtruntime_torch.checkpoint.dtypes import is_known
from dtruntime_torch.checkpoint.state.local_shard import (
    BoxFinder,
    dtype_name,
    is_dtensor,
    local_tensor,
    require_member,
)
from dtruntime_torch.errors import InvalidArgument, UnsupportedType


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class ShardedTensorBase(torch.Tensor):
    """Called like FSDP1's, which needs two ranks to be made."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=layout)


REFUSED = {
    "meta": (lambda: torch.ones(2, device="meta"), "to_empty"),
    "coo": (lambda: torch.eye(2).to_sparse(), "to_dense"),
    "csr": (lambda: torch.eye(2).to_sparse_csr(), "to_dense"),
    "mkldnn": (lambda: torch.ones(2).to_mkldnn(), "to_dense"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "int_repr"),
    "nested": (lambda: nested(torch.strided), "offsets"),
    "jagged": (lambda: nested(torch.jagged), "offsets"),
    "wrapper": (lambda: TwoTensor(torch.ones(2), torch.ones(2)), "TwoTensor is a wrapper"),
    "wrapper parameter": (lambda: torch.nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2))), "wrapper"),
    "lazy": (lambda: torch.nn.LazyLinear(2).weight, "forward"),
    "lazy buffer": (lambda: torch.nn.LazyBatchNorm1d().running_mean, "forward"),
    "sharded": (lambda: torch.ones(2).as_subclass(ShardedTensorBase), "fully_shard"),
    "dtype": (lambda: torch.ones(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4.*view"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_stored_is_refused_by_name(kind):
    make, advice = REFUSED[kind]
    with pytest.raises(UnsupportedType, match=rf"^net\.w: .*{advice}"):
        local_tensor(make(), "net.w")


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).t(),
        torch.randn(3, 4)[:, ::2],
        torch.randn(1, 4).expand(3, 4),
        torch.nn.Parameter(torch.randn(3)),
        torch.randn(3, requires_grad=True) * 2,
        torch.nn.Buffer(torch.randn(3)),
        torch.randn(3).as_subclass(Subclass),
        torch.tensor(2.5),
        torch.empty(0, 3),
    ],
    ids=lambda t: f"{type(t).__name__}{tuple(t.shape)}{t.stride()}",
)
def test_a_plain_tensor_is_taken_as_it_lies(tensor):
    local = local_tensor(tensor, "w")
    assert (local.data_ptr(), local.shape, local.stride()) == (
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
    )
    assert not local.requires_grad


def test_lazy_bits_are_resolved():
    tensor = torch.randn(3, dtype=torch.complex64)
    conjugate = local_tensor(tensor.conj(), "w")
    negative = local_tensor(tensor.conj().imag, "w")
    assert not conjugate.is_conj()
    assert not negative.is_neg()
    assert torch.equal(torch.view_as_real(conjugate)[:, 1], -torch.view_as_real(tensor)[:, 1])
    assert torch.equal(negative, -tensor.imag)


def test_dtypes_are_named_as_torch_names_them():
    assert dtype_name(torch.ones(1, dtype=torch.bfloat16)) == "bfloat16"
    known = [
        d
        for d in vars(torch).values()
        if isinstance(d, torch.dtype) and is_known(str(d).removeprefix("torch."))
    ]
    assert len(set(known)) == 21


def test_the_box_of_a_plain_tensor_is_all_of_it():
    assert BoxFinder().find(torch.zeros(2, 3), "w") == ((0, 0), (2, 3), "", None, ())


def test_a_dtensor_that_waits_for_a_sum_is_refused(mesh):
    tensor = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(UnsupportedType, match="^w: .*redistribute"):
        BoxFinder().find(tensor, "w")


def test_a_dtensor_is_looked_into(mesh):
    assert is_dtensor(DTensor.from_local(torch.ones(2), mesh, [Replicate()]))
    with pytest.raises(UnsupportedType, match=r"^w: .*TwoTensor"):
        local_tensor(DTensor.from_local(TwoTensor(torch.ones(2), torch.ones(2)), mesh, [Shard(0)]), "w")


def test_a_shard_of_another_shape_than_the_placements_say_is_refused(mesh):
    tensor = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], shape=torch.Size([3]), stride=(1,))
    with pytest.raises(UnsupportedType, match=r"^w: .*\[2\].*\[3\]"):
        BoxFinder().find(tensor, "w")


def test_boxes_of_one_kind_are_found_once(mesh):
    finder = BoxFinder()
    tensors = [DTensor.from_local(torch.zeros(2, 3), mesh, [Shard(1)]) for _ in range(2)]
    assert finder.find(tensors[0], "a") is finder.find(tensors[1], "b")
    assert finder.find(tensors[0], "a").holders == (0,)


def test_a_mesh_of_other_ranks_is_refused(mesh):
    box = BoxFinder().find(DTensor.from_local(torch.zeros(2), mesh, [Shard(0)]), "w")
    require_member(box, 0, "w")
    with pytest.raises(InvalidArgument, match=r"^w: .*ranks \[0\].*rank 3"):
        require_member(box, 3, "w")


@pytest.mark.parametrize("left", [0, 64])
def test_a_tensor_whose_memory_was_given_back_is_refused_by_name(left):
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(left)
    with pytest.raises(UnsupportedType, match="layer.w"):
        local_tensor(tensor, "layer.w")
