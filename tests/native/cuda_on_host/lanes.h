// What runs the lanes of a block at once, of which there are two kinds: threads.cpp, for the sanitizers, and
// fibers.cpp, which is many times faster.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace cuda_on_host {

// Runs lane(0) to lane(count - 1), all at once, and returns when all have.
void run_at_once(unsigned count, const std::function<void(unsigned)>& lane);

// Lets other lanes run until the word is no longer `old`.
void wait_until_changed(std::atomic<uint32_t>& word, uint32_t old);

// Called after it was changed.
void wake_waiting(std::atomic<uint32_t>& word);

}  // namespace cuda_on_host
