// The block loop for any processor: the arithmetic of xxh3.h, which the compiler may vectorise.
#include <algorithm>
#include <cstring>

#include "xxh3_blocks.h"
#include "xxh3_dispatch.h"

namespace dtruntime {
namespace {

bool always() { return true; }

void add(Xxh3Lanes& lanes, const uint8_t* source, size_t stripes, uint8_t*) {
  const size_t blocks = stripes / xxh3::kStripes;
  lanes.add_blocks(source, blocks);
  lanes.add_stripes(source + blocks * kXxh3BlockBytes, stripes % xxh3::kStripes);
}

// What was copied is added from where it arrived, while it is in L1.
void copy(Xxh3Lanes& lanes, const uint8_t* source, size_t stripes, uint8_t* target) {
  while (stripes > 0) {
    const size_t piece = std::min(stripes, xxh3::kStripes);
    memcpy(target, source, piece * kXxh3StripeBytes);
    add(lanes, target, piece, nullptr);
    source += piece * kXxh3StripeBytes;
    target += piece * kXxh3StripeBytes;
    stripes -= piece;
  }
}

}  // namespace

const Xxh3Variant kXxh3Scalar = {"scalar", always, add, copy, nullptr};

}  // namespace dtruntime
