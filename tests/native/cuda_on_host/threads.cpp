#include <thread>
#include <vector>

#include "lanes.h"

namespace cuda_on_host {

void run_at_once(unsigned count, const std::function<void(unsigned)>& lane) {
  std::vector<std::thread> threads;
  for (unsigned number = 0; number < count; ++number) threads.emplace_back(lane, number);
  for (std::thread& thread : threads) thread.join();
}

void wait_until_changed(std::atomic<uint32_t>& word, uint32_t old) { word.wait(old); }

void wake_waiting(std::atomic<uint32_t>& word) { word.notify_all(); }

}  // namespace cuda_on_host
