#include "../../csrc/core/chunks.h"

#include <doctest/doctest.h>

#include <memory>

namespace dtruntime {
namespace {

using Ranges = std::vector<Range>;

TEST_CASE("chunks: the chunks of a range cover it once, in order") {
  for (size_t length : {1, 2, 9, 10, 11, 99, 100, 101}) {
    for (size_t chunk_bytes : {1, 3, 10, 1000}) {
      CAPTURE(length);
      CAPTURE(chunk_bytes);
      const Ranges ranges = {{7, length}};
      const ChunkList chunks(ranges, chunk_bytes);
      size_t covered = 0;
      for (size_t i = 0; i < chunks.size(); ++i) {
        const Chunk chunk = chunks[i];
        CHECK(chunk.range == 0);
        CHECK(chunk.start == covered);
        CHECK(chunk.length > 0);
        CHECK((chunk.length == chunk_bytes || i + 1 == chunks.size()));
        covered += chunk.length;
      }
      CHECK(covered == length);
      CHECK(chunks.nbytes() == length);
    }
  }
}

TEST_CASE("chunks: each range is cut from its own start, and an empty one has none") {
  const Ranges ranges = {{0, 0}, {100, 25}, {50, 0}, {0, 0}, {7, 10}, {9, 0}};
  const ChunkList chunks(ranges, 10);
  REQUIRE(chunks.size() == 4);
  CHECK(chunks.nbytes() == 35);
  const Chunk expected[] = {{1, 0, 10}, {1, 10, 10}, {1, 20, 5}, {4, 0, 10}};
  for (size_t i = 0; i < chunks.size(); ++i) {
    CHECK(chunks[i].range == expected[i].range);
    CHECK(chunks[i].start == expected[i].start);
    CHECK(chunks[i].length == expected[i].length);
  }
  const size_t first[] = {0, 0, 3, 3, 3, 4, 4};
  for (size_t range = 0; range <= ranges.size(); ++range) CHECK(chunks.first_of(range) == first[range]);
}

TEST_CASE("chunks: no ranges, no chunks") {
  const ChunkList chunks({}, 1);
  CHECK(chunks.size() == 0);
  CHECK(chunks.nbytes() == 0);
  CHECK(chunks.first_of(0) == 0);
}

TEST_CASE("chunks: the largest range makes one chunk of the largest size") {
  const Ranges ranges = {{0, SIZE_MAX}};
  const ChunkList chunks(ranges, SIZE_MAX);
  REQUIRE(chunks.size() == 1);
  CHECK(chunks[0].length == SIZE_MAX);
}

TEST_CASE("chunks: ranges up to the end of a buffer are taken") {
  CHECK(check_ranges({}, 0, 1).ok());
  CHECK(check_ranges(Ranges{{0, 10}, {10, 0}, {3, 7}, {3, 7}}, 10, 1).ok());
  CHECK(check_ranges(Ranges{{0, SIZE_MAX}}, SIZE_MAX, SIZE_MAX).ok());
}

TEST_CASE(
    "chunks: a range that ends after the buffer is refused by its number, also where the sum wraps round") {
  for (Range outside : Ranges{{0, 11}, {10, 1}, {11, 0}, {SIZE_MAX, 1}, {5, SIZE_MAX - 4}, {5, SIZE_MAX}}) {
    CAPTURE(outside.offset);
    CAPTURE(outside.length);
    const Status status = check_ranges(Ranges{{0, 10}, outside}, 10, 1);
    CHECK(status.code == Code::kInvalid);
    CHECK(status.what.find("range 1 ") == 0);
  }
}

TEST_CASE("chunks: a chunk has at least one byte") { CHECK(check_ranges({}, 10, 0).code == Code::kInvalid); }

TEST_CASE("chunks: ranges that touch, in any order, and empty ones anywhere share no byte") {
  CHECK(check_disjoint({}).ok());
  CHECK(check_disjoint(Ranges{{10, 5}, {0, 10}, {15, 1}, {12, 0}, {12, 0}, {0, 0}}).ok());
}

TEST_CASE("chunks: ranges that share a byte are refused, both named") {
  const Status inner = check_disjoint(Ranges{{50, 1}, {20, 2}, {10, 11}});
  CHECK(inner.code == Code::kInvalid);
  CHECK(inner.what == "range 2 [10, +11) overlaps range 1 [20, +2)");
  CHECK(check_disjoint(Ranges{{0, 100}, {40, 1}}).code == Code::kInvalid);
  CHECK(check_disjoint(Ranges{{3, 1}, {3, 1}}).code == Code::kInvalid);
}

}  // namespace
}  // namespace dtruntime
