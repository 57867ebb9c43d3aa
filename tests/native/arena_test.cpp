#include "../../csrc/core/arena.h"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

namespace dtruntime {
namespace {

constexpr size_t kMiB = 1 << 20;

// A device that writes down what it is asked for, and whether the pages are mapped at that time.
struct Event {
  bool pins;
  void* address;
  size_t nbytes;
  bool mapped;
  bool operator==(const Event&) const = default;
};
std::vector<Event> events;
bool refuses_to_pin, refuses_to_unpin;
size_t resident_when_pinned;  // pages

bool is_mapped(void* address) {
  unsigned char resident;
  return mincore(address, kPageBytes, &resident) == 0;
}

size_t resident_pages(void* address, size_t nbytes) {
  std::vector<unsigned char> pages((nbytes + kPageBytes - 1) / kPageBytes);
  REQUIRE(mincore(address, nbytes, pages.data()) == 0);
  return std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; });
}

constexpr PinTable kRecorder{
    [](void* address, size_t nbytes) {
      if (refuses_to_pin) return Status::device("no pins left");
      events.push_back({true, address, nbytes, is_mapped(address)});
      resident_when_pinned = resident_pages(address, nbytes);
      return Status{};
    },
    [](void* address) {
      if (refuses_to_unpin) return Status::device("it is stuck");
      events.push_back({false, address, 0, is_mapped(address)});
      return Status{};
    },
};

struct Recorded {
  Recorded() {
    events.clear();
    refuses_to_pin = refuses_to_unpin = false;
    resident_when_pinned = 0;
  }
};

std::string fresh_name(const char* what) { return "dtruntime-test-" + std::to_string(getpid()) + "-" + what; }

TEST_CASE_FIXTURE(Recorded, "arena: it is pinned while it is mapped, and unpinned before it is not") {
  void* address = nullptr;
  {
    Arena arena({&kRecorder});
    REQUIRE(arena.resize(3 * kPageBytes + 1).ok());
    CHECK(arena.pinned());
    address = arena.address();
  }
  CHECK(events == std::vector<Event>{{true, address, 4 * kPageBytes, true}, {false, address, 0, true}});
}

TEST_CASE_FIXTURE(Recorded, "arena: resize pins the new pages and unpins the old, in time") {
  const std::string name = fresh_name("pinned");
  for (const bool named : {false, true}) {
    events.clear();
    Arena arena({&kRecorder});
    REQUIRE((named ? arena.create(name, kPageBytes) : arena.resize(kPageBytes)).ok());
    void* const before = arena.address();
    REQUIRE(arena.resize(4 * kPageBytes).ok());
    void* const after = arena.address();
    CHECK(events == std::vector<Event>{{true, before, kPageBytes, true},
                                       {false, before, 0, true},
                                       {true, after, 4 * kPageBytes, true}});
    if (named) CHECK(arena.unlink().ok());
  }
}

TEST_CASE_FIXTURE(Recorded,
                  "arena: every page is there before it is pinned, where one thread would touch all") {
  for (const size_t nbytes : {kPageBytes + 1, 35 * kMiB + 5}) {
    Arena arena({&kRecorder});
    REQUIRE(arena.resize(nbytes).ok());
    CHECK(resident_when_pinned == (nbytes + kPageBytes - 1) / kPageBytes);
  }
  const std::string name = fresh_name("there");
  Arena named({&kRecorder});
  REQUIRE(named.create(name, 5 * kMiB).ok());
  CHECK(resident_when_pinned == 5 * kMiB / kPageBytes);
  CHECK(named.unlink().ok());
}

TEST_CASE_FIXTURE(Recorded, "arena: pages that are kept stay pinned") {
  Arena arena({&kRecorder});
  REQUIRE(arena.resize(10 * kPageBytes).ok());
  REQUIRE(arena.resize(6 * kPageBytes).ok());
  CHECK(events.size() == 1);
  CHECK(arena.pinned());
}

TEST_CASE_FIXTURE(Recorded, "arena: it is usable when the device refuses to pin it, and says so") {
  refuses_to_pin = true;
  const std::string name = fresh_name("refused");
  for (const bool named : {false, true}) {
    Arena arena({&kRecorder});
    REQUIRE((named ? arena.create(name, kPageBytes) : arena.resize(kPageBytes)).ok());
    CHECK(!arena.pinned());
    CHECK(arena.refusal() == "no pins left");
    CHECK(arena.nbytes() == kPageBytes);
    arena.address()[kPageBytes - 1] = 1;
    if (named) CHECK(arena.unlink().ok());
  }
}

