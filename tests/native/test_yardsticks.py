"""What the benchmarks of digests compare with does the work that it claims to do."""

from __future__ import annotations

from functools import reduce
from operator import xor
from random import Random

import numpy as np
import pytest

from dtruntime_torch import _C

DATA = Random(5).randbytes((2 << 20) + 320)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_word_is_read(threads):
    assert _C.read_memory(DATA, threads) == reduce(xor, np.frombuffer(DATA, dtype="<u8").tolist())
    for place in (0, 8, 1 << 20, len(DATA) - 1):
        changed = bytearray(DATA)
        changed[place] ^= 1
        assert _C.read_memory(changed, threads) != _C.read_memory(DATA, threads)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000, len(DATA)])
@pytest.mark.parametrize("shift", [0, 1, 63])
def test_a_streaming_copy_is_exact(length, shift, threads):
    target = bytearray(b"\xaa" * (length + 128))
    with memoryview(target) as view:
        _C.copy_streaming(view[shift : shift + length], DATA[:length], threads)
    assert target[shift : shift + length] == DATA[:length]
    assert target[:shift] + target[shift + length :] == b"\xaa" * 128


def test_a_target_of_another_length_is_refused():
    with pytest.raises(ValueError, match="length"):
        _C.copy_streaming(bytearray(5), bytes(6))
