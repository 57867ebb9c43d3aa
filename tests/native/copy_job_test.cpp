#include "../../csrc/core/copy_job.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <thread>
#include <utility>

namespace dtruntime {
namespace {

using Outcome = CopyJob::Outcome;

constexpr size_t kChunkBytes = 1000;
constexpr auto kForever = CopyJob::Clock::time_point::max();

// `count` sources of different lengths, side by side in an arena with a byte between them.
struct Case {
  std::vector<std::vector<uint8_t>> sources;
  std::vector<Copy> copies;
  std::vector<Range> ranges;  // their targets
  std::vector<uint8_t> arena;
  std::vector<size_t> numbers;
  std::vector<uint8_t> expected;  // digests

  explicit Case(size_t count, size_t longest = 9000) {
    size_t offset = 0;
    for (size_t i = 0; i < count; ++i) {
      auto& source = sources.emplace_back(i * 997 % longest);
      for (size_t k = 0; k < source.size(); ++k) source[k] = static_cast<uint8_t>(i + k * 7);
      copies.push_back({source.data(), {offset, source.size()}});
      offset += source.size() + 1;
      numbers.push_back(i);
    }
    arena.resize(offset, 0xaa);
    ranges = targets_of(copies);
    std::vector<uint8_t> target(offset);
    expected.resize(16 * ChunkList(ranges, kChunkBytes).size());
    REQUIRE(copy_digest(target, copies, kChunkBytes, 1, expected.data()).ok());
  }

  bool arrived(size_t i) const {
    return std::equal(sources[i].begin(), sources[i].end(), arena.begin() + copies[i].target.offset);
  }
};

bool has_digests(const CopyJob& job, const Case& c) { return std::ranges::equal(job.digests(), c.expected); }

TEST_CASE("copy job: it copies and digests, whoever does it") {
  for (unsigned threads : {0, 1, 2, 5}) {
    Case c(60);
    CopyJob job(c.arena, c.copies, kChunkBytes, threads);
    REQUIRE(job.wait(c.numbers, kForever) == Outcome::kDone);
    CHECK(job.done());
    CHECK(job.nbytes_done() == job.nbytes());
    CHECK(has_digests(job, c));
    for (size_t i = 0; i < c.sources.size(); ++i) CHECK(c.arrived(i));
  }
}

TEST_CASE("copy job: the bytes between the targets stay as they are") {
  Case c(60);
  CopyJob job(c.arena, c.copies, kChunkBytes, 2);
  REQUIRE(job.wait(c.numbers, kForever) == Outcome::kDone);
  for (const Copy& copy : c.copies) CHECK(c.arena[copy.target.offset + copy.target.length] == 0xaa);
}

TEST_CASE("copy job: a source may be written as soon as its copy was waited for") {
  for (int round = 0; round < 20; ++round) {
    Case c(60);
    CopyJob job(c.arena, c.copies, kChunkBytes, 2);
    for (size_t i = c.copies.size(); i-- > 0;) {  // against the order of the background
      REQUIRE(job.wait({&c.numbers[i], 1}, kForever) == Outcome::kDone);
      REQUIRE(c.arrived(i));
      std::fill(c.sources[i].begin(), c.sources[i].end(), uint8_t{0});
    }
    REQUIRE(job.done());
    CHECK(has_digests(job, c));
  }
}

TEST_CASE("copy job: several may wait at once, each for its own") {
  Case c(200);
  CopyJob job(c.arena, c.copies, kChunkBytes, 1);
  std::array<std::thread, 4> waiters;
  for (size_t w = 0; w < waiters.size(); ++w) {
    waiters[w] = std::thread([&, w] {
      for (size_t i = w; i < c.copies.size(); i += waiters.size()) {
        CHECK(job.wait({&c.numbers[i], 1}, kForever) == Outcome::kDone);
        CHECK(c.arrived(i));
      }
    });
  }
  for (std::thread& waiter : waiters) waiter.join();
  CHECK(has_digests(job, c));
}

TEST_CASE("copy job: several jobs run at once") {
  std::vector<std::unique_ptr<Case>> cases;
  std::vector<std::unique_ptr<CopyJob>> jobs;
  for (int i = 0; i < 8; ++i) {
    Case& c = *cases.emplace_back(std::make_unique<Case>(40 + i));
    jobs.push_back(std::make_unique<CopyJob>(c.arena, c.copies, kChunkBytes, 3));
  }
  for (size_t i = jobs.size(); i-- > 0;) {
    REQUIRE(jobs[i]->wait(cases[i]->numbers, kForever) == Outcome::kDone);
    CHECK(has_digests(*jobs[i], *cases[i]));
  }
}

// All threads of low priority that there are, and one at least, in a work that ends when it is told to.
struct BusyBackground {
  ThreadPool& pool = ThreadPool::of(Priority::kLow);
  std::atomic<bool> over{false};
  ThreadPool::Work work{[this] { over.wait(false); }, std::max(1u, pool.workers())};

