// A keyed bijection on [0, n): the order of an epoch without a table.
//
// A generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002) permutes
// [0, a * b) with a = ceil(sqrt(n)), b = ceil(n / a), by modular addition of a round function; values >= n
// are sent through again ("cycle walking"), on average less than once in sqrt(n) values. It needs no memory
// and no start-up and reaches any position in constant time; it costs tens of nanoseconds an index, where a
// table costs a load. Not a cipher: the round function mixes well and hides nothing.
//
// Version 0 is provisional: tests/vectors/permutation.json pins it.
//
// A Permutation is a value of about 100 bytes, immutable, usable from any thread, on host and device.
#pragma once

#include <cstdint>

#include "bytes.h"

namespace dtruntime {

inline constexpr uint64_t kPermutationMaxLength = uint64_t{1} << 62;
inline constexpr int kPermutationVersion = 0;
inline constexpr int kPermutationRounds = 8;

// The output function and the increment of SplitMix64 (Steele, Lea and Flood, "Fast Splittable
// Pseudorandom Number Generators", 2014).
inline constexpr uint64_t kSplitMixIncrement = 0x9E3779B97F4A7C15u;

DTRUNTIME_HOST_DEVICE inline uint64_t splitmix64(uint64_t z) {
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

class Permutation {
 public:
  // Of [0, length), keyed by (seed, epoch). REQUIRES: 1 <= length <= kPermutationMaxLength.
  DTRUNTIME_HOST_DEVICE Permutation(uint64_t length, uint64_t seed, uint64_t epoch)
      : length_(length), a_(ceil_sqrt(length)), b_(divide_up(length, a_)) {
    const uint64_t state = splitmix64((splitmix64(seed + kSplitMixIncrement) ^ epoch) + kSplitMixIncrement);
    for (int i = 0; i < kPermutationRounds; ++i) keys_[i] = splitmix64(state + kSplitMixIncrement * (i + 1));
  }

  // The image of `position`. REQUIRES: position < length.
  DTRUNTIME_HOST_DEVICE uint64_t operator()(uint64_t position) const {
    do position = step(position);
    while (position >= length_);
    return position;
  }

 private:
  // One pass over [0, a * b): written as left + a * right, the halves change places each round.
  DTRUNTIME_HOST_DEVICE uint64_t step(uint64_t x) const {
    uint64_t left = x % a_;
    uint64_t right = x / a_;
    for (int i = 0; i < kPermutationRounds; i += 2) {
      left = add(left, right, keys_[i], a_);
      right = add(right, left, keys_[i + 1], b_);
    }
    return left + a_ * right;
  }

  // (target + f(source)) mod modulus, f uniform in [0, modulus) but for 2^-32.
  DTRUNTIME_HOST_DEVICE static uint64_t add(uint64_t target, uint64_t source, uint64_t key,
                                            uint64_t modulus) {
    const uint64_t sum = target + multiply_high(splitmix64(source + key), modulus);
    return sum >= modulus ? sum - modulus : sum;
  }

  // The smallest r with r * r >= x, in integers, so that every machine agrees. REQUIRES: x <= 2^62.
  DTRUNTIME_HOST_DEVICE static uint64_t ceil_sqrt(uint64_t x) {
    uint64_t root = 0;
    for (uint64_t bit = uint64_t{1} << 31; bit != 0; bit >>= 1) {
      if ((root | bit) * (root | bit) < x) root |= bit;
    }
    return root + 1;
  }

  uint64_t length_;
  uint64_t a_;
  uint64_t b_;
  uint64_t keys_[kPermutationRounds];
};

}  // namespace dtruntime
