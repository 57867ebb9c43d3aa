"""Digests as torch ops: `torch.ops.dtruntime.digest` and `copy_digest_`, on CPU and CUDA.

They are there once this module is imported; `import dtruntime_torch` does so if torch was imported before.

`digest(Tensor self, int chunk_bytes) -> Tensor` digests a tensor's bytes chunk by chunk.
`copy_digest_(Tensor(a!) dst, Tensor src, int chunk_bytes) -> Tensor` copies `src` into `dst` and digests what
arrived, in one pass over the memory.

Args:
    self, src: of any dtype and shape, contiguous (`is_contiguous()`). The bytes are those of its elements, row by
        row, as they lie in memory.
    dst: contiguous, on the same device, of the same dtype and number of elements; no memory in common with `src`.
    chunk_bytes: bytes of a chunk, at least 1. The last chunk may be shorter.

Returns:
    (number of chunks, 2), int64, on the same device, fresh. The 16 bytes of a row are the XXH3-128 of the chunk in
    canonical form, as `_C.digest` gives them: `.cpu().numpy().tobytes()` is what a manifest holds. Without
    elements: (0, 2).

Raises:
    UnsupportedType: the bytes of a tensor are not its elements (sparse, nested, quantized, a view that conjugates or
        negates), it is on another kind of device, or its memory was given back.
    InvalidArgument: anything else that does not hold; nothing was written.
    RuntimeError: CUDA failed, or this is a build without CUDA.

On the CPU they use `torch.get_num_threads()` threads. On CUDA they are enqueued on the current stream without waiting
and can be captured into a CUDA graph. Under torch.compile they break no graph.

Neither is differentiable: they read a tensor as its `detach()`. A `dst` that requires grad is refused where grad mode is
on, as is an inference tensor outside inference mode; a write counts in its version, so that autograd finds values that it
saved and that have changed. A tensor subclass is asked first, as for every op: a DTensor refuses, take its `to_local()`.

XXH3: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md

Example:
    >>> import torch
    >>> import dtruntime_torch.ops
    >>> digests = torch.ops.dtruntime.digest(torch.tensor([1, 2, 3], dtype=torch.uint8), chunk_bytes=2)
    >>> digests.shape, digests.numpy().tobytes()[:16].hex()
    (torch.Size([2, 2]), 'd2f0f9428898845f08130b77ddef5807')
    >>> target = torch.zeros(3, dtype=torch.uint8)
    >>> copied = torch.ops.dtruntime.copy_digest_(target, torch.tensor([1, 2, 3], dtype=torch.uint8), 2)
    >>> target.tolist(), torch.equal(copied, digests)
    ([1, 2, 3], True)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import Library, fallthrough_kernel

from dtruntime_torch import _C
from dtruntime_torch.checkpoint.specs import DIGEST_BYTES, digest_length
from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.op_checks import check_copy, check_disjoint, check_memory, check_source, refusal

# csrc/cuda/digest.h: bytes of a DeviceChunk and of the queue, and the number of chunks that a list stays below.
CHUNK_RECORD_BYTES = 24
QUEUE_BYTES = 4
CHUNKS_LIMIT = 1 << 31

# The keys under which torch hands over a tensor whose bytes are not its elements, or one on another device.
REFUSED_KEYS = ("CompositeExplicitAutograd", "Conjugate", "Negative", "NestedTensorCPU", "NestedTensorCUDA")


def _digest_meta(self: Tensor, chunk_bytes: int) -> Tensor:
    check_source(self, "self", chunk_bytes)
    return _new_digests(self, chunk_bytes)


def _copy_digest_meta(dst: Tensor, src: Tensor, chunk_bytes: int) -> Tensor:
    check_copy(dst, src, chunk_bytes)
    increment_version(dst)
    return _new_digests(src, chunk_bytes)


def _digest_cpu(self: Tensor, chunk_bytes: int) -> Tensor:
    check_source(self, "self", chunk_bytes)
    check_memory(self, "self")
    digests = _new_digests(self, chunk_bytes)
    threads = torch.get_num_threads()
    _C.digest_into(digests.data_ptr(), self.data_ptr(), self.nbytes, chunk_bytes, threads)
    return digests


def _copy_digest_cpu(dst: Tensor, src: Tensor, chunk_bytes: int) -> Tensor:
    check_copy(dst, src, chunk_bytes)
    check_disjoint(dst, src)
    digests = _new_digests(src, chunk_bytes)
    increment_version(dst)
    threads = torch.get_num_threads()
    _C.copy_digest_into(digests.data_ptr(), dst.data_ptr(), src.data_ptr(), src.nbytes, chunk_bytes, threads)
    return digests


def _digest_cuda(self: Tensor, chunk_bytes: int) -> Tensor:
    check_source(self, "self", chunk_bytes)
    check_memory(self, "self")
    return _enqueue(self, None, chunk_bytes, torch.cuda.current_stream(self.device).cuda_stream)


def _copy_digest_cuda(dst: Tensor, src: Tensor, chunk_bytes: int) -> Tensor:
    check_copy(dst, src, chunk_bytes)
    check_disjoint(dst, src)
    return _enqueue(src, dst, chunk_bytes, torch.cuda.current_stream(src.device).cuda_stream)


def _enqueue(source: Tensor, target: Tensor | None, chunk_bytes: int, stream: int) -> Tensor:
    """Has the current stream digest `source`, and copy it to `target` if that is given."""
    count = _count_chunks(source, chunk_bytes)
    if count >= CHUNKS_LIMIT:
        raise InvalidArgument(
            f"{source.nbytes} bytes have {count} chunks of {chunk_bytes} bytes, and fewer than 2**31 are possible "
            f"on a device; give larger chunk_bytes"
        )
    digests = _new_digests(source, chunk_bytes)
    if target is not None:
        increment_version(target)
    if count > 0:
        # Free again when this returns: the allocator gives it only to what the stream does later.
        scratch_bytes = count * CHUNK_RECORD_BYTES + QUEUE_BYTES
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=source.device)
        chunks = scratch.data_ptr()
        queue = chunks + count * CHUNK_RECORD_BYTES
        sources, lengths = [source.data_ptr()], [source.nbytes]
        targets = [] if target is None else [target.data_ptr()]
        device = source.get_device()
        copy = target is not None
        # By torch, which never makes a context on a device that this process does not use; CUDA's own way back to
        # the device before would.
        with torch.cuda.device(device):
            _C.cuda_list_chunks(sources, lengths, targets, chunk_bytes, chunks, device, stream)
            _C.cuda_digest(chunks, count, digests.data_ptr(), queue, device, stream, copy)
    return digests


def _new_digests(source: Tensor, chunk_bytes: int) -> Tensor:
    return torch.empty((_count_chunks(source, chunk_bytes), 2), dtype=torch.int64, device=source.device)


def _count_chunks(source: Tensor, chunk_bytes: int) -> int:
    nbytes = source.numel() * source.element_size()  # not source.nbytes: that is never symbolic
    return digest_length(nbytes, chunk_bytes) // DIGEST_BYTES


def _refuse_digest(self: Tensor | None, chunk_bytes: int) -> Tensor:
    raise refusal(self=self)


def _refuse_copy_digest(dst: Tensor | None, src: Tensor | None, chunk_bytes: int) -> Tensor:
    raise refusal(dst=dst, src=src)


KERNELS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "digest(Tensor self, int chunk_bytes) -> Tensor": {
        "CPU": _digest_cpu,
        "CUDA": _digest_cuda,
        "Meta": _digest_meta,
        **dict.fromkeys(REFUSED_KEYS, _refuse_digest),
    },
    "copy_digest_(Tensor(a!) dst, Tensor src, int chunk_bytes) -> Tensor": {
        "CPU": _copy_digest_cpu,
        "CUDA": _copy_digest_cuda,
        "Meta": _copy_digest_meta,
        **dict.fromkeys(REFUSED_KEYS, _refuse_copy_digest),
    },
}


def _register() -> Library:
    library = Library("dtruntime", "DEF")  # type: ignore[no-untyped-call]
    for schema, kernels in KERNELS.items():
        name = schema.partition("(")[0]
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
        for key, kernel in kernels.items():
            library.impl(name, kernel, key)  # type: ignore[no-untyped-call]
        # Nothing is differentiated, and what is written counts in its version by itself.
        library.impl(name, fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
    return library


# The ops live as long as the process, whatever becomes of this module: each kernel refers to its globals, and so to
# the library. A module that is loaded again finds them.
if not hasattr(torch.ops.dtruntime, "digest"):
    _library = _register()
