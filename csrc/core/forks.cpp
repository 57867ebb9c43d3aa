#include "forks.h"

#include <pthread.h>

#include <atomic>

namespace dtruntime {
namespace {

std::atomic<uint64_t> count{0};

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { ++count; });

}  // namespace

uint64_t forks() { return count.load(std::memory_order_relaxed); }

}  // namespace dtruntime
