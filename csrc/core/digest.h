// XXH3-128 digests of many chunks at once, and copying and digesting in one pass.
//
// A range of bytes is cut into chunks of `chunk_bytes` from its own start; the last may be shorter, and an
// empty range has none. A digest is 16 bytes in canonical (big-endian) form; digests lie in the order of the
// ranges, and within one in the order of its chunks.
//
// All functions may be called from any thread and return only when every byte is done. They keep none of the
// memory that they are given, which nobody may write meanwhile. `threads` as in parallel_for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "status.h"

namespace dtruntime {

struct Range {
  size_t offset;  // bytes
  size_t length;  // bytes
};

// From memory anywhere to a place in an arena. `source` may be null if length is 0.
struct Copy {
  const uint8_t* source;
  Range target;
};

// Stores how many chunks the ranges of a buffer of `nbytes` bytes have together, so that nobody has to make
// room for digests of bytes that do not exist. kInvalid, with *chunks as it was, if chunk_bytes is 0 or a
// range ends after the buffer.
Status count_chunks(std::span<const Range> ranges, size_t nbytes, size_t chunk_bytes, size_t* chunks);

// Stores the digests of `ranges` of `data` at `digests`. REQUIRES: digests holds 16 bytes a chunk.
// kInvalid as count_chunks; nothing is stored then.
Status digest_ranges(std::span<const uint8_t> data, std::span<const Range> ranges, size_t chunk_bytes,
                     unsigned threads, uint8_t* digests);

// Copies each source to its target in `arena` and stores the digests of what arrived there.
// REQUIRES: digests holds 16 bytes a chunk; no source overlaps a target.
// kInvalid if chunk_bytes is 0, a target ends after the arena, two targets overlap or a source of more than 0
// bytes is null; nothing is copied then.
Status copy_digest(std::span<uint8_t> arena, std::span<const Copy> copies, size_t chunk_bytes,
                   unsigned threads, uint8_t* digests);

}  // namespace dtruntime
