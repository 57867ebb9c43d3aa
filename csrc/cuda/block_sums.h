// Device code: the sums of XXH3 blocks, by a warp.
//
// Within a block of 1024 bytes XXH3 only adds, so the sums of any blocks can be had at once and in any order;
// what is serial is to add them to the eight lanes and scramble, once a block. (XXH3's lanes are called
// columns here: a lane is a thread of a warp.)
//
// A block is 64 pieces of 16 bytes, and lane L of the warp takes pieces L and 32 + L: with that it always
// adds to the same two columns, of which there are four pairs, under keys that never change.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../core/xxh3.h"
#include "pieces.h"

namespace dtruntime::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr unsigned kColumns = 8;
constexpr unsigned kBlocksAtOnce = 4;  // of a warp: this many are on their way from memory
constexpr unsigned kHalfBlockBytes = kXxh3BlockBytes / 2;

struct PairSums {
  uint64_t even;
  uint64_t odd;
};

// One lane's keys for its piece in the first and in the second half of a block.
struct LaneKeys {
  Piece half[2];
};

__device__ inline Piece key_at(size_t secret_offset) {
  return make_piece(xxh3::secret64(secret_offset), xxh3::secret64(secret_offset + 8));
}

// Each stripe of 64 bytes shifts the secret by 8.
__device__ inline LaneKeys keys_of(unsigned lane) {
  const size_t first = 8 * (lane / 4) + 16 * (lane % 4);
  return {{key_at(first), key_at(first + 64)}};
}

// As xxh3::add_stripe, for two of its lanes. In words of 32 bits, so that the compiler multiplies by one
// instruction.
__device__ inline void add_piece(PairSums& sums, Piece piece, Piece key) {
  const uint64_t even = xxh3::product_of_halves(piece.x ^ key.x, piece.y ^ key.y);
  const uint64_t odd = xxh3::product_of_halves(piece.z ^ key.z, piece.w ^ key.w);
  sums.even += even + second(piece);
  sums.odd += odd + first(piece);
}

// Adds up four blocks' sums over the eight lanes of each pair; of these 32 sums each lane gets one, that of
// block lane / 8 and of column_of(lane). In each round a lane gives half of its sums away for the other half
// of its partner's, so a block costs 3.5 shuffles instead of 6.
__device__ inline uint64_t add_lanes(uint64_t (&sums)[2 * kBlocksAtOnce], unsigned lane) {
#pragma unroll
  for (unsigned round = 0; round < 3; ++round) {
    const unsigned distance = 16 >> round;
    const unsigned kept = kBlocksAtOnce >> round;
    const bool upper = lane & distance;
#pragma unroll
    for (unsigned i = 0; i < kept; ++i) {
      const uint64_t give = upper ? sums[i] : sums[i + kept];
      const uint64_t keep = upper ? sums[i + kept] : sums[i];
      sums[i] = keep + __shfl_xor_sync(kAllLanes, give, static_cast<int>(distance));
    }
  }
  return sums[0];
}

// Bits 2 to 4 of a lane's number say which of the eight sums it is left with.
__device__ inline unsigned column_of(unsigned lane) { return 2 * (lane % 4) + lane / 4 % 2; }

// The same for a single block, whose eight sums it stores.
__device__ inline void store_sums(PairSums sums, unsigned lane, uint64_t* row) {
#pragma unroll
  for (int distance = 16; distance >= 4; distance /= 2) {
    sums.even += __shfl_xor_sync(kAllLanes, sums.even, distance);
    sums.odd += __shfl_xor_sync(kAllLanes, sums.odd, distance);
  }
  if (lane < 4) {
    row[2 * lane] = sums.even;
    row[2 * lane + 1] = sums.odd;
  }
}

}  // namespace dtruntime::cuda
