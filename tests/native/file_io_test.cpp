// Parallel requests, faults that several threads meet, and extents that are gathered: for ASan and TSan to
// see.
#include "../../csrc/core/file_io.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/core/system_calls.h"

namespace {

using namespace dtruntime;

// A folder of its own; no fault outlives it.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "file_io_XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~Folder() {
    (void)clear_faults();
    std::filesystem::remove_all(path_);
  }
  std::string file(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

// Bytes that differ from page to page, and within a page.
std::vector<uint8_t> make_bytes(size_t nbytes) {
  std::vector<uint8_t> bytes(nbytes);
  for (size_t i = 0; i < nbytes; ++i) bytes[i] = static_cast<uint8_t>(i * 31 + i / 4096 * 7);
  return bytes;
}

// `bytes` as pieces of `piece` bytes in the reverse order of the file, all unaligned in memory.
std::vector<Extent> reversed(std::vector<uint8_t>& bytes, size_t piece) {
  std::vector<Extent> extents;
  for (size_t at = 0; at < bytes.size(); at += piece) {
    const size_t length = std::min(piece, bytes.size() - at);
    extents.insert(extents.begin(), {bytes.data() + at, at, length});
  }
  return extents;
}

constexpr size_t kBytes = 3 * kRequestBytes + kDirectFrom + 777;

Status write(const std::string& path, std::vector<Extent> extents) {
  WriteOptions options;
  options.queue_depth = 4;
  return write_extents(path.c_str(), extents, options);
}

Status read(const std::string& path, std::vector<Extent> extents) {
  return read_extents(path.c_str(), extents, {.queue_depth = 4});
}

}  // namespace

TEST_CASE("files are written and read by several threads at once, through every kind of short transfer") {
  const Folder folder;
  for (uint64_t nth = 1; nth < 60; nth += 3) {
    REQUIRE(inject_fault(Call::kPwrite, nth, Action::kShorten, 777).ok());
    REQUIRE(inject_fault(Call::kPwrite, nth + 1, Action::kFail, EINTR).ok());
    REQUIRE(inject_fault(Call::kPread, nth, Action::kShorten, 8192).ok());
    REQUIRE(inject_fault(Call::kPread, nth + 1, Action::kFail, EINTR).ok());
  }
  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] {
      std::vector<uint8_t> bytes = make_bytes(kBytes), back(kBytes);
      const std::string path = folder.file(std::to_string(i));
      const size_t piece = i == 0 ? kBytes : 100'000;
      right +=
          write(path, reversed(bytes, piece)).ok() && read(path, reversed(back, piece)).ok() && back == bytes;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right == 3);
}

TEST_CASE("one failing request ends all of them and is reported with its offset") {
  const Folder folder;
  std::vector<uint8_t> bytes = make_bytes(kBytes);
  REQUIRE(write(folder.file("sound"), reversed(bytes, kBytes)).ok());
  for (const Call call : {Call::kPwrite, Call::kPread}) {
    for (const uint64_t nth : {1, 2, 3, 4}) {
      (void)clear_faults();
      REQUIRE(inject_fault(call, nth, Action::kFail, ENOSPC).ok());
      const bool writes = call == Call::kPwrite;
      const Status status = writes ? write(folder.file("full" + std::to_string(nth)), reversed(bytes, kBytes))
                                   : read(folder.file("sound"), reversed(bytes, kBytes));
      CHECK(status.code == Code::kSystem);
      CHECK(status.error == ENOSPC);
      CHECK(status.what.find(" at offset ") != std::string::npos);
    }
  }
}

TEST_CASE("of calls that several threads make exactly the n-th meets the fault") {
  const Folder folder;
  const std::string path = folder.file("file");
  const int fd = system_calls::open(path.c_str(), O_RDWR | O_CREAT, 0600);
  REQUIRE(fd != -1);
  REQUIRE(inject_fault(Call::kPwrite, 250, Action::kFail, EIO).ok());
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < 100; ++n) failed += system_calls::pwrite(fd, "x", 1, n) == -1 && errno == EIO;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(failed == 1);
  CHECK(clear_faults()[static_cast<size_t>(Call::kPwrite)] == 400);
  CHECK(system_calls::close(fd) == 0);
}

TEST_CASE("a close that fails has closed") {
  const Folder folder;
  const int fd = system_calls::open(folder.file("file").c_str(), O_RDWR | O_CREAT, 0600);
  REQUIRE(inject_fault(Call::kClose, 1, Action::kFail, EIO).ok());
  CHECK(system_calls::close(fd) == -1);
  CHECK(errno == EIO);
  (void)clear_faults();
  CHECK(system_calls::fcntl(fd, F_GETFD, 0) == -1);
  CHECK(errno == EBADF);
}
