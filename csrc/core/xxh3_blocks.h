// What the variants of the XXH3 block loop share (see xxh3_dispatch.h); nobody else includes it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "xxh3.h"

namespace dtruntime::xxh3 {

inline constexpr size_t kStripes = kXxh3BlockBytes / kXxh3StripeBytes;

// What a block loop does with the bytes besides adding them.
enum class Store { kNone, kPlain, kStream };

// How far ahead of the loads memory is asked for. Measured beside xxhash from memory, a digest by
// AVX-512: 1.02 with 192 to 320, 0.99 with 384, 0.98 with 448, below 0.9 from 512 on; by AVX2: 1.00 with 512,
// 0.85 to 0.97 with less, 0.83 with 704. In GB/s, a copy past the caches by AVX-512: 19.2 with 256, 19.8 with
// 384.
inline constexpr size_t kPrefetchBytes = 384;
inline constexpr size_t kPrefetchBytesAvx2 = 512;
inline constexpr size_t kPrefetchBytesAvx512 = 320;  // for digests alone

// The secret as the loops read it: read at its own offsets, which are multiples of 8, every other stripe's
// key would lie in two cache lines.
struct alignas(64) Keys {
  uint64_t stripe[kStripes][8];
  uint64_t scramble[8];
};

constexpr Keys make_keys() {
  const Secret secret = make_secret();
  const auto at = [&](size_t offset) {
    uint64_t value = 0;
    for (size_t i = 0; i < 8; ++i) value |= static_cast<uint64_t>(secret.bytes[offset + i]) << (8 * i);
    return value;
  };
  Keys keys{};
  for (size_t n = 0; n < kStripes; ++n) {
    for (size_t i = 0; i < 8; ++i) keys.stripe[n][i] = at(8 * n + 8 * i);
  }
  for (size_t i = 0; i < 8; ++i) keys.scramble[i] = at(kXxh3SecretBytes - kXxh3StripeBytes + 8 * i);
  return keys;
}

inline constexpr Keys kKeys = make_keys();

}  // namespace dtruntime::xxh3
