// The system calls of file_io, and the seam at which tests let them fail.
//
// Each function is the call of its name: same arguments, -1 and errno on failure, except that one that a
// signal interrupted is repeated. Callable from any thread. While no fault is set they cost one relaxed load
// more than the call itself.
#pragma once

#include <sys/stat.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "status.h"

namespace dtruntime {

namespace system_calls {

int open(const char* path, int flags, mode_t mode = 0);
int fstat(int fd, struct stat* info);
int fcntl(int fd, int command, int argument);
int fallocate(int fd, off_t offset, off_t length);
int ftruncate(int fd, off_t length);
ssize_t pwrite(int fd, const void* data, size_t length, off_t offset);
ssize_t pread(int fd, void* data, size_t length, off_t offset);
int fsync(int fd);
int close(int fd);  // never repeated: Linux frees the descriptor even if it reports EINTR
int renameat2(const char* source, const char* target, unsigned flags);

}  // namespace system_calls

// For tests alone: what the calls of one kind meet.
enum class Call : uint8_t {
  kAny,  // counts the calls of all kinds together
  kOpen,
  kFstat,
  kFcntl,
  kFallocate,
  kFtruncate,
  kPwrite,
  kPread,
  kFsync,
  kClose,
  kRenameat2,
};
inline constexpr size_t kCalls = 11;

enum class Action : uint8_t {
  kFail,     // not made; reports -1 and errno `value`
  kShorten,  // pread, pwrite: transfers and reports at most `value` bytes
  kKill,     // SIGKILL to this process instead of the call
};

std::optional<Call> call_named(std::string_view name);
std::string_view name_of(Call call);
std::optional<Action> action_named(std::string_view name);

// From now on the `nth` call of this kind, counted from the first inject_fault since clear_faults, meets the
// action; 0 means each. A call that is repeated after EINTR counts again. Several faults may be set; a call
// meets the one that was set first. kInvalid if only a transfer can meet the action, or if `value` is no
// errno and no number of bytes. Callable from any thread.
Status inject_fault(Call call, uint64_t nth, Action action, int64_t value);

// Removes all faults and says how many calls of each kind were made since the first was set.
std::array<uint64_t, kCalls> clear_faults();

}  // namespace dtruntime
