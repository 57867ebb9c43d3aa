#include "pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <string>

#include "bytes.h"
#include "thread_pool.h"

#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23
#endif

namespace dtruntime {
namespace {

constexpr size_t kHugePageBytes = 2 << 20;
// From here on huge pages save more page faults than they waste memory.
constexpr size_t kHugePagesFrom = 4 << 20;
constexpr size_t kPieceBytes = 8 * kHugePageBytes;

// Calls act(piece) for pieces that are whole huge pages, in parallel.
template <typename Act>
void for_each_piece(std::span<uint8_t> pages, unsigned threads, Act act) {
  parallel_for(divide_up(pages.size(), kPieceBytes), threads, [&](size_t i) {
    act(pages.subspan(i * kPieceBytes, std::min(kPieceBytes, pages.size() - i * kPieceBytes)));
  });
}

int populate_piece(std::span<uint8_t> piece) {
  while (madvise(piece.data(), piece.size(), MADV_POPULATE_WRITE) != 0) {
    if (errno != EINTR && errno != EAGAIN) return errno;
  }
  return 0;
}

}  // namespace

Status map_pages(size_t nbytes, int file, uint8_t** pages) {
  const auto refused = [nbytes] {
    return Status::system(errno, "mapping " + std::to_string(nbytes) + " bytes");
  };
  const size_t spare = nbytes >= kHugePagesFrom ? kHugePageBytes : 0;
  // An address first, and the memory there: the kernel aligns neither by itself (before 6.7).
  void* const reserved =
      mmap(nullptr, nbytes + spare, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return refused();
  auto* const first = static_cast<uint8_t*>(reserved);
  const size_t before =
      spare == 0 ? 0
                 : round_up(reinterpret_cast<uintptr_t>(first), spare) - reinterpret_cast<uintptr_t>(first);
  if (before > 0) (void)munmap(first, before);
  if (spare > before) (void)munmap(first + before + nbytes, spare - before);
  const int kind = file == kNoFile ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  if (mmap(first + before, nbytes, PROT_READ | PROT_WRITE, kind | MAP_FIXED, file, 0) == MAP_FAILED) {
    const Status status = refused();
    (void)munmap(first + before, nbytes);
    return status;
  }
  // Advice only: a system without huge pages serves small ones.
  if (spare > 0) (void)madvise(first + before, nbytes, MADV_HUGEPAGE);
  *pages = first + before;
  return {};
}

Status populate_pages(std::span<uint8_t> pages, unsigned threads) {
  std::atomic<int> error{0};
  for_each_piece(pages, threads, [&](std::span<uint8_t> piece) {
    if (error != 0) return;
    if (const int failed = populate_piece(piece); failed != 0) error = failed;
  });
  if (error == 0) return {};
  return Status::system(error, "populating " + std::to_string(pages.size()) + " bytes");
}

void touch_pages(std::span<uint8_t> pages, unsigned threads) {
  for_each_piece(pages, threads, [](std::span<uint8_t> piece) {
    for (size_t at = 0; at < piece.size(); at += kPageBytes) {
      std::atomic_ref<uint8_t>(piece[at]).fetch_or(0, std::memory_order_relaxed);  // somebody may write there
    }
  });
}

}  // namespace dtruntime