  BusyBackground() { pool.offer(work); }
  ~BusyBackground() { release(); }
  void release() {
    over = true;
    over.notify_all();
    pool.withdraw(work);
  }
};

TEST_CASE("copy job: who does not help does nothing of it, and is told when the background has done it") {
  Case c(60);
  BusyBackground busy;
  CopyJob job(c.arena, c.copies, kChunkBytes, 1);
  const auto soon = CopyJob::Clock::now() + std::chrono::milliseconds(20);
  CHECK(job.wait(c.numbers, soon, false) == Outcome::kTimeout);
  CHECK(job.nbytes_done() == 0);
  busy.release();
  CHECK(job.wait(c.numbers, kForever, false) == Outcome::kDone);
  CHECK(has_digests(job, c));
}

TEST_CASE("copy job: who helps does it while the background is busy") {
  Case c(60);
  const BusyBackground busy;
  CopyJob job(c.arena, c.copies, kChunkBytes, 1);
  CHECK(job.wait(c.numbers, kForever) == Outcome::kDone);
  CHECK(has_digests(job, c));
}

TEST_CASE("copy job: who does not help is told when it is cancelled") {
  Case c(60);
  BusyBackground busy;
  CopyJob job(c.arena, c.copies, kChunkBytes, 1);
  std::thread waiter([&] { CHECK(job.wait(c.numbers, kForever, false) == Outcome::kCancelled); });
  job.cancel();
  waiter.join();
}

TEST_CASE("copy job: the background finishes it without anyone who waits") {
  Case c(60);
  CopyJob job(c.arena, c.copies, kChunkBytes, 2);
  while (!job.done()) std::this_thread::yield();
  CHECK(has_digests(job, c));
}

TEST_CASE("copy job: nothing is touched once cancel has returned") {
  Case c(300);
  for (int round = 0; round < 20; ++round) {
    CopyJob job(c.arena, c.copies, kChunkBytes, 2);
    std::thread waiter([&] {
      const Outcome outcome = job.wait(c.numbers, kForever);
      CHECK((outcome == Outcome::kDone || outcome == Outcome::kCancelled));
    });
    while (round % 2 == 1 && job.nbytes_done() == 0) std::this_thread::yield();
    job.cancel();
    // Plain writes: ThreadSanitizer sees whoever is still there.
    for (auto& source : c.sources) std::fill(source.begin(), source.end(), uint8_t{1});
    std::fill(c.arena.begin(), c.arena.end(), uint8_t{2});
    waiter.join();
    CHECK(std::all_of(c.arena.begin(), c.arena.end(), [](uint8_t byte) { return byte == 2; }));
  }
}

TEST_CASE("copy job: what was cancelled says so, what was done before stays done") {
  Case c(300);
  CopyJob job(c.arena, c.copies, kChunkBytes, 1);
  REQUIRE(job.wait({&c.numbers[1], 1}, kForever) == Outcome::kDone);
  job.cancel();
  job.cancel();
  CHECK(job.wait({&c.numbers[1], 1}, kForever) == Outcome::kDone);
  if (!job.done()) CHECK(job.wait(c.numbers, kForever) == Outcome::kCancelled);
}

TEST_CASE("copy job: destruction in the middle leaves nobody behind") {
  for (int round = 0; round < 20; ++round) {
    Case c(300);
    {
      const CopyJob job(c.arena, c.copies, kChunkBytes, 2);
    }
    std::fill(c.arena.begin(), c.arena.end(), uint8_t{2});
  }
}

TEST_CASE("copy job: a deadline in the past only asks") {
  Case c(2, 10);
  CopyJob job(c.arena, c.copies, kChunkBytes, 1);
  const Outcome outcome = job.wait(c.numbers, {});
  CHECK((outcome == Outcome::kTimeout || outcome == Outcome::kDone));
  while (!job.done()) std::this_thread::yield();
  CHECK(job.wait(c.numbers, {}) == Outcome::kDone);
}

TEST_CASE("copy job: a chunk that is there already is not written") {
  for (unsigned threads : {0, 1, 3}) {
    Case c(60);
    REQUIRE(copy_digest(c.arena, c.copies, kChunkBytes, 1, c.expected.data()).ok());
    const std::vector<uint8_t> known = c.expected;
    // Only the arena's bytes tell whether one was written: two thirds of them are spoiled, and stay so.
    const ChunkList chunks(c.ranges, kChunkBytes);
    size_t skipped = 0, copied = 0;
    for (size_t i = 0; i < chunks.size(); ++i) {
      const Chunk chunk = chunks[i];
      if (i % 3 == 0) {
        c.sources[chunk.range][chunk.start] ^= 1;
        copied += chunk.length;
      } else {
        c.arena[c.ranges[chunk.range].offset + chunk.start] ^= 0xff;
        ++skipped;
      }
    }
    CopyJob job(c.arena, c.copies, kChunkBytes, threads, known);
    REQUIRE(job.wait(c.numbers, kForever) == Outcome::kDone);
    CHECK(job.chunks_skipped() == skipped);
    CHECK(job.nbytes_copied() == copied);
    CHECK(job.nbytes_done() == job.nbytes());
    for (size_t i = 0; i < chunks.size(); ++i) {
      const Chunk chunk = chunks[i];
      const uint8_t* source = c.sources[chunk.range].data() + chunk.start;
      uint8_t* target = c.arena.data() + c.ranges[chunk.range].offset + chunk.start;
      if (i % 3 != 0) target[0] ^= 0xff;
      CHECK(std::equal(source, source + chunk.length, target));
    }
    CHECK(has_digests(job, c) == false);
    std::vector<uint8_t> copy(c.arena.size());
    REQUIRE(copy_digest(copy, c.copies, kChunkBytes, 1, c.expected.data()).ok());
    CHECK(has_digests(job, c));
  }
}

#if !defined(__SANITIZE_THREAD__)  // the race is the point
TEST_CASE("copy job: the digest is of the bytes that were stored, also if the source changes meanwhile") {
  constexpr size_t kLong = 64 << 10;
  std::vector<uint8_t> source(kLong), arena(kLong), digest(16);
  const std::vector<Copy> copies = {{source.data(), {0, kLong}}};
  const std::vector<size_t> numbers = {0};
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    std::atomic_ref<uint8_t> byte(source[kLong / 2]);
    while (!stop) byte.fetch_add(1, std::memory_order_relaxed);
  });
  for (int round = 0; round < 500; ++round) {
    CopyJob job(arena, copies, kLong, 1, std::vector<uint8_t>(16));
    REQUIRE(job.wait(numbers, kForever) == Outcome::kDone);
    digest_chunk(arena.data(), kLong, digest.data());
    CHECK(std::ranges::equal(job.digests(), digest));
  }
  stop = true;
  writer.join();
}
#endif

