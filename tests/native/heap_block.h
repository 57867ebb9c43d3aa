// Memory whose neighbours AddressSanitizer watches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

namespace dtruntime {

// `size` bytes on the heap, first filled with 0xaa, that start `shift` bytes after what malloc aligns and end
// exactly where the block ends: a read or write of one byte more is seen, in front only where shift is 0. A
// value, copied with its bytes.
class HeapBlock {
 public:
  explicit HeapBlock(size_t size, size_t shift = 0)
      : size_(size), shift_(shift), bytes_(new uint8_t[shift + size]) {
    memset(bytes_.get(), 0xaa, shift + size);
  }
  HeapBlock(const HeapBlock& other) : HeapBlock(other.size_, other.shift_) {
    memcpy(data(), other.data(), size_);
  }
  HeapBlock& operator=(const HeapBlock&) = delete;

  uint8_t* data() { return bytes_.get() + shift_; }
  const uint8_t* data() const { return bytes_.get() + shift_; }
  size_t size() const { return size_; }
  size_t shift() const { return shift_; }

  friend bool operator==(const HeapBlock& a, const HeapBlock& b) {
    return a.size_ == b.size_ && memcmp(a.data(), b.data(), a.size_) == 0;
  }

 private:
  size_t size_;
  size_t shift_;
  std::unique_ptr<uint8_t[]> bytes_;
};

}  // namespace dtruntime
