// What the variants of the XXH3 block loop share (see xxh3_dispatch.h); nobody else includes it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "xxh3.h"

namespace dtruntime::xxh3 {

inline constexpr size_t kStripes = kXxh3BlockBytes / kXxh3StripeBytes;

// How far ahead of the loads memory is asked for. Measured in GB/s, a digest from memory and a streamed
// copy: 33.0 and 19.2 with 256, 32.6 and 19.8 with 384; with 512 the digest falls to 28.7, with 1024 to 25.5.
inline constexpr size_t kPrefetchBytes = 384;

// What a block loop does with the bytes besides adding them.
enum class Store { kNone, kPlain, kStream };

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
