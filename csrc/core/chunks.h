// Ranges of bytes cut into chunks: which chunk is where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "status.h"

namespace dtruntime {

struct Range {
  size_t offset;  // bytes
  size_t length;  // bytes
};

// One chunk of a list: the `length` bytes from `start` on of range number `range`.
struct Chunk {
  size_t range;
  size_t start;
  size_t length;
};

// The chunks of some ranges, in the order of the ranges, and within one in the order of its bytes. A range is
// cut into chunks of `chunk_bytes` from its own start; the last may be shorter, and an empty range has none.
//
// Refers to the ranges, which must outlive it unchanged. Const methods may be called from any thread.
class ChunkList {
 public:
  // REQUIRES: chunk_bytes > 0.
  ChunkList(std::span<const Range> ranges, size_t chunk_bytes);

  size_t size() const { return first_.back(); }
  size_t nbytes() const { return nbytes_; }  // of all ranges together

  // The place of the first chunk of a range, and after the last range size(). REQUIRES: range <= their
  // number.
  size_t first_of(size_t range) const { return first_[range]; }

  // REQUIRES: index < size(). Takes logarithmic time.
  Chunk operator[](size_t index) const;

 private:
  std::span<const Range> ranges_;
  size_t chunk_bytes_;
  size_t nbytes_ = 0;
  std::vector<size_t> first_;
};

// kInvalid if chunk_bytes is 0 or a range ends after a buffer of `nbytes` bytes; so nobody has to make room
// for the digests of bytes that do not exist.
Status check_ranges(std::span<const Range> ranges, size_t nbytes, size_t chunk_bytes);

// kInvalid if two ranges share a byte. REQUIRES: check_ranges holds.
Status check_disjoint(std::span<const Range> ranges);

}  // namespace dtruntime
