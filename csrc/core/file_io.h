// Whole files written and ranges of files read by several threads, past the page cache where that pays.
//
// With `direct`, page-aligned runs go by O_DIRECT in requests of kRequestBytes; a file system that refuses it
// (EINVAL), short files and unaligned ends go through the page cache. Memory that does not lie in its page as
// its bytes lie in the file's (address % kPageBytes != file offset % kPageBytes) is copied through a bounce
// buffer of kRequestBytes per thread.
//
// Paths are NUL-terminated bytes. All functions may be called from any thread and return when all is done.
// EINTR and short transfers are handled inside. `threads` as in parallel_for, but 0 means kIoThreads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "arena.h"
#include "status.h"

namespace dtruntime {

inline constexpr size_t kRequestBytes = 8 << 20;
inline constexpr size_t kDirectFrom = 256 << 10;  // shorter transfers are done sooner through the cache
inline constexpr unsigned kIoThreads = 8;         // requests in flight, whatever the number of CPUs

// Creates `path`, which must not exist, with `buffers` one after another, and returns once its bytes and its
// length are durable (fsync of the file; its folder's entry is the caller's). The space is reserved before
// anything is written, so a full disk is found at once. Buffers are read only, and not kept.
// kSystem on failure; the file is left as it is then, for the caller to unlink.
Status write_file(const char* path, std::span<const std::span<const uint8_t>> buffers, unsigned threads,
                  bool direct);

// Reads exactly `length` bytes from `offset` into `arena`, which is resized; its address is then congruent
// to `offset` modulo kPageBytes. kEndOfFile if the file is shorter, found before memory is taken; kInvalid
// if it is no regular file; kSystem else. After a failure the arena's contents are undefined.
Status read_file(const char* path, size_t offset, size_t length, unsigned threads, bool direct, Arena& arena);

// Renames `source` to `target` in one step and only if there is no `target`. kSystem: EEXIST if there is one,
// EINVAL or ENOSYS if the file system or the kernel cannot do this.
Status rename_noreplace(const char* source, const char* target);

}  // namespace dtruntime
