"""The native calls for a device, on the memory of the host: what a list of chunks says is done, byte for byte.

A call is given addresses alone, as in the real ones, and reads the same 24 bytes a chunk; so the order and the units of
every argument that gpucheck hands over are tested, too.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

from dtruntime_torch import _C

CHUNK = struct.Struct("<QQQ")  # source, length, target

Charge = Callable[[str, int], None]


class HostNative:
    """Stands in for `_C` in `checkpoint.chunk_table.NativeCalls`.

    Args:
        charge: told the name of each piece of work and its bytes.
        index: the number of the device, as every call has to name it.
        stream: gives the stream that every call has to name.
    """

    def __init__(self, charge: Charge, index: int, stream: Callable[[], int]) -> None:
        self._charge = charge
        self._place = lambda: (index, stream())

    def cuda_list_chunks(
        self,
        sources: Sequence[int],
        lengths: Sequence[int],
        targets: Sequence[int],
        chunk_bytes: int,
        chunks: int,
        device: int,
        stream: int,
    ) -> None:
        assert (device, stream) == self._place()
        assert len(sources) == len(lengths) and len(targets) in (0, len(sources))
        listed = b"".join(
            CHUNK.pack(
                source + start, min(chunk_bytes, length - start), targets[number] + start if targets else 0
            )
            for number, (source, length) in enumerate(zip(sources, lengths, strict=True))
            for start in range(0, length, chunk_bytes)
        )
        ctypes.memmove(chunks, listed, len(listed))

    def cuda_digest(
        self,
        chunks: int,
        count: int,
        digests: int,
        queue: int,
        device: int,
        stream: int,
        copy: bool = False,
    ) -> None:
        assert (device, stream) == self._place() and queue % 4 == 0 and digests % 16 == 0
        total = 0
        for number, (source, length, target) in enumerate(self._listed(chunks, count)):
            data = self.read_bytes(source, length)
            if copy:
                self.write_bytes(target, data)
            ctypes.memmove(digests + 16 * number, self.digest_of(data), 16)
            total += length
        self._charge("copy with digest" if copy else "digest", total)

    def cuda_find_changed(
        self,
        digests: int,
        known: int,
        count: int,
        changed: int,
        changed_count: int,
        device: int,
        stream: int,
    ) -> None:
        assert (device, stream) == self._place()
        new, old = ctypes.string_at(digests, 16 * count), ctypes.string_at(known, 16 * count)
        rows = [row for row in range(count) if self.differ(new[16 * row :][:16], old[16 * row :][:16])]
        # In any order, the contract says.
        self._store_numbers(changed, rows[::-1])
        self._store_numbers(changed_count, [len(rows)])
        ctypes.memmove(known, new, len(new))

    def cuda_gather_changed(
        self,
        chunks: int,
        changed: int,
        changed_count: int,
        most: int,
        staging: int,
        stride: int,
        device: int,
        stream: int,
    ) -> None:
        assert (device, stream) == self._place()
        (count,) = struct.unpack("<I", ctypes.string_at(changed_count, 4))
        assert count <= most
        total = 0
        for number, row in enumerate(struct.unpack(f"<{count}I", ctypes.string_at(changed, 4 * count))):
            ((source, length, target),) = self._listed(chunks + CHUNK.size * row, 1)
            assert length <= stride
            place = staging + number * stride if staging else target
            self.write_bytes(place, self.read_bytes(source, length))
            total += length
        self._charge("gather", total)

    def cuda_read(self, data: int, nbytes: int, sink: int, device: int, stream: int) -> None:
        assert (device, stream) == self._place() and data % 16 == 0
        ctypes.memmove(sink, struct.pack("<Q", len(self.read_bytes(data, nbytes))), 8)
        self._charge("read", nbytes)

    # What a fault in the tests replaces.

    def digest_of(self, data: bytes) -> bytes:
        return _C.digest(data, len(data))

    def read_bytes(self, address: int, length: int) -> bytes:
        return ctypes.string_at(address, length)

    def write_bytes(self, address: int, data: bytes) -> None:
        assert address
        ctypes.memmove(address, data, len(data))

    def differ(self, new: bytes, old: bytes) -> bool:
        return new != old

    def _listed(self, chunks: int, count: int) -> list[tuple[int, int, int]]:
        return list(CHUNK.iter_unpack(ctypes.string_at(chunks, CHUNK.size * count)))

    def _store_numbers(self, address: int, numbers: Sequence[int]) -> None:
        ctypes.memmove(address, struct.pack(f"<{len(numbers)}I", *numbers), 4 * len(numbers))
