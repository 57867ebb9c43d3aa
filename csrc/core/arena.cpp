#include "arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <string>

#include "bytes.h"

namespace dtruntime {
namespace {

// From here on huge pages save more page faults than they waste memory.
constexpr size_t kHugePagesFrom = 4 << 20;

}  // namespace

Arena::~Arena() {
  if (pages_ != nullptr) munmap(pages_, capacity_);
}

Status Arena::resize(size_t nbytes, size_t lead) {
  if (nbytes > SIZE_MAX / 4) return Status::system(ENOMEM, "mapping " + std::to_string(nbytes) + " bytes");
  const size_t needed = round_up(lead + nbytes + (lead + nbytes == 0), kPageBytes);
  if (needed > capacity_ || needed <= capacity_ / 2) {
    void* pages = mmap(nullptr, needed, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return Status::system(errno, "mapping " + std::to_string(nbytes) + " bytes");
    // Advice only: a system without huge pages serves small ones.
    if (needed >= kHugePagesFrom) (void)madvise(pages, needed, MADV_HUGEPAGE);
    if (pages_ != nullptr) munmap(pages_, capacity_);
    pages_ = static_cast<uint8_t*>(pages);
    capacity_ = needed;
  }
  lead_ = lead;
  nbytes_ = nbytes;
  return {};
}

}  // namespace dtruntime
