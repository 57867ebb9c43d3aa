#include "file_io.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "bytes.h"
#include "thread_pool.h"

namespace dtruntime {
namespace {

constexpr size_t round_down(size_t value, size_t unit) { return value - value % unit; }

// Repeats a system call that a signal interrupted.
template <typename Call>
auto retry(Call call) {
  decltype(call()) result;
  do result = call();
  while (result == -1 && errno == EINTR);
  return result;
}

class File {
 public:
  explicit File(int fd) : fd(fd) {}
  ~File() {
    if (fd >= 0) ::close(fd);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Some file systems report a failed write only here. A closed descriptor is never closed again.
  Status close() {
    const int result = ::close(std::exchange(fd, -1));
    return result == -1 && errno != EINTR ? Status::system(errno, "closing") : Status{};
  }

  // False where the file system refuses it. Changes the open file, so nothing else may be using it.
  bool set_direct(bool on) const {
    const int flags = fcntl(fd, F_GETFL);
    return flags != -1 && fcntl(fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
  }

  int fd;
};

// A run of at most kRequestBytes of a file that starts at a page; the first `done` bytes are through.
struct Request {
  size_t offset;
  size_t length;
  size_t done = 0;
};

std::vector<Request> cut(size_t start, size_t end) {
  std::vector<Request> requests;
  for (size_t at = start; at < end; at += kRequestBytes) {
    requests.push_back({at, std::min(kRequestBytes, end - at)});
  }
  return requests;
}

// Calls act(request, bounce buffer) for every request on `threads` threads until one fails.
template <typename Act>
Status for_each_request(std::span<Request> requests, unsigned threads, Act act) {
  std::atomic<size_t> next{0};
  std::mutex mutex;
  Status first_failure;
  const size_t workers = std::min<size_t>(threads == 0 ? kIoThreads : threads, requests.size());
  parallel_for(workers, static_cast<unsigned>(workers), [&](size_t) {
    Arena bounce;
    for (size_t i; (i = next.fetch_add(1)) < requests.size();) {
      Status status = act(requests[i], bounce);
      if (status.ok()) continue;
      next = requests.size();
      std::lock_guard lock(mutex);
      if (first_failure.ok()) first_failure = std::move(status);
    }
  });
  return first_failure;
}

// Several buffers seen as the one run of bytes that they become in the file.
class Source {
 public:
  explicit Source(std::span<const std::span<const uint8_t>> buffers) : buffers_(buffers) {
    for (const auto& buffer : buffers) {
      starts_.push_back(size_);
      size_ += buffer.size();
    }
  }

  size_t size() const { return size_; }

  // Where [offset, offset + length) lies, or null if it does not lie in one buffer. REQUIRES: length > 0.
  const uint8_t* find(size_t offset, size_t length) const {
    const size_t i = buffer_of(offset);
    const size_t inside = offset - starts_[i];
    return length <= buffers_[i].size() - inside ? buffers_[i].data() + inside : nullptr;
  }

  void copy(size_t offset, size_t length, uint8_t* target) const {
    for (size_t i = buffer_of(offset); length > 0; ++i) {
      const size_t inside = offset - starts_[i];
      const size_t piece = std::min(length, buffers_[i].size() - inside);
      if (piece > 0) memcpy(target, buffers_[i].data() + inside, piece);
      offset += piece;
      target += piece;
      length -= piece;
    }
  }

 private:
  // The last buffer that starts at or before offset, so never an empty one in front of it.
  size_t buffer_of(size_t offset) const {
    return std::upper_bound(starts_.begin(), starts_.end(), offset) - starts_.begin() - 1;
  }

  std::span<const std::span<const uint8_t>> buffers_;
  std::vector<size_t> starts_;
  size_t size_ = 0;
};

bool is_aligned(const uint8_t* address) { return reinterpret_cast<uintptr_t>(address) % kPageBytes == 0; }

// Writes what is left of the request up to `end` bytes of it. In direct mode a refusal, or a transfer that
// stopped inside a page, leaves the rest for the pass through the cache.
Status write_request(const File& file, const Source& source, Request& request, size_t end, bool direct,
                     Arena& bounce) {
  if (request.done >= end) return {};
  const size_t begin = request.done;
  const uint8_t* bytes = source.find(request.offset + begin, end - begin);
  if (bytes == nullptr || (direct && !is_aligned(bytes))) {
    if (Status status = bounce.resize(kRequestBytes); !status.ok()) return status;
    source.copy(request.offset + begin, end - begin, bounce.address());
    bytes = bounce.address();
  }
  while (request.done < end) {
    const ssize_t count = retry([&] {
      return pwrite(file.fd, bytes + (request.done - begin), end - request.done,
                    static_cast<off_t>(request.offset + request.done));
    });
    if (count == -1 && direct && errno == EINVAL) return {};
    if (count == -1) return Status::system(errno, "writing");
    if (count == 0) return Status::system(EIO, "writing");
    request.done += static_cast<size_t>(count);
    if (direct && request.done % kPageBytes != 0) return {};
  }
  return {};
}

// Reads the request to `target`; in direct mode whole pages, which may end after the file does.
Status read_request(const File& file, Request& request, uint8_t* target, bool direct) {
  while (request.done < request.length) {
    const size_t left = request.length - request.done;
    const ssize_t count = retry([&] {
      return pread(file.fd, target + request.done, direct ? round_up(left, kPageBytes) : left,
                   static_cast<off_t>(request.offset + request.done));
    });
    if (count == -1 && direct && errno == EINVAL) return {};
    if (count == -1) return Status::system(errno, "reading");
    if (count == 0) return Status::end_of_file("the file was cut short while it was read");
    request.done += static_cast<size_t>(count);
    if (direct && request.done % kPageBytes != 0) return {};
  }
  return {};
}

Status reserve(const File& file, size_t nbytes) {
  if (nbytes == 0) return {};
  const int result = retry([&] { return fallocate(file.fd, 0, 0, static_cast<off_t>(nbytes)); });
  if (result == 0 || errno == EOPNOTSUPP || errno == ENOSYS) return {};
  return Status::system(errno, "reserving " + std::to_string(nbytes) + " bytes");
}

Status write_all(const File& file, const Source& source, unsigned threads, bool direct) {
  std::vector<Request> requests = cut(0, source.size());
  if (direct && source.size() >= kDirectFrom && file.set_direct(true)) {
    Status status = for_each_request(requests, threads, [&](Request& request, Arena& bounce) {
      return write_request(file, source, request, round_down(request.length, kPageBytes), true, bounce);
    });
    if (!status.ok()) return status;
    if (!file.set_direct(false)) return Status::system(errno, "leaving O_DIRECT");
  }
  return for_each_request(requests, threads, [&](Request& request, Arena& bounce) {
    return write_request(file, source, request, request.length, false, bounce);
  });
}

}  // namespace

Status write_file(const char* path, std::span<const std::span<const uint8_t>> buffers, unsigned threads,
                  bool direct) {
  File file(retry([&] { return open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666); }));
  if (file.fd == -1) return Status::system(errno, "creating");
  const Source source(buffers);
  if (Status status = reserve(file, source.size()); !status.ok()) return status;
  if (Status status = write_all(file, source, threads, direct); !status.ok()) return status;
  if (retry([&] { return fsync(file.fd); }) == -1) return Status::system(errno, "fsync");
  return file.close();
}

Status read_file(const char* path, size_t offset, size_t length, unsigned threads, bool direct,
                 Arena& arena) {
  // O_NONBLOCK: opening a FIFO would wait for its writer. It means nothing for a regular file.
  const File file(retry([&] { return open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); }));
  if (file.fd == -1) return Status::system(errno, "opening");
  struct stat info;
  if (fstat(file.fd, &info) == -1) return Status::system(errno, "fstat");
  if (S_ISDIR(info.st_mode)) return Status::system(EISDIR, "opening");
  if (!S_ISREG(info.st_mode)) return Status::invalid("not a regular file");
  const size_t size = static_cast<size_t>(info.st_size);
  if (offset > size || length > size - offset) {
    return Status::end_of_file("bytes [" + std::to_string(offset) + ", +" + std::to_string(length) +
                               ") were asked for, the file has " + std::to_string(size));
  }
  if (Status status = arena.resize(length, offset % kPageBytes); !status.ok()) return status;

  const size_t start = round_down(offset, kPageBytes);
  uint8_t* const first_page = arena.address() - (offset - start);
  std::vector<Request> requests = length == 0 ? std::vector<Request>{} : cut(start, offset + length);
  const auto read_pass = [&](bool by_direct) {
    return for_each_request(requests, threads, [&](Request& request, Arena&) {
      return read_request(file, request, first_page + (request.offset - start), by_direct);
    });
  };
  if (direct && length >= kDirectFrom && file.set_direct(true)) {
    if (Status status = read_pass(true); !status.ok()) return status;
    if (!file.set_direct(false)) return Status::system(errno, "leaving O_DIRECT");
  }
  return read_pass(false);
}

Status rename_noreplace(const char* source, const char* target) {
  // By number: not every C library has the function.
  const long result =
      retry([&] { return syscall(SYS_renameat2, AT_FDCWD, source, AT_FDCWD, target, RENAME_NOREPLACE); });
  return result == -1 ? Status::system(errno, "renaming without replacing") : Status{};
}

}  // namespace dtruntime
