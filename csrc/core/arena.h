// Page-aligned host memory that is reused save after save.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "forks.h"
#include "pages.h"
#include "shared_memory.h"
#include "status.h"

namespace dtruntime {

// How an accelerator pins pages (keeps them in place and maps them for itself); the core knows none by name.
struct PinTable {
  Status (*pin)(void* address, size_t nbytes);
  Status (*unpin)(void* address);
};

struct ArenaOptions {
  const PinTable* pin = nullptr;  // pins the memory by it if it can; null: not pinned. Outlives the arena
  // The memory is not there in a forked child: after a fork a write in the parent costs no copy of its page,
  // and the child keeps no old page alive, but ends if it touches one. Pinned memory is always so: a copied
  // page would leave its place.
  bool dont_fork = false;
};

// Owns its pages; they are unpinned and go back to the system when it is destroyed or replaces them in
// resize(). Not copied, not moved: its address may be in use by the kernel and by a device. Const methods may
// be called from any thread; the others only while nobody uses the memory.
class Arena {
 public:
  Arena() = default;
  explicit Arena(ArenaOptions options) : options_(options) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Makes the memory under a new name, all of it at once, so that a process that comes later finds it with
  // attach() whatever became of this one; unlink() removes the name, nothing else does. REQUIRES: it is
  // fresh. As SharedMemory::create() and resize(), with no name left behind then.
  Status create(const std::string& name, size_t nbytes);

  // Takes the memory of that name as it is. REQUIRES: it is fresh. As SharedMemory::attach() and resize().
  Status attach(const std::string& name);

  // Makes it hold `nbytes` bytes whose contents are undefined. Pages are kept if they suffice and more than
  // half of them is used, else new ones are mapped; fresh pages are zero. Under a name, pages are mapped
  // whenever the size changes. The first byte lies `lead` bytes into a page, so that a file read from an
  // offset that is not aligned can still be read without a copy.
  // New pages that are to be pinned are populated first. If the device refuses to pin them, pinned() and
  // refusal() say so, and they are as useful as any other.
  // REQUIRES: lead < kPageBytes, and 0 under a name. kSystem if the system refuses (ENOMEM, and ENOSPC under
  // a name), or kDevice if the old pages cannot be unpinned; the arena is unchanged then.
  Status resize(size_t nbytes, size_t lead = 0);

  // As populate_pages(). Another thread may use the memory meanwhile.
  Status populate(unsigned threads);

  // As SharedMemory::unlink(); kInvalid if it has no name.
  Status unlink();

  uint8_t* address() const { return pages_ + lead_; }
  size_t nbytes() const { return nbytes_; }
  std::span<uint8_t> bytes() const { return {address(), nbytes_}; }
  bool pinned() const { return pinned_; }
  // Why the device did not pin it, in its own words; empty: it did, or was not asked.
  const std::string& refusal() const { return refusal_; }
  const std::string& name() const { return shared_.name(); }  // empty: none

 private:
  bool dont_fork() const { return options_.dont_fork || options_.pin != nullptr; }
  bool left_behind() const { return dont_fork() && forks_ != forks(); }
  bool fits(size_t nbytes, size_t needed) const;
  Status map(size_t nbytes, size_t needed, uint8_t** pages);
  Status grow_shared(std::span<uint8_t> pages, size_t nbytes);
  Status unmap();
  void pin();

  ArenaOptions options_;
  SharedMemory shared_;
  uint8_t* pages_ = nullptr;
  size_t capacity_ = 0;  // bytes mapped
  size_t lead_ = 0;
  size_t nbytes_ = 0;
  bool pinned_ = false;
  std::string refusal_;
  uint64_t forks_ = 0;  // of the process that mapped the pages
};

}  // namespace dtruntime
