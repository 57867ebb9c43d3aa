#include "system_calls.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "arena.h"
#include "bytes.h"

namespace dtruntime {
namespace {

constexpr std::array<std::string_view, kCalls> kNames = {
    "any",    "open",  "fstat", "fcntl", "fallocate", "ftruncate",
    "pwrite", "pread", "fsync", "close", "renameat2",
};
constexpr std::array<std::string_view, 3> kActions = {"fail", "shorten", "kill"};

struct Fault {
  Call call;
  uint64_t nth;
  Action action;
  int64_t value;
};

struct Faults {
  std::mutex mutex;
  std::vector<Fault> set;
  std::array<uint64_t, kCalls> made{};
};

std::atomic<bool> armed{false};

// Never destroyed: threads may make calls while the process ends.
Faults& faults() {
  static Faults* const all = new Faults;
  return *all;
}

std::optional<Fault> next_fault(Call call) {
  Faults& all = faults();
  std::lock_guard lock(all.mutex);
  if (all.set.empty()) return {};
  ++all.made[static_cast<size_t>(call)];
  ++all.made[static_cast<size_t>(Call::kAny)];
  for (const Fault& fault : all.set) {
    const bool concerned = fault.call == call || fault.call == Call::kAny;
    const uint64_t number = all.made[static_cast<size_t>(fault.call)];
    if (concerned && (fault.nth == 0 || fault.nth == number)) return fault;
  }
  return {};
}

// Makes real(length) or lets it meet its fault. O_DIRECT takes whole pages only: a transfer that is cut
// inside a page moves all of that page, reports less, and moves none after it.
template <typename Real>
auto once(Call call, size_t length, Real real) -> decltype(real(length)) {
  if (!armed.load(std::memory_order_relaxed)) return real(length);
  const std::optional<Fault> fault = next_fault(call);
  if (!fault) return real(length);
  if (fault->action == Action::kShorten) {
    const size_t most = static_cast<size_t>(fault->value);
    const auto count = real(std::min<size_t>(length, round_up(most, kPageBytes)));
    return std::min(count, static_cast<decltype(count)>(most));
  }
  if (fault->action == Action::kKill) ::kill(getpid(), SIGKILL);
  errno = static_cast<int>(fault->value);
  return -1;
}

template <typename Real>
auto repeated(Call call, size_t length, Real real) -> decltype(real(length)) {
  for (;;) {
    const auto result = once(call, length, real);
    if (result != -1 || errno != EINTR) return result;
  }
}

template <typename Real>
int repeated(Call call, Real real) {
  return repeated(call, 0, [&](size_t) { return real(); });
}

template <typename Enum, size_t N>
std::optional<Enum> named(const std::array<std::string_view, N>& names, std::string_view name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) return {};
  return static_cast<Enum>(found - names.begin());
}

}  // namespace

namespace system_calls {

int open(const char* path, int flags, mode_t mode) {
  return repeated(Call::kOpen, [&] { return ::open(path, flags, mode); });
}

int fstat(int fd, struct stat* info) {
  return repeated(Call::kFstat, [&] { return ::fstat(fd, info); });
}

int fcntl(int fd, int command, int argument) {
  return repeated(Call::kFcntl, [&] { return ::fcntl(fd, command, argument); });
}

int fallocate(int fd, off_t offset, off_t length) {
  return repeated(Call::kFallocate, [&] { return ::fallocate(fd, 0, offset, length); });
}

int ftruncate(int fd, off_t length) {
  return repeated(Call::kFtruncate, [&] { return ::ftruncate(fd, length); });
}

ssize_t pwrite(int fd, const void* data, size_t length, off_t offset) {
  return repeated(Call::kPwrite, length, [&](size_t count) { return ::pwrite(fd, data, count, offset); });
}

ssize_t pread(int fd, void* data, size_t length, off_t offset) {
  return repeated(Call::kPread, length, [&](size_t count) { return ::pread(fd, data, count, offset); });
}

int fsync(int fd) {
  return repeated(Call::kFsync, [&] { return ::fsync(fd); });
}

int close(int fd) {
  // The descriptor is free afterwards also if closing fails, so the fault comes on top of the call.
  const int faulted = once(Call::kClose, 0, [](size_t) { return 0; });
  const int error = errno;
  const int result = ::close(fd);
  if (faulted == -1) errno = error;
  return faulted == -1 ? -1 : result;
}

int renameat2(const char* source, const char* target, unsigned flags) {
  // By number: not every C library has the function.
  return repeated(Call::kRenameat2, [&] {
    return static_cast<int>(syscall(SYS_renameat2, AT_FDCWD, source, AT_FDCWD, target, flags));
  });
}

}  // namespace system_calls

std::optional<Call> call_named(std::string_view name) { return named<Call>(kNames, name); }
std::string_view name_of(Call call) { return kNames[static_cast<size_t>(call)]; }
std::optional<Action> action_named(std::string_view name) { return named<Action>(kActions, name); }

Status inject_fault(Call call, uint64_t nth, Action action, int64_t value) {
  if (action == Action::kShorten && call != Call::kPwrite && call != Call::kPread) {
    return Status::invalid("only pread and pwrite can be shortened");
  }
  if (value < (action == Action::kFail ? 1 : 0) || value > INT_MAX) {
    return Status::invalid("value must be an errno or a number of bytes, got " + std::to_string(value));
  }
  Faults& all = faults();
  std::lock_guard lock(all.mutex);
  all.set.push_back({call, nth, action, value});
  armed = true;
  return {};
}

std::array<uint64_t, kCalls> clear_faults() {
  Faults& all = faults();
  std::lock_guard lock(all.mutex);
  armed = false;
  all.set.clear();
  return std::exchange(all.made, {});
}

}  // namespace dtruntime
