// The tables that the digest kernel reads and fills: which chunks there are, and which of them changed.
#include <algorithm>

#include "../core/bytes.h"
#include "../core/xxh3.h"
#include "check.h"
#include "digest.h"

namespace dtruntime::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kMostBlocksOfRange = 64;

struct ListedRange {
  DeviceRange range;
  uint64_t first;  // the number of its first chunk
};

// Ranges travel in the launch itself, which holds 4 KiB: so the call neither waits for the device nor leaves
// anything in memory that a captured graph would read again when it is replayed.
struct RangeBatch {
  static constexpr unsigned kRanges = 120;
  ListedRange ranges[kRanges];
  uint64_t chunk_bytes;
};
static_assert(sizeof(RangeBatch) <= 4000, "a launch holds 4 KiB of arguments");

// Block (x, y) lists every gridDim.y-th row of kThreads chunks of range x.
__global__ void __launch_bounds__(kThreads)
    list_kernel(const __grid_constant__ RangeBatch batch, DeviceChunk* chunks) {
  const DeviceRange range = batch.ranges[blockIdx.x].range;
  const uint64_t count = divide_up(range.length, batch.chunk_bytes);
  const uint64_t step = static_cast<uint64_t>(gridDim.y) * kThreads;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.y) * kThreads + threadIdx.x; i < count; i += step) {
    const uint64_t start = i * batch.chunk_bytes;
    const uint64_t rest = range.length - start;
    chunks[batch.ranges[blockIdx.x].first + i] = {
        range.source + start,
        rest < batch.chunk_bytes ? rest : batch.chunk_bytes,
        range.target == nullptr ? nullptr : range.target + start,
    };
  }
}

// One thread a chunk. The lanes of a warp that found a change take their places in the list together: one
// atomic operation a warp. Every lane stays until then, also those after the last chunk.
__global__ void __launch_bounds__(kThreads) find_kernel(const uint4* digests, uint4* known, uint32_t count,
                                                        uint32_t* changed, uint32_t* changed_count) {
  const uint32_t chunk = blockIdx.x * kThreads + threadIdx.x;
  bool differs = false;
  if (chunk < count) {
    const uint4 now = digests[chunk];
    const uint4 before = known[chunk];
    differs = now.x != before.x || now.y != before.y || now.z != before.z || now.w != before.w;
    if (differs) known[chunk] = now;
  }
  const unsigned lane = threadIdx.x % 32;
  const unsigned found = __ballot_sync(0xffffffffu, differs);
  uint32_t place = 0;
  if (lane == 0 && found != 0) place = atomicAdd(changed_count, static_cast<uint32_t>(__popc(found)));
  place = __shfl_sync(0xffffffffu, place, 0);
  if (differs) changed[place + __popc(found & ((1u << lane) - 1))] = chunk;
}

}  // namespace

Status list_chunks(std::span<const DeviceRange> ranges, uint64_t chunk_bytes, DeviceChunk* chunks,
                   Stream stream) {
  const DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  uint64_t first = 0;
  while (!ranges.empty()) {
    RangeBatch batch = {};
    batch.chunk_bytes = chunk_bytes;
    const size_t size = std::min<size_t>(ranges.size(), RangeBatch::kRanges);
    uint64_t longest = 0;
    for (size_t i = 0; i < size; ++i) {
      batch.ranges[i] = {ranges[i], first};
      const uint64_t count = divide_up(ranges[i].length, chunk_bytes);
      first += count;
      longest = std::max(longest, count);
    }
    ranges = ranges.subspan(size);
    if (longest == 0) continue;
    const uint64_t blocks = std::min<uint64_t>(divide_up(longest, kThreads), kMostBlocksOfRange);
    const dim3 grid(static_cast<unsigned>(size), static_cast<unsigned>(blocks));
    if (Status status = launch("list_chunks", list_kernel, grid, kThreads, stream, batch, chunks);
        !status.ok()) {
      return status;
    }
  }
  return {};
}

Status find_changed(const uint8_t* digests, uint8_t* known, size_t count, uint32_t* changed,
                    uint32_t* changed_count, Stream stream) {
  const DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  Status cleared = clear(changed_count, sizeof *changed_count, stream);
  if (!cleared.ok() || count == 0) return cleared;
  return launch("find_changed", find_kernel, static_cast<unsigned>(divide_up(count, kThreads)), kThreads,
                stream, reinterpret_cast<const uint4*>(digests), reinterpret_cast<uint4*>(known),
                static_cast<uint32_t>(count), changed, changed_count);
}

}  // namespace dtruntime::cuda
