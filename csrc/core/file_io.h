// Files written and read by several requests at once, past the page cache where that pays.
//
// With `direct`, runs of whole pages go by O_DIRECT in requests of kRequestBytes. What a file system refuses
// to take that way (EINVAL), runs shorter than kDirectFrom, and the ends that fill no page go through the
// page cache. Memory that does not lie in its page as its bytes lie in the file's (address % kPageBytes !=
// file offset % kPageBytes), or that changes from one extent to another inside a request, is copied through a
// buffer of kRequestBytes per request in flight; all other memory is transferred from and to where it is.
//
// Paths are NUL-terminated bytes. All functions may be called from any thread and return when all is done.
// EINTR and short transfers are handled inside. Failures of transfers name the offset in the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "arena.h"
#include "extents.h"
#include "status.h"

namespace dtruntime {

inline constexpr size_t kRequestBytes = 8 << 20;
inline constexpr size_t kDirectFrom = 256 << 10;  // shorter transfers are done sooner through the cache
inline constexpr unsigned kQueueDepth = 8;        // requests in flight, whatever the number of CPUs

struct IoOptions {
  unsigned queue_depth = 0;  // requests in flight, a thread each; 0: kQueueDepth
  bool direct = true;
};

struct WriteOptions : IoOptions {
  std::optional<size_t> nbytes;  // length of the file; none: the end of the last extent
  bool sync_folder = false;      // makes the file's name durable too, not only its bytes
};

// Creates `path`, which must not exist, and returns once its bytes and its length are durable. What no extent
// covers reads as zeros. Space for the whole length, holes included, is reserved before anything is written,
// so that a full disk is found at once (where the file system can reserve). Memory is only read, and not
// kept.
//
// kInvalid, with nothing made: two extents share a byte of the file, or one ends after nbytes. kSystem: the
// file is left as it is then, for the caller to unlink; its contents are undefined, its length may be final.
Status write_extents(const char* path, std::span<const Extent> extents, const WriteOptions& options);

// As write_extents, with `buffers` one after another.
Status write_file(const char* path, std::span<const std::span<const uint8_t>> buffers,
                  const WriteOptions& options);

// Fills the extents from a regular file. Writes no memory but theirs, and after a failure theirs is
// undefined. kInvalid, with nothing read: two extents share a byte of the file or of memory, or it is no
// regular file. kEndOfFile: the file is shorter, found before anything is read, or when it shrinks meanwhile.
Status read_extents(const char* path, std::span<const Extent> extents, const IoOptions& options);

// Reads exactly `length` bytes from `offset` into `arena`, which is resized; its address is then congruent to
// `offset` modulo kPageBytes. Fails as read_extents; a short file is found before memory is taken.
Status read_file(const char* path, size_t offset, size_t length, const IoOptions& options, Arena& arena);

// Renames `source` to `target` in one step and only if there is no `target`. kSystem: EEXIST if there is one,
// EINVAL or ENOSYS if the file system or the kernel cannot do this.
Status rename_noreplace(const char* source, const char* target);

}  // namespace dtruntime
