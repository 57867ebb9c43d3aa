// The block loop for aarch64, all of which has NEON: a stripe is four registers.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "xxh3_blocks.h"
#include "xxh3_dispatch.h"

namespace dtruntime {
namespace {

using xxh3::kKeys;
using xxh3::Store;

constexpr size_t kQuarters = 4;
constexpr size_t kQuarter = kXxh3StripeBytes / kQuarters;

bool always() { return true; }

uint64x2_t scramble(uint64x2_t lanes, const uint64_t* key) {
  const uint32x2_t prime = vdup_n_u32(xxh3::kPrime32_1);
  const uint64x2_t mixed = veorq_u64(lanes, vshrq_n_u64(lanes, 47));
  const uint64x2_t keyed = veorq_u64(mixed, vld1q_u64(key));
  const uint64x2_t high = vmull_u32(vshrn_n_u64(keyed, 32), prime);
  return vmlal_u32(vshlq_n_u64(high, 32), vmovn_u64(keyed), prime);
}

template <Store kStore>
void run(Xxh3Lanes& lanes, const uint8_t* source, size_t stripes, uint8_t* target) {
  uint64x2_t sums[kQuarters];
  for (size_t i = 0; i < kQuarters; ++i) sums[i] = vld1q_u64(lanes.lanes + 2 * i);
  for (size_t done = 0; done < stripes; ++done) {
    const size_t n = done % xxh3::kStripes;
    const size_t place = done * kXxh3StripeBytes;
    __builtin_prefetch(source + place + xxh3::kPrefetchBytes);
    for (size_t i = 0; i < kQuarters; ++i) {
      uint8x16_t bytes = vld1q_u8(source + place + i * kQuarter);
      asm volatile("" : "+w"(bytes));  // or the compiler may load it once more
      if constexpr (kStore == Store::kPlain) vst1q_u8(target + place + i * kQuarter, bytes);
      const uint64x2_t data = vreinterpretq_u64_u8(bytes);
      const uint64x2_t keyed = veorq_u64(data, vld1q_u64(kKeys.stripe[n] + 2 * i));
      const uint64x2_t swapped = vextq_u64(data, data, 1);
      sums[i] = vmlal_u32(vaddq_u64(sums[i], swapped), vmovn_u64(keyed), vshrn_n_u64(keyed, 32));
    }
    if (n + 1 < xxh3::kStripes) continue;
    for (size_t i = 0; i < kQuarters; ++i) sums[i] = scramble(sums[i], kKeys.scramble + 2 * i);
  }
  for (size_t i = 0; i < kQuarters; ++i) vst1q_u64(lanes.lanes + 2 * i, sums[i]);
}

}  // namespace

const Xxh3Variant kXxh3Neon = {"neon", always, run<Store::kNone>, run<Store::kPlain>, nullptr};

}  // namespace dtruntime
#endif
