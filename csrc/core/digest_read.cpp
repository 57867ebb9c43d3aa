#include "digest_read.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <limits>
#include <mutex>
#include <string>
#include <vector>

#include "bytes.h"
#include "digest.h"
#include "file.h"
#include "thread_pool.h"

namespace dtruntime {
namespace {

// What one thread reads at a time: it stays in the caches until it is digested, and a thread is woken for it.
constexpr size_t kTaskBytes = 1 << 20;

// That many keep a disk busy, whatever the number of CPUs; more only take turns on few CPUs.
constexpr unsigned kReaders = 4;

Status read_fully(const File& file, uint8_t* memory, size_t length, size_t offset) {
  while (length > 0) {
    const ssize_t count = file.read(memory, length, offset);
    if (count == -1) {
      return Status::system(
          errno, "reading " + std::to_string(length) + " bytes at offset " + std::to_string(offset));
    }
    if (count == 0) return Status::end_of_file("the file was cut short while it was read");
    memory += count;
    offset += static_cast<size_t>(count);
    length -= static_cast<size_t>(count);
  }
  return {};
}

// No range of the file may end where no file does, and no byte of memory be another's too.
Status check(std::span<const Extent> extents, std::span<const Range> in_file, size_t chunk_bytes) {
  constexpr size_t kLargestOffset = std::numeric_limits<int64_t>::max();
  if (Status status = check_ranges(in_file, kLargestOffset, chunk_bytes); !status.ok()) return status;
  std::vector<Range> in_memory;
  for (const Extent& extent : extents) {
    in_memory.push_back({reinterpret_cast<uintptr_t>(extent.memory), extent.length});
  }
  Status status = check_disjoint(in_memory);
  if (!status.ok()) status.what = "in memory, " + status.what;
  return status;
}

}  // namespace

Status read_and_digest(const char* path, std::span<const Extent> extents, size_t chunk_bytes,
                       unsigned threads, uint8_t* digests) {
  std::vector<Range> ranges;
  size_t end = 0;
  for (const Extent& extent : extents) ranges.push_back({extent.offset, extent.length});
  if (Status status = check(extents, ranges, chunk_bytes); !status.ok()) return status;
  for (const Range& range : ranges) end = std::max(end, range.offset + range.length);
  File file;
  size_t size = 0;
  if (Status status = file.open_to_read(path, size); !status.ok()) return status;
  if (size < end) {
    return Status::end_of_file("bytes up to " + std::to_string(end) + " were asked for, the file has " +
                               std::to_string(size));
  }
  const ChunkList chunks(ranges, chunk_bytes);
  const size_t batch = std::max<size_t>(1, kTaskBytes / chunk_bytes);
  const size_t tasks = divide_up(chunks.size(), batch);
  std::atomic<bool> stopped{false};
  std::mutex mutex;
  Status first_failure;
  if (threads == 0) threads = std::max(kReaders, default_threads());
  parallel_for(tasks, threads, [&](size_t task) {
    const size_t last = std::min(chunks.size(), (task + 1) * batch);
    for (size_t i = task * batch; i < last && !stopped; ++i) {
      const Chunk chunk = chunks[i];
      const Extent& extent = extents[chunk.range];
      uint8_t* const memory = extent.memory + chunk.start;
      Status status = read_fully(file, memory, chunk.length, extent.offset + chunk.start);
      if (status.ok()) {
        digest_chunk(memory, chunk.length, digests + i * kXxh3DigestBytes);
        continue;
      }
      stopped = true;
      std::lock_guard lock(mutex);
      if (first_failure.ok()) first_failure = std::move(status);
    }
  });
  return first_failure;
}

}  // namespace dtruntime
