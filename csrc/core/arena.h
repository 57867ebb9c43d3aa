// Page-aligned host memory that is reused save after save.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "status.h"

namespace dtruntime {

inline constexpr size_t kPageBytes = 4096;

// Owns its pages; they go back to the system when it is destroyed or replaces them in resize(). Not copied,
// not moved: its address may be in use by the kernel. Const methods may be called from any thread; resize()
// only while nobody uses the memory.
class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Makes it hold `nbytes` bytes whose contents are undefined. Pages are kept if they suffice and more than
  // half of them is used, else new ones are mapped; fresh pages are zero. The first byte lies `lead` bytes
  // into a page, so that a file read from an offset that is not aligned can still be read without a copy.
  // REQUIRES: lead < kPageBytes. kSystem (ENOMEM) if the system refuses; the arena is unchanged then.
  Status resize(size_t nbytes, size_t lead = 0);

  uint8_t* address() const { return pages_ + lead_; }
  size_t nbytes() const { return nbytes_; }
  std::span<uint8_t> bytes() const { return {address(), nbytes_}; }

 private:
  uint8_t* pages_ = nullptr;
  size_t capacity_ = 0;  // bytes mapped
  size_t lead_ = 0;
  size_t nbytes_ = 0;
};

}  // namespace dtruntime
