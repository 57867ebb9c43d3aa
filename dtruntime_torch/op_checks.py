"""What the ops refuse before they write anything, and what they say then."""

from __future__ import annotations

import torch
from torch import Tensor

from dtruntime_torch.errors import InvalidArgument, UnsupportedType

KERNELS_ON = ("cpu", "cuda", "meta")


def check_source(tensor: Tensor, name: str, chunk_bytes: int) -> None:
    """Refuses what both ops refuse to read. Asks for no data: a meta or fake tensor will do.

    Raises:
        InvalidArgument: see `ops`.
    """
    if chunk_bytes < 1:
        raise InvalidArgument(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    if not tensor.is_contiguous():
        raise InvalidArgument(f"{name} is not contiguous: {_strides(tensor)}; give {name}.contiguous()")


def check_copy(dst: Tensor, src: Tensor, chunk_bytes: int) -> None:
    """Refuses what `copy_digest_` refuses, as far as that takes no data.

    Raises:
        InvalidArgument: see `ops`.
    """
    check_source(src, "src", chunk_bytes)
    if not dst.is_contiguous():
        raise InvalidArgument(
            f"dst is not contiguous: {_strides(dst)}; give a contiguous one, and copy that to where it belongs"
        )
    if dst.device != src.device:
        raise InvalidArgument(
            f"dst is on {dst.device} and src on {src.device}; copy_digest_ stays on one device, use dst.copy_(src) "
            f"and digest"
        )
    if dst.dtype != src.dtype or dst.numel() != src.numel():
        raise InvalidArgument(
            f"dst has {dst.numel()} elements of {dst.dtype} and src has {src.numel()} of {src.dtype}; copy_digest_ "
            f"copies bytes, so both must be alike"
        )
    if dst.requires_grad and torch.is_grad_enabled():
        raise InvalidArgument(
            "dst requires grad, and copy_digest_ is not differentiable; call it under torch.no_grad(), or give "
            "dst.detach()"
        )
    if dst.is_inference() and not torch.is_inference_mode_enabled():
        raise InvalidArgument(
            "dst is an inference tensor, which is written only in inference mode; call copy_digest_ under "
            "torch.inference_mode(), or give dst.clone()"
        )


def check_disjoint(dst: Tensor, src: Tensor) -> None:
    """Refuses two tensors that share memory, or of which one has none.

    Raises:
        InvalidArgument: they overlap.
        UnsupportedType: see `check_memory`.
    """
    check_memory(dst, "dst")
    check_memory(src, "src")
    if abs(dst.data_ptr() - src.data_ptr()) < src.nbytes:
        raise InvalidArgument(
            f"dst and src have memory in common: {src.nbytes} bytes at {dst.data_ptr():#x} and at "
            f"{src.data_ptr():#x}; give src.clone(), or call digest if they are the same"
        )


def check_memory(tensor: Tensor, name: str) -> None:
    """Refuses a tensor that reaches beyond its storage, as one does whose memory was given back by `resize_`.

    Raises:
        UnsupportedType: names what is missing.
    """
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    there = tensor.untyped_storage().nbytes()
    if there < needed and tensor.numel() > 0:
        raise UnsupportedType(
            f"{name} needs {needed} bytes and its storage has {there}: its memory was given back (offloaded?); "
            f"bring it back first"
        )


def refusal(**tensors: Tensor | None) -> UnsupportedType:
    """The error for tensors for which there is no kernel.

    Args:
        tensors: the arguments of the op by their names.
    """
    found = [f"{name} is {what}" for name, tensor in tensors.items() if (what := _obstacle(tensor))]
    return UnsupportedType(f"only dense tensors on CPU and CUDA have digests: {', '.join(found)}")


def _strides(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}, strides {list(tensor.stride())}"


def _obstacle(tensor: Tensor | None) -> str | None:
    """Why a tensor's bytes cannot be taken for its elements, and what to give instead."""
    if tensor is None:
        return "None"
    if tensor.is_conj():
        return "conjugated only when it is read (give its resolve_conj())"
    if tensor.is_neg():
        return "negated only when it is read (give its resolve_neg())"
    if tensor.is_quantized:
        return "quantized (give its int_repr(), and keep scale and zero point)"
    if tensor.is_nested:
        return "nested (give the tensors that it holds)"
    if tensor.layout is not torch.strided:
        return f"of layout {tensor.layout} (give its to_dense(), or its indices and values)"
    if tensor.device.type not in KERNELS_ON:
        return f"on {tensor.device} (give its cpu())"
    return None
