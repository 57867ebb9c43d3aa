// Blocks, warps, and how their lanes meet.
#include "lanes.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_host {
namespace {

class Barrier {
 public:
  explicit Barrier(unsigned parties) : parties_(parties), reasons_(parties) {}

  // Waits until all parties are here, for the same reason.
  void meet(unsigned party, const char* reason) {
    reasons_[party] = reason;
    const uint32_t generation = generation_.load();
    if (arrived_.fetch_add(1) + 1 < parties_) return wait_until_changed(generation_, generation);
    for (const char* other : reasons_) {
      if (other != reason) fail("lanes that belong together are at different places");
    }
    arrived_ = 0;
    ++generation_;
    wake_waiting(generation_);
  }

  // How often all met. Does not change while a party that has yet to come looks.
  uint32_t generation() const { return generation_; }
  bool has_waiting() const { return arrived_ > 0; }

 private:
  const unsigned parties_;
  std::vector<const char*> reasons_;
  std::atomic<uint32_t> arrived_ = 0;
  std::atomic<uint32_t> generation_ = 0;
};

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}

  Barrier barrier;
  std::atomic<unsigned> ended = 0;
  uint64_t handed[2][kWarpLanes] = {};  // by turns, so that one meeting is enough for an exchange
};

struct Block {
  explicit Block(unsigned lanes) : barrier(lanes) {
    for (unsigned first = 0; first < lanes; first += kWarpLanes) {
      warps.push_back(std::make_unique<Warp>(std::min(kWarpLanes, lanes - first)));
    }
  }

  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

thread_local Block* block_here;

const char kInBlock[] = "__syncthreads";
const char kAtTheEnd[] = "the end of the kernel";

Warp& warp_here() { return *block_here->warps[threadIdx.x / kWarpLanes]; }

void end_lane() {
  Warp& warp = warp_here();
  ++warp.ended;
  if (warp.barrier.has_waiting()) fail("a lane ended before a collective of its warp");
  block_here->barrier.meet(threadIdx.x, kAtTheEnd);
  --warp.ended;
  block_here->barrier.meet(threadIdx.x, kAtTheEnd);
}

// Every launch begins with another block: what a block does must not depend on which comes first.
std::atomic<unsigned> launches = 0;

}  // namespace

void fail(const char* what, const void* address) {
  fprintf(stderr, "cuda_on_host: %s (thread %u of block %u,%u; %p)\n", what, threadIdx.x, blockIdx.x,
          blockIdx.y, address);
  abort();
}

void meet_block() { block_here->barrier.meet(threadIdx.x, kInBlock); }

void meet_warp(const char* collective) {
  Warp& warp = warp_here();
  warp.barrier.meet(threadIdx.x % kWarpLanes, collective);
}

const uint64_t* exchange(const char* collective, unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) fail("a collective of only some lanes is not supported here");
  Warp& warp = warp_here();
  if (warp.ended > 0) fail("a lane ended before a collective of its warp");
  uint64_t* handed = warp.handed[warp.barrier.generation() % 2];
  handed[threadIdx.x % kWarpLanes] = value;
  meet_warp(collective);
  return handed;
}

void run_grid(dim3 grid, dim3 block, const std::function<void()>& lane) {
  const unsigned blocks = grid.x * grid.y;
  const unsigned first = launches++;
  Block shared(block.x);
  run_at_once(block.x, [&](unsigned number) {
    block_here = &shared;
    threadIdx = dim3(number, 0, 0);
    blockDim = block;
    gridDim = grid;
    for (unsigned i = 0; i < blocks; ++i) {
      const unsigned place = (first + i) % blocks;
      blockIdx = dim3(place % grid.x, place / grid.x, 0);
      lane();
      end_lane();
    }
  });
}

}  // namespace cuda_on_host
