// Mapping pages and touching them for the first time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "status.h"

namespace dtruntime {

inline constexpr size_t kPageBytes = 4096;

// Maps `nbytes` bytes for reading and writing and stores where: zeros of our own, or with a `file` its first
// bytes, shared with whoever else maps it. From 4 MiB on they begin at a multiple of 2 MiB and the kernel is
// asked for huge pages. The caller unmaps them, by munmap. kSystem if the system refuses; nothing is stored
// then. REQUIRES: nbytes > 0 is a multiple of kPageBytes.
Status map_pages(size_t nbytes, int file, uint8_t** pages);
inline constexpr int kNoFile = -1;

// Makes the system hand out these pages now, in parallel and leaving what is in them as it is, so that nobody
// waits for them later. `threads` as in parallel_for. kSystem if it cannot: ENOMEM; EFAULT where shared
// memory has no room; EINVAL from kernels before 5.14. REQUIRES: pages start at a page; nobody unmaps them
// meanwhile.
Status populate_pages(std::span<uint8_t> pages, unsigned threads);

// The same by writing a byte of each page, on any kernel; where there is no room the process ends.
void touch_pages(std::span<uint8_t> pages, unsigned threads);

}  // namespace dtruntime
