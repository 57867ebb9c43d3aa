#include "../../csrc/core/permutation.h"

#include <doctest/doctest.h>

#include <set>
#include <vector>

#include "vectors.h"

namespace dtruntime {
namespace {

TEST_CASE("permutation: the golden vectors hold") {
  REQUIRE(vectors::kPermutationVersion == kPermutationVersion);
  REQUIRE_FALSE(vectors::kPermuted.empty());
  for (const vectors::Permuted& expected : vectors::kPermuted) {
    const Permutation permutation(expected.n, expected.seed, expected.epoch);
    std::vector<uint64_t> values;
    for (size_t i = 0; i < expected.values.size(); ++i) {
      values.push_back(permutation(expected.start + i * expected.stride));
    }
    CAPTURE(expected.n);
    CAPTURE(expected.seed);
    CHECK(values == expected.values);
  }
}

TEST_CASE("permutation: it is a bijection on every boundary count") {
  for (uint64_t n : vectors::kCounts) {
    for (uint64_t key : {uint64_t{0}, uint64_t{1}, UINT64_MAX}) {
      CAPTURE(n);
      CAPTURE(key);
      const Permutation permutation(n, key, key);
      std::vector<int> times(n, 0);
      for (uint64_t position = 0; position < n; ++position) {
        const uint64_t value = permutation(position);
        REQUIRE(value < n);
        ++times[value];
      }
      CHECK(times == std::vector<int>(n, 1));
    }
  }
}

TEST_CASE("permutation: the ends of the longest ranges stay inside and do not collide") {
  constexpr uint64_t kEnd = 1000;
  for (uint64_t n : {kPermutationMaxLength, kPermutationMaxLength - 1, (uint64_t{1} << 61) + 1}) {
    const Permutation permutation(n, 3, 4);
    std::set<uint64_t> values;
    for (uint64_t i = 0; i < kEnd; ++i) {
      values.insert(permutation(i));
      values.insert(permutation(n - 1 - i));
    }
    CAPTURE(n);
    CHECK(values.size() == 2 * kEnd);
    CHECK(*values.rbegin() < n);
  }
}

}  // namespace
}  // namespace dtruntime
