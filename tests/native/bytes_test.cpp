#include "../../csrc/core/bytes.h"

#include <doctest/doctest.h>

#include <vector>

namespace dtruntime {
namespace {

constexpr uint64_t kMost = UINT64_MAX;

TEST_CASE("bytes: rounding up reaches the next multiple and no further") {
  for (uint64_t unit : {1, 2, 3, 64, 4096}) {
    for (uint64_t multiple : {0, 1, 2, 1000}) {
      CHECK(round_up(unit * multiple, unit) == unit * multiple);
      CHECK(round_up(unit * multiple + 1, unit) == unit * (multiple + 1));
      CHECK(round_up(unit * multiple + unit, unit) == unit * (multiple + 1));
      CHECK(divide_up(unit * multiple, unit) == multiple);
      CHECK(divide_up(unit * multiple + 1, unit) == multiple + 1);
    }
  }
}

TEST_CASE("bytes: rounding up holds at the end of the range") {
  CHECK(round_up(kMost, 1) == kMost);
  CHECK(round_up(kMost - 1, kMost) == kMost);
  CHECK(round_up(kMost - 4095, 4096) == kMost - 4095);
  CHECK(divide_up(kMost, kMost) == 1);
  CHECK(divide_up(kMost, 2) == uint64_t{1} << 63);
}

TEST_CASE("bytes: loads take the least significant byte first, at any alignment") {
  std::vector<uint8_t> bytes(16);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(0xf0 + i);
  for (size_t start = 0; start < 8; ++start) {
    const uint64_t step = 0x0101010101010101u * start;
    CHECK(load64(bytes.data() + start) == 0xf7f6f5f4f3f2f1f0u + step);
    CHECK(load32(bytes.data() + start) == static_cast<uint32_t>(0xf3f2f1f0u + step));
  }
}

TEST_CASE("bytes: stores put the most significant byte first, at any alignment, and touch 8 bytes") {
  for (size_t start = 0; start < 8; ++start) {
    std::vector<uint8_t> bytes(16, 0xee), expected = bytes;
    for (size_t i = 0; i < 8; ++i) expected[start + i] = static_cast<uint8_t>(0x81 + i);
    store64_big_endian(bytes.data() + start, 0x8182838485868788u);
    CHECK(bytes == expected);
  }
}

TEST_CASE("bytes: swapping reverses the bytes") {
  CHECK(swap_bytes32(0x81020304u) == 0x04030281u);
  CHECK(swap_bytes64(0x8102030405060788u) == 0x8807060504030281u);
}

TEST_CASE("bytes: the high half of a product") {
  CHECK(multiply_high(kMost, kMost) == kMost - 1);
  CHECK(multiply_high(uint64_t{1} << 63, 2) == 1);
  CHECK(multiply_high(uint64_t{1} << 32, (uint64_t{1} << 32) - 1) == 0);
  CHECK(multiply_high(0, kMost) == 0);
  // 10^19 * 10^19 = 10^38, divided by 2^64.
  CHECK(multiply_high(10'000'000'000'000'000'000u, 10'000'000'000'000'000'000u) == 5421010862427522170u);
}

}  // namespace
}  // namespace dtruntime
