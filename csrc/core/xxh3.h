// XXH3-128 with seed 0 and the default secret, for host and device.
//
// Written from the published specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md). The result is
// bit-identical to `xxhsum -H2` and to XXH3_128bits().
//
// Data is read by pointer and length, at any alignment, and not kept. Every function is pure: callable from
// any thread, throws nothing, allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bytes.h"

// Device code has a copy of each table of its own, in constant memory: it does not see one of the host.
#if defined(__CUDA_ARCH__)
#define DTRUNTIME_CONSTANT __constant__
#else
#define DTRUNTIME_CONSTANT
#endif

namespace dtruntime {

struct Xxh3Digest {
  uint64_t low;
  uint64_t high;
};

// Long inputs (> kXxh3MediumBytes) are consumed in blocks of 16 stripes of 8 lanes of 8 bytes.
inline constexpr size_t kXxh3StripeBytes = 64;
inline constexpr size_t kXxh3BlockBytes = 1024;
inline constexpr size_t kXxh3MediumBytes = 240;
inline constexpr size_t kXxh3SecretBytes = 192;
inline constexpr size_t kXxh3DigestBytes = 16;

// ---- constants of the specification -------------------------------------------------------------------

namespace xxh3 {

inline constexpr uint64_t kPrime32_1 = 0x9E3779B1u;
inline constexpr uint64_t kPrime32_2 = 0x85EBCA77u;
inline constexpr uint64_t kPrime32_3 = 0xC2B2AE3Du;
inline constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87u;
inline constexpr uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4Fu;
inline constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9u;
inline constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63u;
inline constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5u;
inline constexpr uint64_t kMix1 = 0x165667919E3779F9u;
inline constexpr uint64_t kMix2 = 0x9FB21C651E98DF25u;

struct Secret {
  alignas(8) uint8_t bytes[kXxh3SecretBytes];
};

DTRUNTIME_HOST_DEVICE constexpr Secret make_secret() {
  return {{
      0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
      0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
      0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
      0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
      0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
      0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
      0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
      0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
      0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
      0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
      0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
      0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
  }};
}

DTRUNTIME_HOST_DEVICE inline const uint8_t* secret() {
  static DTRUNTIME_CONSTANT constexpr Secret kSecret = make_secret();
  return kSecret.bytes;
}

DTRUNTIME_HOST_DEVICE inline uint64_t secret64(size_t offset) { return load64(secret() + offset); }

// ---- mixing -------------------------------------------------------------------------------------------

DTRUNTIME_HOST_DEVICE inline uint64_t avalanche(uint64_t x) {
  x = (x ^ x >> 37) * kMix1;
  return x ^ x >> 32;
}

DTRUNTIME_HOST_DEVICE inline uint64_t avalanche64(uint64_t x) {
  x = (x ^ x >> 33) * kPrime64_2;
  x = (x ^ x >> 29) * kPrime64_3;
  return x ^ x >> 32;
}

DTRUNTIME_HOST_DEVICE inline uint64_t fold_product(uint64_t a, uint64_t b) {
  return a * b ^ multiply_high(a, b);
}

// ---- up to 16 bytes -----------------------------------------------------------------------------------

DTRUNTIME_HOST_DEVICE inline Xxh3Digest digest_empty() {
  return {avalanche64(secret64(64) ^ secret64(72)), avalanche64(secret64(80) ^ secret64(88))};
}

DTRUNTIME_HOST_DEVICE inline Xxh3Digest digest_1_to_3(const uint8_t* data, size_t length) {
  const uint32_t packed = static_cast<uint32_t>(data[length - 1]) | static_cast<uint32_t>(length) << 8 |
                          static_cast<uint32_t>(data[0]) << 16 |
                          static_cast<uint32_t>(data[length >> 1]) << 24;
  const uint32_t swapped = swap_bytes32(packed);
  const uint32_t turned = swapped << 13 | swapped >> 19;
  const uint32_t low_key = load32(secret()) ^ load32(secret() + 4);
  const uint32_t high_key = load32(secret() + 8) ^ load32(secret() + 12);
  return {avalanche64(low_key ^ packed), avalanche64(high_key ^ turned)};
}

DTRUNTIME_HOST_DEVICE inline Xxh3Digest digest_4_to_8(const uint8_t* data, size_t length) {
  const uint64_t both = load32(data) | static_cast<uint64_t>(load32(data + length - 4)) << 32;
  const uint64_t keyed = both ^ secret64(16) ^ secret64(24);
  const uint64_t factor = kPrime64_1 + (static_cast<uint64_t>(length) << 2);
  uint64_t low = keyed * factor;
  const uint64_t high = multiply_high(keyed, factor) + (low << 1);
  low ^= high >> 3;
  low = (low ^ low >> 35) * kMix2;
  return {low ^ low >> 28, avalanche(high)};
}

DTRUNTIME_HOST_DEVICE inline Xxh3Digest digest_9_to_16(const uint8_t* data, size_t length) {
  const uint64_t first = load64(data);
  const uint64_t last = load64(data + length - 8);
  const uint64_t a = secret64(32) ^ secret64(40) ^ first ^ last;
  const uint64_t b = secret64(48) ^ secret64(56) ^ last;
  uint64_t low = a * kPrime64_1 + (static_cast<uint64_t>(length - 1) << 54);
  const uint64_t high = multiply_high(a, kPrime64_1) + b + (b & 0xffffffffu) * (kPrime32_2 - 1);
  low ^= swap_bytes64(high);
  return {avalanche(low * kPrime64_2), avalanche(multiply_high(low, kPrime64_2) + high * kPrime64_2)};
}

// ---- 17 to 240 bytes ----------------------------------------------------------------------------------

DTRUNTIME_HOST_DEVICE inline uint64_t mix16(const uint8_t* data, size_t secret_offset) {
  return fold_product(load64(data) ^ secret64(secret_offset), load64(data + 8) ^ secret64(secret_offset + 8));
}

// Mixes two 16-byte segments into the pair of sums.
DTRUNTIME_HOST_DEVICE inline void mix_pair(Xxh3Digest& sums, const uint8_t* one, const uint8_t* two,
                                           size_t secret_offset) {
  sums.low = (sums.low + mix16(one, secret_offset)) ^ (load64(two) + load64(two + 8));
  sums.high = (sums.high + mix16(two, secret_offset + 16)) ^ (load64(one) + load64(one + 8));
}

DTRUNTIME_HOST_DEVICE inline Xxh3Digest digest_17_to_240(const uint8_t* data, size_t length) {
  Xxh3Digest sums = {length * kPrime64_1, 0};
  if (length <= 128) {
    for (size_t pair = (length - 1) / 32 + 1; pair-- > 0;) {
      mix_pair(sums, data + 16 * pair, data + length - 16 * (pair + 1), 32 * pair);
    }
  } else {
    for (size_t pair = 0; pair < 4; ++pair)
      mix_pair(sums, data + 32 * pair, data + 32 * pair + 16, 32 * pair);
    sums = {avalanche(sums.low), avalanche(sums.high)};
    for (size_t pair = 4; pair < length / 32; ++pair) {
      mix_pair(sums, data + 32 * pair, data + 32 * pair + 16, 32 * (pair - 4) + 3);
    }
    mix_pair(sums, data + length - 16, data + length - 32, 103);
  }
  const uint64_t high = sums.low * kPrime64_1 + sums.high * kPrime64_4 + length * kPrime64_2;
  return {avalanche(sums.low + sums.high), 0 - avalanche(high)};
}

// ---- more than 240 bytes ------------------------------------------------------------------------------

// What a word that was xored with its key, here in two halves, adds to its own lane. The word without the key
// is added to the lane beside.
DTRUNTIME_HOST_DEVICE inline uint64_t product_of_halves(uint32_t low, uint32_t high) {
  return static_cast<uint64_t>(low) * high;
}

DTRUNTIME_HOST_DEVICE inline void add_stripe(uint64_t* lanes, const uint8_t* stripe, size_t secret_offset) {
  for (size_t i = 0; i < 8; ++i) {
    const uint64_t word = load64(stripe + 8 * i);
    const uint64_t keyed = word ^ secret64(secret_offset + 8 * i);
    lanes[i ^ 1] += word;
    lanes[i] += product_of_halves(static_cast<uint32_t>(keyed), static_cast<uint32_t>(keyed >> 32));
  }
}

DTRUNTIME_HOST_DEVICE inline uint64_t scrambled(uint64_t lane, uint64_t key) {
  return (lane ^ lane >> 47 ^ key) * kPrime32_1;
}

DTRUNTIME_HOST_DEVICE inline void scramble(uint64_t* lanes) {
  for (size_t i = 0; i < 8; ++i) {
    lanes[i] = scrambled(lanes[i], secret64(kXxh3SecretBytes - kXxh3StripeBytes + 8 * i));
  }
}

DTRUNTIME_HOST_DEVICE inline uint64_t merge(const uint64_t* lanes, uint64_t start, size_t secret_offset) {
  uint64_t sum = start;
  for (size_t i = 0; i < 8; i += 2) {
    sum += fold_product(lanes[i] ^ secret64(secret_offset + 8 * i),
                        lanes[i + 1] ^ secret64(secret_offset + 8 * i + 8));
  }
  return avalanche(sum);
}

}  // namespace xxh3

// The state of a long digest, so that a caller can digest a piece while it is in cache:
//   Xxh3Lanes lanes; lanes.add_blocks(data, n); lanes.add_blocks(data + n * kXxh3BlockBytes, m); ...
//   lanes.finish(data, length)
// REQUIRES: length > kXxh3MediumBytes, and all blocks but the last, which holds 1 to kXxh3BlockBytes bytes,
// were added in order before finish: xxh3_full_blocks(length) of them.
struct Xxh3Lanes {
  uint64_t lanes[8] = {xxh3::kPrime32_3, xxh3::kPrime64_1, xxh3::kPrime64_2, xxh3::kPrime64_3,
                       xxh3::kPrime64_4, xxh3::kPrime32_2, xxh3::kPrime64_5, xxh3::kPrime32_1};

