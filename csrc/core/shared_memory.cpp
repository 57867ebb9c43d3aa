#include "shared_memory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace dtruntime {
namespace {

constexpr size_t kLongestName = 200;
// A signal makes the kernel give a reservation up and begin again: so each is short.
constexpr size_t kPieceBytes = 64 << 20;

std::string path_of(const std::string& name) { return kSharedMemoryFolder + name; }

bool is_name(const std::string& name) {
  const auto good = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  };
  return !name.empty() && name.size() <= kLongestName && name[0] != '.' &&
         std::all_of(name.begin(), name.end(), good);
}

std::string sized(const char* doing, size_t nbytes) {
  return doing + (" " + std::to_string(nbytes)) + " bytes of shared memory";
}

}  // namespace

SharedMemory::~SharedMemory() {
  if (is_open()) (void)close(file_);
}

Status SharedMemory::open(const std::string& name, int flags) {
  if (!is_name(name)) {
    return Status::invalid(
        "a name of shared memory has 1 to 200 of A-Z a-z 0-9 . _ - and begins with no dot");
  }
  // O_NONBLOCK: a pipe of that name must not make us wait.
  file_ = ::open(path_of(name).c_str(), flags | O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600);
  if (file_ < 0) return Status::system(errno, "opening shared memory");
  name_ = name;
  return {};
}

Status SharedMemory::create(const std::string& name) {
  if (Status status = open(name, O_CREAT | O_EXCL); !status.ok()) return status;
  Status status = hold();
  if (!status.ok()) (void)unlink();
  return status;
}

// Between its making and this lock a sweep may have taken the name for a dead one's, or be about to.
Status SharedMemory::hold() {
  if (flock(file_, LOCK_EX | LOCK_NB) != 0) return Status::system(errno, "locking shared memory");
  struct stat about;
  if (fstat(file_, &about) != 0) return Status::system(errno, "looking at shared memory");
  return about.st_nlink > 0 ? Status{}
                            : Status::system(EAGAIN, "making shared memory, whose name was removed");
}

Status SharedMemory::attach(const std::string& name, size_t* nbytes) {
  if (Status status = open(name, 0); !status.ok()) return status;
  struct stat about;
  if (fstat(file_, &about) != 0) return Status::system(errno, "looking at shared memory");
  if (!S_ISREG(about.st_mode)) return Status::invalid("it is no regular file");
  if (about.st_uid != geteuid()) {
    return Status::system(EPERM, "it belongs to user " + std::to_string(about.st_uid));
  }
  *nbytes = static_cast<size_t>(about.st_size);
  return {};
}

Status SharedMemory::truncate(size_t nbytes) {
  while (ftruncate(file_, static_cast<off_t>(nbytes)) != 0) {
    if (errno != EINTR) return Status::system(errno, sized("making", nbytes));
  }
  return {};
}

size_t SharedMemory::allocated() const {
  struct stat about;
  return fstat(file_, &about) == 0 ? static_cast<size_t>(about.st_blocks) * 512 : 0;
}

Status SharedMemory::check_room(size_t nbytes) const {
  struct statvfs about;
  struct stat ours;
  if (fstatvfs(file_, &about) != 0 || fstat(file_, &ours) != 0) {
    return Status::system(errno, "looking for room");
  }
  const size_t held = static_cast<size_t>(ours.st_blocks) * 512;
  const size_t room = static_cast<size_t>(about.f_bavail) * about.f_frsize;
  const bool limited = about.f_blocks > 0;
  if (!limited || nbytes <= held || nbytes - held <= room) return {};
  return Status::system(ENOSPC,
                        sized("reserving", nbytes) + ", where there is room for " + std::to_string(room));
}

Status SharedMemory::reserve(size_t nbytes) {
  for (size_t at = 0; at < nbytes;) {
    const size_t piece = std::min(kPieceBytes, nbytes - at);
    if (fallocate(file_, 0, static_cast<off_t>(at), static_cast<off_t>(piece)) == 0) {
      at += piece;
    } else if (errno != EINTR) {
      return Status::system(errno, sized("reserving", nbytes));
    }
  }
  return {};
}

Status SharedMemory::unlink() {
  struct stat about;
  if (fstat(file_, &about) != 0) return Status::system(errno, "looking at shared memory");
  if (about.st_nlink == 0) return Status::system(ENOENT, "removing the name of shared memory");
  if (::unlink(path_of(name_).c_str()) != 0) {
    return Status::system(errno, "removing the name of shared memory");
  }
  return {};
}

}  // namespace dtruntime
