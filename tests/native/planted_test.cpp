// Errors on purpose, run one by one, each of which the sanitizer of its mode must stop: else that mode would
// pass whatever we do. Skipped unless asked for: tests/native/check_planted.sh asks.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <thread>

#include "../../csrc/core/digest.h"
#include "../../csrc/core/thread_pool.h"
#include "heap_block.h"

namespace dtruntime {
namespace {

// Hides a value from the optimiser, which else may foresee the error and do anything.
template <typename T>
T opaque(T value) {
  asm volatile("" : "+r"(value));
  return value;
}

TEST_CASE("planted: a digest of one byte more than there is" * doctest::skip()) {
  const HeapBlock data(5000);
  uint8_t digest[16];
  digest_chunk(data.data(), opaque(data.size()) + 1, digest);
}

TEST_CASE("planted: memory that nobody frees" * doctest::skip()) { opaque(new int[1000]); }

TEST_CASE("planted: a load that is not aligned" * doctest::skip()) {
  const HeapBlock data(16);
  CHECK(*reinterpret_cast<const uint64_t*>(opaque(data.data() + 1)) != 0);
}

TEST_CASE("planted: a sum that does not fit" * doctest::skip()) {
  CHECK(opaque(std::numeric_limits<int>::max()) + opaque(1) != 0);
}

TEST_CASE("planted: tasks that write the same place" * doctest::skip()) {
  // Until a worker came; the limit of time of the whole run ends it otherwise.
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> worker_came{false};
  int shared = 0;
  while (!worker_came) {
    parallel_for(64, 4, [&](size_t) {
      ++shared;
      if (std::this_thread::get_id() != caller) worker_came.store(true, std::memory_order_relaxed);
      std::this_thread::yield();
    });
  }
  CHECK(shared > 0);
}

}  // namespace
}  // namespace dtruntime