  DTRUNTIME_HOST_DEVICE void add_blocks(const uint8_t* data, size_t blocks) {
    for (const uint8_t* end = data + blocks * kXxh3BlockBytes; data != end; data += kXxh3BlockBytes) {
      add_stripes(data, kXxh3BlockBytes / kXxh3StripeBytes);
      xxh3::scramble(lanes);
    }
  }

  // Adds stripes of one block, from its start on. REQUIRES: as many as a block has, at most.
  DTRUNTIME_HOST_DEVICE void add_stripes(const uint8_t* data, size_t stripes) {
    for (size_t n = 0; n < stripes; ++n) xxh3::add_stripe(lanes, data + n * kXxh3StripeBytes, 8 * n);
  }

  // `data` is the start of the whole input, of which only the last block and the last stripe are read.
  DTRUNTIME_HOST_DEVICE Xxh3Digest finish(const uint8_t* data, size_t length) {
    const size_t last_block = (length - 1) / kXxh3BlockBytes * kXxh3BlockBytes;
    add_stripes(data + last_block, (length - 1 - last_block) / kXxh3StripeBytes);
    return finish_last(data + length - kXxh3StripeBytes, length);
  }

  // The same where all of xxh3_full_stripes(length) were added: only the last stripe, which ends where the
  // input ends, is read.
  DTRUNTIME_HOST_DEVICE Xxh3Digest finish_last(const uint8_t* last_stripe, size_t length) {
    xxh3::add_stripe(lanes, last_stripe, kXxh3SecretBytes - 71);
    return {xxh3::merge(lanes, length * xxh3::kPrime64_1, 11),
            xxh3::merge(lanes, ~(length * xxh3::kPrime64_2), kXxh3SecretBytes - 75)};
  }
};

// How many stripes of an input are added before the last. REQUIRES: length > 0.
DTRUNTIME_HOST_DEVICE constexpr size_t xxh3_full_stripes(size_t length) {
  return (length - 1) / kXxh3StripeBytes;
}

// How many blocks of an input are added before finish. REQUIRES: length > 0.
DTRUNTIME_HOST_DEVICE constexpr size_t xxh3_full_blocks(size_t length) {
  return (length - 1) / kXxh3BlockBytes;
}

// The digest of `length` bytes at `data`, which may be null if length is 0.
DTRUNTIME_HOST_DEVICE inline Xxh3Digest xxh3_128(const uint8_t* data, size_t length) {
  if (length == 0) return xxh3::digest_empty();
  if (length <= 3) return xxh3::digest_1_to_3(data, length);
  if (length <= 8) return xxh3::digest_4_to_8(data, length);
  if (length <= 16) return xxh3::digest_9_to_16(data, length);
  if (length <= kXxh3MediumBytes) return xxh3::digest_17_to_240(data, length);
  Xxh3Lanes lanes;
  lanes.add_blocks(data, xxh3_full_blocks(length));
  return lanes.finish(data, length);
}

// Writes the canonical form: 16 bytes, most significant first, as `xxhsum` prints them.
DTRUNTIME_HOST_DEVICE inline void xxh3_store(Xxh3Digest digest, uint8_t* bytes) {
  store64_big_endian(bytes, digest.high);
  store64_big_endian(bytes + 8, digest.low);
}

}  // namespace dtruntime
