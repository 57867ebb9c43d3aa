#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "bytes.h"

namespace dtruntime {

Arena::~Arena() {
  // Of an accelerator that cannot unpin any more nothing is left to protect.
  if (!unmap().ok()) (void)munmap(pages_, capacity_);
}

Status Arena::create(const std::string& name, size_t nbytes) {
  if (Status status = shared_.create(name); !status.ok()) return status;
  Status status = resize(nbytes);
  if (!status.ok()) (void)shared_.unlink();
  return status;
}

Status Arena::attach(const std::string& name) {
  size_t nbytes = 0;
  if (Status status = shared_.attach(name, &nbytes); !status.ok()) return status;
  // Who made it may have died before all of it was there.
  if (Status status = shared_.check_room(nbytes); !status.ok()) return status;
  if (Status status = shared_.reserve(nbytes); !status.ok()) return status;
  nbytes_ = nbytes;
  return resize(nbytes);
}

Status Arena::resize(size_t nbytes, size_t lead) {
  if (nbytes > SIZE_MAX / 4) return Status::system(ENOMEM, "mapping " + std::to_string(nbytes) + " bytes");
  const size_t needed = round_up(std::max<size_t>(lead + nbytes, 1), kPageBytes);
  if (fits(nbytes, needed)) {
    lead_ = lead;
    nbytes_ = nbytes;
    return {};
  }
  uint8_t* pages = nullptr;
  if (Status status = map(nbytes, needed, &pages); !status.ok()) return status;
  if (Status status = unmap(); !status.ok()) {
    (void)munmap(pages, needed);
    if (shared_.is_open()) (void)shared_.truncate(nbytes_);
    return status;
  }
  // Only what nobody maps any more is given back; to fail at it is to keep it.
  if (shared_.is_open() && nbytes < nbytes_) (void)shared_.truncate(nbytes);
  pages_ = pages;
  capacity_ = needed;
  lead_ = lead;
  nbytes_ = nbytes;
  forks_ = forks();
  pin();
  return {};
}

bool Arena::fits(size_t nbytes, size_t needed) const {
  if (pages_ == nullptr || left_behind()) return false;
  if (shared_.is_open()) return nbytes == nbytes_;
  return needed <= capacity_ && needed > capacity_ / 2;
}

// Maps new pages beside the old ones, in a shared file that is long enough for both.
Status Arena::map(size_t nbytes, size_t needed, uint8_t** pages) {
  const bool grows = shared_.is_open() && nbytes > nbytes_;
  if (grows) {
    if (Status status = shared_.check_room(nbytes); !status.ok()) return status;
    if (Status status = shared_.truncate(nbytes); !status.ok()) return status;
  }
  uint8_t* mapped = nullptr;
  Status status = map_pages(needed, shared_.file(), &mapped);
  if (status.ok() && grows) status = grow_shared({mapped, needed}, nbytes);
  if (status.ok() && dont_fork() && madvise(mapped, needed, MADV_DONTFORK) != 0) {
    status = Status::system(errno, "keeping memory from forked children");
  }
  if (status.ok()) {
    *pages = mapped;
    return status;
  }
  if (mapped != nullptr) (void)munmap(mapped, needed);
  if (grows) (void)shared_.truncate(nbytes_);
  return status;
}

// Where the system gives it huge pages, through the mapping first: the file alone would be given small ones.
// Where it does not, through the file, which takes half as long. What neither could get, the file says why.
Status Arena::grow_shared(std::span<uint8_t> pages, size_t nbytes) {
  const size_t before = shared_.allocated();
  (void)populate_pages(pages.first(kPageBytes), 1);
  const bool huge = shared_.allocated() - before > kPageBytes;
  if (huge) (void)populate_pages(pages, 0);
  Status status = shared_.reserve(nbytes);
  if (!huge && status.ok()) (void)populate_pages(pages, 0);
  return status;
}

Status Arena::unmap() {
  if (pages_ == nullptr) return {};
  // In a forked child something else may lie where they were.
  if (!left_behind()) {
    if (pinned_) {
      if (Status status = options_.pin->unpin(pages_); !status.ok()) return status;
    }
    (void)munmap(pages_, capacity_);
  }
  pages_ = nullptr;
  pinned_ = false;
  return {};
}

// To pin a page is to touch it, and the device's runtime touches them one by one. What populating could not
// get is left to it to report.
void Arena::pin() {
  if (options_.pin == nullptr) return;
  (void)populate(0);
  Status status = options_.pin->pin(pages_, capacity_);
  pinned_ = status.ok();
  refusal_ = std::move(status.what);
}

Status Arena::populate(unsigned threads) {
  const std::span<uint8_t> used(pages_, round_up(lead_ + nbytes_, kPageBytes));
  Status status = populate_pages(used, threads);
  if (status.error == EINVAL) {  // an old kernel
    touch_pages(used, threads);
    return {};
  }
  return status;
}

Status Arena::unlink() {
  if (!shared_.is_open()) return Status::invalid("the arena has no name");
  return shared_.unlink();
}

}  // namespace dtruntime
