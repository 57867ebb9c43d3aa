// Loads, stores and 64-bit arithmetic that host and device code share.
//
// Everything here is a pure function of its arguments: callable from any thread, throws nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DTRUNTIME_HOST_DEVICE __host__ __device__
#else
#define DTRUNTIME_HOST_DEVICE
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "dtruntime_torch supports little-endian machines only"
#endif

namespace dtruntime {

// The smallest multiple of `unit` that is >= `value`. REQUIRES: unit > 0 and the result fits.
DTRUNTIME_HOST_DEVICE constexpr uint64_t round_up(uint64_t value, uint64_t unit) {
  return (value / unit + (value % unit != 0)) * unit;
}

// The number of pieces of `unit` bytes that hold `value` bytes. REQUIRES: unit > 0.
DTRUNTIME_HOST_DEVICE constexpr uint64_t divide_up(uint64_t value, uint64_t unit) {
  return value / unit + (value % unit != 0);
}

// Reads 4 or 8 bytes, least significant first, at any alignment.
DTRUNTIME_HOST_DEVICE inline uint32_t load32(const uint8_t* bytes) {
  uint32_t value;
  memcpy(&value, bytes, sizeof value);
  return value;
}

DTRUNTIME_HOST_DEVICE inline uint64_t load64(const uint8_t* bytes) {
  uint64_t value;
  memcpy(&value, bytes, sizeof value);
  return value;
}

// Writes 8 bytes, most significant first, at any alignment.
DTRUNTIME_HOST_DEVICE inline void store64_big_endian(uint8_t* bytes, uint64_t value) {
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(value >> (56 - 8 * i));
}

DTRUNTIME_HOST_DEVICE inline uint32_t swap_bytes32(uint32_t x) {
  return x << 24 | (x & 0xff00u) << 8 | (x >> 8 & 0xff00u) | x >> 24;
}

DTRUNTIME_HOST_DEVICE inline uint64_t swap_bytes64(uint64_t x) {
  return static_cast<uint64_t>(swap_bytes32(static_cast<uint32_t>(x))) << 32 |
         swap_bytes32(static_cast<uint32_t>(x >> 32));
}

// The upper 64 bits of the 128-bit product.
DTRUNTIME_HOST_DEVICE inline uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>(static_cast<Wide>(a) * b >> 64);
#endif
}

}  // namespace dtruntime
