// Device code: memory is read and written in pieces of 16 bytes, by words as wide as its alignment allows, so
// that no byte outside it is touched. Streamed past the caches: nobody reads it again soon.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace dtruntime::cuda {

constexpr unsigned kPieceBytes = 16;

// Its words in the order of memory.
using Piece = uint4;

__device__ inline Piece make_piece(uint64_t first, uint64_t second) {
  return make_uint4(static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32),
                    static_cast<uint32_t>(second), static_cast<uint32_t>(second >> 32));
}

__device__ inline uint64_t first(Piece piece) { return piece.x | static_cast<uint64_t>(piece.y) << 32; }
__device__ inline uint64_t second(Piece piece) { return piece.z | static_cast<uint64_t>(piece.w) << 32; }

// REQUIRES: data is aligned to a Word, a Piece or an unsigned integer.
template <typename Word>
__device__ inline Piece load_piece(const uint8_t* data) {
  const Word* words = reinterpret_cast<const Word*>(data);
  if constexpr (sizeof(Word) == kPieceBytes) {
    return __ldcs(words);
  } else {
    constexpr unsigned kHalf = 8 / sizeof(Word);
    uint64_t halves[2] = {};
#pragma unroll
    for (unsigned i = 0; i < 2 * kHalf; ++i) {
      halves[i / kHalf] |= static_cast<uint64_t>(__ldcs(words + i)) << (8 * sizeof(Word) * (i % kHalf));
    }
    return make_piece(halves[0], halves[1]);
  }
}

// REQUIRES: target is aligned to a Word.
template <typename Word>
__device__ inline void store_piece(uint8_t* target, Piece piece) {
  Word* words = reinterpret_cast<Word*>(target);
  if constexpr (sizeof(Word) == kPieceBytes) {
    __stcs(words, piece);
  } else {
    constexpr unsigned kHalf = 8 / sizeof(Word);
    const uint64_t halves[2] = {first(piece), second(piece)};
#pragma unroll
    for (unsigned i = 0; i < 2 * kHalf; ++i) {
      __stcs(words + i, static_cast<Word>(halves[i / kHalf] >> (8 * sizeof(Word) * (i % kHalf))));
    }
  }
}

// Calls act(a word of the widest kind to which all of `addresses`, or-ed together, are aligned).
template <typename Act>
__device__ inline void with_widest_word(uintptr_t addresses, Act act) {
  if (addresses % 16 == 0) {
    act(Piece{});
  } else if (addresses % 8 == 0) {
    act(static_cast<unsigned long long>(0));
  } else if (addresses % 4 == 0) {
    act(static_cast<unsigned int>(0));
  } else if (addresses % 2 == 0) {
    act(static_cast<unsigned short>(0));
  } else {
    act(static_cast<unsigned char>(0));
  }
}

}  // namespace dtruntime::cuda
