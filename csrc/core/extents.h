// Pieces of memory that lie somewhere in a file: which bytes are where, and in which requests they travel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "chunks.h"
#include "status.h"

namespace dtruntime {

// `length` bytes at `memory` are those of a file from `offset` on. As with iovec, a write only reads them.
struct Extent {
  uint8_t* memory;
  size_t offset;
  size_t length;
};

// kInvalid if one ends after the largest offset that a file can have, or if two share a byte of the file.
Status check_extents(std::span<const Extent> extents);

// What one system call is to transfer; its first `done` bytes are through.
struct Request {
  size_t offset;
  size_t length;
  bool whole_pages;  // starts and ends at a page of the file
  size_t done = 0;
};

// Extents in the order of the file. Does not own their memory, and keeps a copy of the extents themselves.
// REQUIRES: check_extents holds. Const methods may be called from any thread.
class ExtentMap {
 public:
  explicit ExtentMap(std::span<const Extent> extents);

  // Where the last extent ends in the file; 0 if there is none.
  size_t end() const { return end_; }

  // Cuts what the extents cover, hole by hole, into requests of at most `request_bytes`, a multiple of
  // kPageBytes. Where at least `pages_from` bytes of whole pages come together the ends that fill no page are
  // requests of their own, so that the others have whole pages; shorter runs count as not whole.
  std::vector<Request> cut(size_t request_bytes, size_t pages_from) const;

  // Where [offset, offset + length) of the file lies in memory, or null if it lies in several pieces.
  // REQUIRES for this and the next two: extents cover it, and length > 0.
  uint8_t* find(size_t offset, size_t length) const;

  // Copies [offset, offset + length) of the file from the extents to `target`, or to them from `source`.
  void gather(size_t offset, size_t length, uint8_t* target) const;
  void scatter(size_t offset, size_t length, const uint8_t* source) const;

 private:
  size_t extent_at(size_t offset) const;
  template <typename Copy>
  void for_each_piece(size_t offset, size_t length, Copy copy) const;

  std::vector<Extent> extents_;  // none empty; neighbours in memory and file are joined
  size_t end_ = 0;
};

}  // namespace dtruntime
