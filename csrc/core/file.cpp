#include "file.h"

#include <fcntl.h>

#include <cerrno>
#include <utility>

#include "system_calls.h"

namespace dtruntime {

File::~File() {
  // Reached with an open descriptor only by readers, which lose nothing, and on the way out with a failure.
  if (fd_ != -1) (void)system_calls::close(fd_);
}

Status File::opened(int fd, const char* step) {
  fd_ = fd;
  return fd == -1 ? Status::system(errno, step) : Status{};
}

Status File::create(const char* path) {
  return opened(system_calls::open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666), "creating");
}

Status File::open_to_read(const char* path, size_t& size) {
  // O_NONBLOCK: opening a FIFO would wait for its writer. It means nothing for a regular file.
  Status status = opened(system_calls::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), "opening");
  if (!status.ok()) return status;
  struct stat info;
  if (system_calls::fstat(fd_, &info) == -1) return Status::system(errno, "fstat");
  if (S_ISDIR(info.st_mode)) return Status::system(EISDIR, "opening");
  if (!S_ISREG(info.st_mode)) return Status::invalid("not a regular file");
  size = static_cast<size_t>(info.st_size);
  return {};
}

Status File::open_folder(const char* path) {
  return opened(system_calls::open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC), "opening its folder");
}

Status File::reserve(size_t nbytes) const {
  if (nbytes == 0) return {};
  const auto length = static_cast<off_t>(nbytes);
  int result = system_calls::fallocate(fd_, 0, length);
  if (result == -1 && (errno == EOPNOTSUPP || errno == ENOSYS)) result = system_calls::ftruncate(fd_, length);
  return result == -1 ? Status::system(errno, "reserving " + std::to_string(nbytes) + " bytes") : Status{};
}

bool File::set_direct(bool on) const {
  const int flags = system_calls::fcntl(fd_, F_GETFL, 0);
  return flags != -1 && system_calls::fcntl(fd_, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
}

ssize_t File::write(const void* data, size_t length, size_t offset) const {
  return system_calls::pwrite(fd_, data, length, static_cast<off_t>(offset));
}

ssize_t File::read(void* data, size_t length, size_t offset) const {
  return system_calls::pread(fd_, data, length, static_cast<off_t>(offset));
}

// Never tried again after a failure. Linux marks pages clean when their writing failed and drops them when it
// needs the memory, and reports the failure once: the next fsync succeeds and the bytes are gone. So the file
// has to be written anew. (https://lwn.net/Articles/752063/; Rebello et al., "Can Applications Recover from
// fsync Failures?", USENIX ATC 2020.) EINTR is no failure: the call was stopped while it waited.
Status File::sync() const {
  if (system_calls::fsync(fd_) == 0) return {};
  return Status::system(errno, "fsync: what was written may be lost; delete the file and write it again");
}

Status File::close() {
  const int result = system_calls::close(std::exchange(fd_, -1));
  return result == -1 && errno != EINTR ? Status::system(errno, "closing") : Status{};
}

std::string folder_of(const char* path) {
  const std::string name(path);
  const size_t slash = name.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : name.substr(0, slash);
}

}  // namespace dtruntime
