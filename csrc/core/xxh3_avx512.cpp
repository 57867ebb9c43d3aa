// The block loop for x86-64 with AVX-512F: a stripe is one register.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "xxh3_blocks.h"
#include "xxh3_dispatch.h"

// A lambda would not inherit it.
#define AVX512 __attribute__((target("avx512f")))

namespace dtruntime {
namespace {

using xxh3::kKeys;
using xxh3::Store;

bool runs_here() { return __builtin_cpu_supports("avx512f"); }

AVX512 inline __m512i scramble(__m512i lanes) {
  const __m512i prime = _mm512_set1_epi64(xxh3::kPrime32_1);
  const __m512i mixed = _mm512_xor_si512(lanes, _mm512_srli_epi64(lanes, 47));
  const __m512i keyed = _mm512_xor_si512(mixed, _mm512_load_si512(kKeys.scramble));
  const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(keyed, 32), prime);
  return _mm512_add_epi64(_mm512_mul_epu32(keyed, prime), _mm512_slli_epi64(high, 32));
}

template <Store kStore>
AVX512 inline __m512i load(const uint8_t* source) {
  constexpr size_t kAhead = kStore == Store::kNone ? xxh3::kPrefetchBytesAvx512 : xxh3::kPrefetchBytes;
  _mm_prefetch(source + kAhead, _MM_HINT_T0);
  __m512i data = _mm512_loadu_si512(source);
  asm volatile("" : "+v"(data));  // or gcc loads it once more where it is used
  return data;
}

template <Store kStore>
AVX512 inline void store(__m512i data, uint8_t* target) {
  if constexpr (kStore == Store::kPlain) _mm512_storeu_si512(target, data);
  if constexpr (kStore == Store::kStream) _mm512_stream_si512(reinterpret_cast<__m512i*>(target), data);
}

// What stripes of one block add to the lanes. Lane i also gets the data of lane i ^ 1: adding is all that
// happens within a block, so the data is summed as it is and swapped once.
struct Sums {
  __m512i products;
  __m512i data;
};

AVX512 inline void add_stripe(Sums& sums, __m512i data, const uint64_t* key) {
  const __m512i keyed = _mm512_xor_si512(data, _mm512_load_si512(key));
  sums.products = _mm512_add_epi64(sums.products, _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32)));
  sums.data = _mm512_add_epi64(sums.data, data);
}

AVX512 inline __m512i add_sums(__m512i lanes, const Sums& sums) {
  const __m512i swapped = _mm512_shuffle_epi32(sums.data, _MM_PERM_BADC);
  return _mm512_add_epi64(lanes, _mm512_add_epi64(sums.products, swapped));
}

// Four stripes are loaded before one is used, and each has sums of its own: only scramble is serial.
template <Store kStore>
AVX512 inline __m512i add_block(__m512i lanes, const uint8_t* source, uint8_t* target) {
  constexpr size_t kAtOnce = 4;
  Sums sums[kAtOnce] = {};
#pragma GCC unroll 4
  for (size_t n = 0; n < xxh3::kStripes; n += kAtOnce) {
    __m512i data[kAtOnce];
#pragma GCC unroll 4
    for (size_t i = 0; i < kAtOnce; ++i) data[i] = load<kStore>(source + (n + i) * kXxh3StripeBytes);
#pragma GCC unroll 4
    for (size_t i = 0; i < kAtOnce; ++i) {
      store<kStore>(data[i], target + (n + i) * kXxh3StripeBytes);
      add_stripe(sums[i], data[i], kKeys.stripe[n + i]);
    }
  }
#pragma GCC unroll 4
  for (size_t i = 0; i < kAtOnce; ++i) lanes = add_sums(lanes, sums[i]);
  return lanes;
}

template <Store kStore>
AVX512 void run(Xxh3Lanes& lanes, const uint8_t* source, size_t stripes, uint8_t* target) {
  __m512i sum = _mm512_loadu_si512(lanes.lanes);
  for (; stripes >= xxh3::kStripes; stripes -= xxh3::kStripes) {
    sum = scramble(add_block<kStore>(sum, source, target));
    source += kXxh3BlockBytes;
    if constexpr (kStore != Store::kNone) target += kXxh3BlockBytes;
  }
  Sums rest = {};
  for (size_t n = 0; n < stripes; ++n) {
    const __m512i data = load<kStore>(source + n * kXxh3StripeBytes);
    store<kStore>(data, target + n * kXxh3StripeBytes);
    add_stripe(rest, data, kKeys.stripe[n]);
  }
  _mm512_storeu_si512(lanes.lanes, add_sums(sum, rest));
  if constexpr (kStore == Store::kStream) _mm_sfence();
}

}  // namespace

const Xxh3Variant kXxh3Avx512 = {"avx512", runs_here, run<Store::kNone>, run<Store::kPlain>,
                                 run<Store::kStream>};

}  // namespace dtruntime
#endif
