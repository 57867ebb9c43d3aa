"""Writes the golden vectors and the boundary table as a C++ header: `python -m tests.native.make_vectors OUT`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests import boundaries

VECTORS = Path(__file__).parents[1] / "vectors"

HEADER = """\
// Made from tests/vectors and tests/boundaries.py by tests/native/make_vectors.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dtruntime::vectors {{

// Digests as hex; byte i of the data is i % 251.
struct Whole {{
  size_t length;
  std::string digest;
}};
struct Chunked {{
  size_t length, chunk_bytes;
  std::string digests;
}};
struct Permuted {{
  uint64_t n, seed, epoch, start, stride;
  std::vector<uint64_t> values;
}};

inline const std::vector<Whole> kWhole = {whole};
inline const std::vector<Chunked> kChunked = {chunked};
inline constexpr int kPermutationVersion = {version};
inline const std::vector<Permuted> kPermuted = {permuted};
inline const std::vector<size_t> kLengths = {lengths};
inline const std::vector<uint64_t> kCounts = {counts};

}}  // namespace dtruntime::vectors
"""


def literal(value: Any) -> str:
    if isinstance(value, int):
        return f"{value}u"
    return json.dumps(value) if isinstance(value, str) else braced(map(literal, value))


def braced(literals: Iterable[str]) -> str:
    return "{" + ", ".join(literals) + "}"


def records(cases: list[dict[str, Any]], *fields: str) -> str:
    return braced(literal([case[field] for field in fields]) for case in cases)


def header() -> str:
    digest = json.loads((VECTORS / "digest.json").read_text())
    permutation = json.loads((VECTORS / "permutation.json").read_text())
    return HEADER.format(
        whole=records(digest["whole"], "length", "digest"),
        chunked=records(digest["chunked"], "length", "chunk_bytes", "digests"),
        version=permutation["version"],
        permuted=records(permutation["cases"], "n", "seed", "epoch", "start", "stride", "values"),
        lengths=literal(boundaries.LENGTHS),
        counts=literal(boundaries.COUNTS),
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(header())
