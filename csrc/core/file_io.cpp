#include "file_io.h"

#include <linux/fs.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <limits>
#include <mutex>
#include <string>
#include <vector>

#include "file.h"
#include "system_calls.h"
#include "thread_pool.h"

namespace dtruntime {
namespace {

enum class Direction { kWrite, kRead };

struct Transfer {
  const File& file;
  const ExtentMap& map;
  Direction direction;
  unsigned queue_depth;
  bool direct;  // the file is in O_DIRECT mode now
};

bool is_aligned(const uint8_t* address) { return reinterpret_cast<uintptr_t>(address) % kPageBytes == 0; }

Status failed(int error, Direction direction, size_t length, size_t offset) {
  const char* const step = direction == Direction::kWrite ? "writing " : "reading ";
  return Status::system(error, step + std::to_string(length) + " bytes at offset " + std::to_string(offset));
}

// Moves the rest of the request between file and `memory`. In direct mode a refusal, or a transfer that
// stopped inside a page, leaves what is left for the pass through the cache.
Status move_rest(const Transfer& transfer, Request& request, uint8_t* memory) {
  while (request.done < request.length) {
    const size_t left = request.length - request.done;
    const size_t offset = request.offset + request.done;
    const bool writes = transfer.direction == Direction::kWrite;
    const ssize_t count =
        writes ? transfer.file.write(memory, left, offset) : transfer.file.read(memory, left, offset);
    if (count == -1 && transfer.direct && errno == EINVAL) return {};
    if (count == -1) return failed(errno, transfer.direction, left, offset);
    if (count == 0 && writes) return failed(EIO, transfer.direction, left, offset);
    if (count == 0) return Status::end_of_file("the file was cut short while it was read");
    request.done += static_cast<size_t>(count);
    memory += count;
    if (transfer.direct && request.done % kPageBytes != 0) return {};
  }
  return {};
}

Status carry_out(const Transfer& transfer, Request& request, Arena& bounce) {
  const size_t offset = request.offset + request.done;
  const size_t left = request.length - request.done;
  uint8_t* const memory = transfer.map.find(offset, left);
  if (memory != nullptr && (!transfer.direct || is_aligned(memory))) {
    return move_rest(transfer, request, memory);
  }
  if (Status status = bounce.resize(kRequestBytes); !status.ok()) return status;
  if (transfer.direction == Direction::kWrite) transfer.map.gather(offset, left, bounce.address());
  Status status = move_rest(transfer, request, bounce.address());
  if (transfer.direction == Direction::kRead) {
    transfer.map.scatter(offset, request.offset + request.done - offset, bounce.address());
  }
  return status;
}

// Carries out what is left of the requests, in direct mode of those that have whole pages, until one fails.
Status carry_out_all(const Transfer& transfer, std::span<Request> requests) {
  std::vector<Request*> waiting;
  for (Request& request : requests) {
    const bool concerned = !transfer.direct || request.whole_pages;
    if (concerned && request.done < request.length) waiting.push_back(&request);
  }
  std::atomic<size_t> next{0};
  std::mutex mutex;
  Status first_failure;
  const unsigned depth = transfer.queue_depth == 0 ? kQueueDepth : transfer.queue_depth;
  const size_t workers = std::min<size_t>(depth, waiting.size());
  parallel_for(workers, static_cast<unsigned>(workers), [&](size_t) {
    Arena bounce;
    for (size_t i; (i = next.fetch_add(1)) < waiting.size();) {
      Status status = carry_out(transfer, *waiting[i], bounce);
      if (status.ok()) continue;
      next = waiting.size();
      std::lock_guard lock(mutex);
      if (first_failure.ok()) first_failure = std::move(status);
    }
  });
  return first_failure;
}

// Everything between file and memory: first past the page cache, then through it what that left.
Status carry_out_all(const File& file, const ExtentMap& map, Direction direction, const IoOptions& options) {
  std::vector<Request> requests =
      map.cut(kRequestBytes, options.direct ? kDirectFrom : std::numeric_limits<size_t>::max());
  const bool any_direct =
      std::any_of(requests.begin(), requests.end(), [](const Request& r) { return r.whole_pages; });
  if (any_direct && file.set_direct(true)) {
    const Transfer direct{file, map, direction, options.queue_depth, true};
    if (Status status = carry_out_all(direct, requests); !status.ok()) return status;
    if (!file.set_direct(false)) return Status::system(errno, "leaving O_DIRECT");
  }
  return carry_out_all({file, map, direction, options.queue_depth, false}, requests);
}

// Opens a file that holds [0, end).
Status open_to_read(const char* path, size_t start, size_t end, File& file) {
  size_t size = 0;
  if (Status status = file.open_to_read(path, size); !status.ok()) return status;
  if (end <= size) return {};
  return Status::end_of_file("bytes [" + std::to_string(start) + ", " + std::to_string(end) +
                             ") were asked for, the file has " + std::to_string(size));
}

Status sync_folder(const char* path) {
  File folder;
  if (Status status = folder.open_folder(folder_of(path).c_str()); !status.ok()) return status;
  if (Status status = folder.sync(); !status.ok()) return status;
  return folder.close();
}

}  // namespace

Status write_extents(const char* path, std::span<const Extent> extents, const WriteOptions& options) {
  if (Status status = check_extents(extents); !status.ok()) return status;
  const ExtentMap map(extents);
  const size_t nbytes = options.nbytes.value_or(map.end());
  if (nbytes < map.end()) {
    return Status::invalid("the last extent ends at " + std::to_string(map.end()) +
                           ", after the end of the file, nbytes=" + std::to_string(nbytes));
  }
  File file;
  if (Status status = file.create(path); !status.ok()) return status;
  if (Status status = file.reserve(nbytes); !status.ok()) return status;
  if (Status status = carry_out_all(file, map, Direction::kWrite, options); !status.ok()) return status;
  if (Status status = file.sync(); !status.ok()) return status;
  if (Status status = file.close(); !status.ok()) return status;
  return options.sync_folder ? sync_folder(path) : Status{};
}

Status write_file(const char* path, std::span<const std::span<const uint8_t>> buffers,
                  const WriteOptions& options) {
  std::vector<Extent> extents;
  size_t offset = 0;
  for (const auto& buffer : buffers) {
    extents.push_back({const_cast<uint8_t*>(buffer.data()), offset, buffer.size()});
    offset += buffer.size();
  }
  return write_extents(path, extents, options);
}

Status read_extents(const char* path, std::span<const Extent> extents, const IoOptions& options) {
  if (Status status = check_extents(extents); !status.ok()) return status;
  std::vector<Range> memory;
  for (const Extent& extent : extents) {
    memory.push_back({reinterpret_cast<uintptr_t>(extent.memory), extent.length});
  }
  if (Status status = check_disjoint(memory); !status.ok()) {
    return Status::invalid("in memory, " + status.what);
  }
  const ExtentMap map(extents);
  File file;
  if (Status status = open_to_read(path, 0, map.end(), file); !status.ok()) return status;
  return carry_out_all(file, map, Direction::kRead, options);
}

Status read_file(const char* path, size_t offset, size_t length, const IoOptions& options, Arena& arena) {
  const size_t end = length > std::numeric_limits<size_t>::max() - offset ? std::numeric_limits<size_t>::max()
                                                                          : offset + length;
  File file;
  if (Status status = open_to_read(path, offset, end, file); !status.ok()) return status;
  if (Status status = arena.resize(length, offset % kPageBytes); !status.ok()) return status;
  const Extent all{arena.address(), offset, length};
  return carry_out_all(file, ExtentMap(std::span(&all, 1)), Direction::kRead, options);
}

Status rename_noreplace(const char* source, const char* target) {
  const int result = system_calls::renameat2(source, target, RENAME_NOREPLACE);
  return result == -1 ? Status::system(errno, "renaming without replacing") : Status{};
}

}  // namespace dtruntime
