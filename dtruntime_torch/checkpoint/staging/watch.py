"""Notices that host memory was changed while it was being staged, and nobody had asked.

The version that torch counts for a tensor proves a change if it moved. If it did not, that proves nothing: fused and foreach
optimizers, `.data` and BatchNorm's statistics change memory without it. A storage that lies elsewhere than before gave its
memory back, and torch counts nothing when others write there. Digests taken before notice every change that reached the
copy, at the price of reading the memory once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from dtruntime_torch import ops  # noqa: F401  # registers torch.ops.dtruntime


class Watch:
    """Of some tensors, from now on until each is let go, by any thread, and by a signal handler too: it has no lock.

    Args:
        tensors: plain contiguous ones in host memory, by number.
        chunk_bytes: bytes of a chunk.
        by_digest: digests them now.

    Example:
        >>> weight = torch.zeros(4)
        >>> watch = Watch({7: weight}, chunk_bytes=4096)
        >>> _ = weight.add_(1)
        >>> watch.let_go([7])
        >>> watch.moved
        [7]

    Attributes:
        moved: those that had changed when they were let go.
    """

    def __init__(
        self, tensors: Mapping[int, torch.Tensor], chunk_bytes: int, by_digest: bool = False
    ) -> None:
        self.moved: list[int] = []
        self._before = {number: (tensor, _state_of(tensor)) for number, tensor in tensors.items()}
        self._digests = {
            number: torch.ops.dtruntime.digest(tensor, chunk_bytes).numpy().tobytes()
            for number, tensor in tensors.items()
            if by_digest
        }

    def let_go(self, numbers: Collection[int]) -> None:
        """From now on these may change; notes which of them did already."""
        for number in numbers:
            entry = self._before.get(number)
            if entry is None:
                continue
            tensor, before = entry
            # As long as it is there nobody has let it go, so a change that was just seen was not allowed. And it is noted
            # before it is let go, so that who finds it gone finds the note.
            if _state_of(tensor) != before and number in self._before:
                self.moved.append(number)
            self._before.pop(number, None)

    def forget(self) -> None:
        """Keeps none of the tensors any longer."""
        self._before.clear()

    def differ(self, arrived: Mapping[int, bytes]) -> list[int]:
        """Says of which tensors something else arrived than was there.

        Args:
            arrived: number -> digests of what arrived, of any pairs.
        """
        return [number for number, before in self._digests.items() if arrived[number] != before]


def _state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Differs if torch has counted a change, or the memory is other."""
    # What was made in inference mode has no version.
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.untyped_storage().data_ptr()