TEST_CASE_FIXTURE(Recorded, "arena: a refusal is forgotten when the device pins the next pages") {
  refuses_to_pin = true;
  Arena arena({&kRecorder});
  REQUIRE(arena.resize(kPageBytes).ok());
  refuses_to_pin = false;
  REQUIRE(arena.resize(100 * kPageBytes).ok());
  CHECK(arena.pinned());
  CHECK(arena.refusal().empty());
}

TEST_CASE_FIXTURE(Recorded, "arena: it stays as it is when the device refuses to unpin it") {
  Arena arena({&kRecorder});
  REQUIRE(arena.resize(kPageBytes).ok());
  uint8_t* const before = arena.address();
  refuses_to_unpin = true;
  CHECK(arena.resize(100 * kPageBytes).code == Code::kDevice);
  CHECK(arena.address() == before);
  CHECK(arena.nbytes() == kPageBytes);
  CHECK(is_mapped(before));
  refuses_to_unpin = false;
}

#if !defined(__SANITIZE_THREAD__)  // which cannot follow a fork of many threads
TEST_CASE_FIXTURE(Recorded, "arena: a forked child neither unpins nor unmaps what only its parent has") {
  auto arena = std::make_unique<Arena>(ArenaOptions{&kRecorder});
  REQUIRE(arena->resize(kPageBytes).ok());
  void* const address = arena->address();
  const pid_t child = fork();
  if (child == 0) {
    // The child's own memory at that place: it must outlive the arena.
    void* const own =
        mmap(address, kPageBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    arena.reset();
    _exit(own == address && is_mapped(own) && events.size() == 1 ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

TEST_CASE("arena: a forked child may use one again after it has resized it") {
  Arena arena({nullptr, true});
  REQUIRE(arena.resize(kPageBytes).ok());
  const pid_t child = fork();
  if (child == 0) {
    if (!arena.resize(kPageBytes).ok()) _exit(1);
    arena.address()[0] = 1;
    _exit(0);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}
#endif

TEST_CASE("arena: large memory starts at a huge page") {
  for (size_t nbytes : {4 * kMiB, 4 * kMiB + 1, 33 * kMiB}) {
    Arena arena;
    REQUIRE(arena.resize(nbytes).ok());
    CHECK(reinterpret_cast<uintptr_t>(arena.address()) % (2 * kMiB) == 0);
    arena.address()[nbytes - 1] = 1;
    CHECK(arena.address()[0] == 0);
  }
}

TEST_CASE("arena: populating gets every page and changes none") {
  for (unsigned threads : {1u, 3u}) {
    Arena arena;
    REQUIRE(arena.resize(35 * kMiB + 5).ok());
    std::fill_n(arena.address() + kMiB, 100, uint8_t{7});
    REQUIRE(arena.populate(threads).ok());
    CHECK(resident_pages(arena.address(), arena.nbytes()) == 35 * kMiB / kPageBytes + 1);
    CHECK(std::count(arena.bytes().begin(), arena.bytes().end(), 7) == 100);
    CHECK(std::count(arena.bytes().begin(), arena.bytes().end(), 0) == ptrdiff_t(arena.nbytes()) - 100);
  }
}

TEST_CASE("arena: populating by hand, as old kernels need it, does the same") {
  Arena arena;
  REQUIRE(arena.resize(35 * kMiB).ok());
  std::fill_n(arena.address() + kMiB, 100, uint8_t{7});
  touch_pages(arena.bytes(), 3);
  CHECK(resident_pages(arena.address(), arena.nbytes()) == 35 * kMiB / kPageBytes);
  CHECK(std::count(arena.bytes().begin(), arena.bytes().end(), 7) == 100);
}

TEST_CASE("arena: what cannot be populated is reported") {
  Arena arena;
  REQUIRE(arena.resize(3 * kPageBytes).ok());
  REQUIRE(munmap(arena.address() + kPageBytes, kPageBytes) == 0);
  CHECK(arena.populate(1).error == ENOMEM);
}

TEST_CASE("arena: an empty one can be populated") {
  const std::string name = fresh_name("empty");
  Arena arena, named;
  REQUIRE(arena.resize(0).ok());
  CHECK(arena.populate(2).ok());
  REQUIRE(named.create(name, 0).ok());
  CHECK(named.populate(2).ok());
  CHECK(named.unlink().ok());
}

}  // namespace
}  // namespace dtruntime