TEST_CASE("copy job: one that is held gets nowhere until it is released, but for who waits") {
  Case c(60);
  CopyJob job(c.arena, c.copies, kChunkBytes, 2, {}, true);
  REQUIRE(job.wait({&c.numbers[7], 1}, kForever) == Outcome::kDone);
  CHECK(job.nbytes_done() == c.sources[7].size());
  job.release();
  job.release();
  REQUIRE(job.wait(c.numbers, kForever, false) == Outcome::kDone);
  CHECK(has_digests(job, c));
}

TEST_CASE("copy job: who waits for one that is held does not wait for its threads") {
  Case c(60);
  CopyJob job(c.arena, c.copies, kChunkBytes, 2, {}, true);
  REQUIRE(job.wait(c.numbers, kForever, false) == Outcome::kDone);
  CHECK(has_digests(job, c));
}

TEST_CASE("copy job: one that was cancelled is not released") {
  Case c(60);
  CopyJob job(c.arena, c.copies, kChunkBytes, 2, {}, true);
  job.cancel();
  job.release();
  CHECK(job.nbytes_done() == 0);
}

TEST_CASE("copy job: without work it is done at once") {
  Case c(1);  // one of no bytes
  CopyJob empty({}, {}, kChunkBytes, 2), of_nothing(c.arena, c.copies, kChunkBytes, 2);
  for (CopyJob* job : {&empty, &of_nothing}) {
    CHECK(job->done());
    CHECK(job->digests().empty());
  }
  CHECK(of_nothing.wait(c.numbers, {}) == Outcome::kDone);
}

#if !defined(__SANITIZE_THREAD__)  // which cannot follow a fork of many threads
TEST_CASE("copy job: in a forked child it is lost, and nobody waits") {
  Case c(4000);
  CopyJob* job = new CopyJob(c.arena, c.copies, kChunkBytes, 2);
  const bool was_done = job->done();
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    const Outcome outcome = job->wait(c.numbers, kForever);
    job->cancel();
    delete job;
    Case own(20);
    CopyJob fresh(own.arena, own.copies, kChunkBytes, 2);
    const bool works = fresh.wait(own.numbers, kForever) == Outcome::kDone;
    _exit(works && outcome == Outcome::kForked ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(!was_done);
  CHECK(status == 0);
  CHECK(job->wait(c.numbers, kForever) == Outcome::kDone);
  CHECK(has_digests(*job, c));
  delete job;
}
#endif

}  // namespace
}  // namespace dtruntime
