// Chunks of a file to where they belong in memory, each digested as soon as it is there, while it is in the
// caches.
//
// Reads through the page cache: what one process of a host has read the others find there, and memory may lie
// anywhere. To go past it is file_io's, for memory that lies as the file does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "extents.h"
#include "status.h"

namespace dtruntime {

// Fills the extents from the regular file at `path`, and stores the digests of their chunks, in the order of
// the extents, 16 bytes each at `digests`. An extent is cut into chunks of `chunk_bytes` from its own start.
// They are read in the order in which they are given, on `threads` threads (0: at least 4, to keep a disk
// busy). A file that changes meanwhile gives digests of what was read.
//
// kInvalid, with nothing read: chunk_bytes is 0, two extents share a byte of memory, one ends after the
// largest offset of a file, or it is no regular file. kEndOfFile: the file is shorter, found before anything
// is read, or when it shrinks meanwhile. kSystem: a read failed. After a failure the memory of the extents
// and the digests are undefined.
Status read_and_digest(const char* path, std::span<const Extent> extents, size_t chunk_bytes,
                       unsigned threads, uint8_t* digests);

}  // namespace dtruntime
