// The block loop for x86-64 with AVX2: a stripe is two registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "xxh3_blocks.h"
#include "xxh3_dispatch.h"

// A lambda would not inherit it.
#define AVX2 __attribute__((target("avx2")))

namespace dtruntime {
namespace {

using xxh3::kKeys;
using xxh3::Store;

constexpr size_t kHalf = kXxh3StripeBytes / 2;

bool runs_here() { return __builtin_cpu_supports("avx2"); }

AVX2 inline __m256i load_key(const uint64_t* key) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(key));
}

AVX2 inline __m256i scramble(__m256i lanes, const uint64_t* key) {
  const __m256i prime = _mm256_set1_epi64x(xxh3::kPrime32_1);
  const __m256i mixed = _mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47));
  const __m256i keyed = _mm256_xor_si256(mixed, load_key(key));
  const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
  return _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(high, 32));
}

AVX2 inline __m256i load(const uint8_t* source) {
  __m256i data = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  asm volatile("" : "+x"(data));  // or gcc loads it once more where it is used
  return data;
}

template <Store kStore>
AVX2 inline void store(__m256i data, uint8_t* target) {
  auto* place = reinterpret_cast<__m256i*>(target);
  if constexpr (kStore == Store::kPlain) _mm256_storeu_si256(place, data);
  if constexpr (kStore == Store::kStream) _mm256_stream_si256(place, data);
}

AVX2 inline __m256i add_half(__m256i sum, __m256i data, const uint64_t* key) {
  const __m256i keyed = _mm256_xor_si256(data, load_key(key));
  const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
  const __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm256_add_epi64(sum, _mm256_add_epi64(product, swapped));
}

struct Sums {
  __m256i low, high;
};

template <Store kStore>
AVX2 inline Sums add_stripe(Sums sums, const uint8_t* source, uint8_t* target, const uint64_t* key) {
  _mm_prefetch(source + xxh3::kPrefetchBytesAvx2, _MM_HINT_T0);
  const __m256i low = load(source);
  const __m256i high = load(source + kHalf);
  store<kStore>(low, target);
  store<kStore>(high, target + kHalf);
  return {add_half(sums.low, low, key), add_half(sums.high, high, key + 4)};
}

template <Store kStore>
AVX2 void run(Xxh3Lanes& lanes, const uint8_t* source, size_t stripes, uint8_t* target) {
  Sums sums = {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes.lanes)),
               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes.lanes + 4))};
  for (size_t done = 0; done < stripes; ++done) {
    const size_t n = done % xxh3::kStripes;
    sums = add_stripe<kStore>(sums, source + done * kXxh3StripeBytes, target + done * kXxh3StripeBytes,
                              kKeys.stripe[n]);
    if (n + 1 == xxh3::kStripes) {
      sums = {scramble(sums.low, kKeys.scramble), scramble(sums.high, kKeys.scramble + 4)};
    }
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes.lanes), sums.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes.lanes + 4), sums.high);
  if constexpr (kStore == Store::kStream) _mm_sfence();
}

}  // namespace

const Xxh3Variant kXxh3Avx2 = {"avx2", runs_here, run<Store::kNone>, run<Store::kPlain>, run<Store::kStream>};

}  // namespace dtruntime
#endif
