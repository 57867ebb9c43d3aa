// Copying memory into an arena and digesting what arrives, in the background; what is there already is not
// copied again.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "chunks.h"
#include "digest.h"
#include "forks.h"
#include "thread_pool.h"

namespace dtruntime {

// Starts as it is made. Threads of low priority take the chunks in the order of the copies; who waits for
// some of them does the work that is left there itself, with as many threads of normal priority, or asks only
// to be told.
//
// Until it is done() or cancel() has returned, nobody may write the sources or touch the targets; a source
// may be written again once wait() has returned kDone for its copy. Methods may be called from any thread and
// from several at once; destruction cancels, and is for when no other method runs.
//
// In a forked child a job that was not done never will be: its threads are the parent's. Nothing there waits.
class CopyJob {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Outcome { kDone, kTimeout, kCancelled, kForked };

  // Copies into `arena`, which must outlive it. `threads` work in the background (0: default_threads();
  // at most kMostThreads); where none can be started, only wait() makes progress. `known` holds the digests
  // of what the targets hold now, 16 bytes a chunk in the order of a ChunkList: a chunk whose source has its
  // digest is not written. Empty: nothing is known, and all is copied.
  // `hold`: the threads begin at release(), so that they take no CPU from what the caller does until then.
  // REQUIRES: check_copies holds; no source overlaps a target; known is true.
  CopyJob(std::span<uint8_t> arena, std::vector<Copy> copies, size_t chunk_bytes, unsigned threads,
          std::vector<uint8_t> known = {}, bool hold = false);
  ~CopyJob();
  CopyJob(const CopyJob&) = delete;
  CopyJob& operator=(const CopyJob&) = delete;

  // Helps until the copies with these numbers are done. The deadline is looked at between two chunks; one in
  // the past only asks. Without `help` it sleeps until the background has done them, unless that has no
  // thread at all: somebody has to do them. REQUIRES: each number < size().
  Outcome wait(std::span<const size_t> numbers, Clock::time_point deadline, bool help = true);

  // Lets the threads begin, if they were held.
  void release();

  // Starts no further chunk and returns when no thread is in one. What is done stays done.
  void cancel();

  size_t size() const { return copies_.size(); }
  // Looks at every copy.
  bool done() const;
  bool cancelled() const { return cancelled_; }
  size_t nbytes() const { return chunks_.nbytes(); }
  // Bytes that are in the arena, copied or found there.
  size_t nbytes_done() const { return nbytes_done_.load(std::memory_order_relaxed); }
  // Bytes that were written, and the chunks that were not.
  size_t nbytes_copied() const { return nbytes_copied_.load(std::memory_order_relaxed); }
  size_t chunks_skipped() const { return chunks_skipped_.load(std::memory_order_relaxed); }

  // Of what is in the arena, all of it: 16 bytes a chunk, in the order of a ChunkList. REQUIRES: done().
  std::span<const uint8_t> digests() const { return digests_; }

 private:
  // The chunks of one copy. Each is claimed by one thread.
  struct Progress {
    std::atomic<size_t> next{0};
    std::atomic<size_t> left{0};
  };

  // What cannot be destroyed in a forked child, where a thread may seem to be in it.
  struct Shared {
    ThreadPool::Work work;
    std::mutex mutex{};
    std::condition_variable changed{};  // a copy is done, the last helper has left, or it is cancelled
    unsigned helpers = 0;               // callers of wait() that may be in a chunk
    bool offered = false;               // the threads may have begun
  };

  // A caller of wait() as long as it may be in a chunk, however it comes out.
  class Helping {
   public:
    explicit Helping(Shared& shared);
    ~Helping();
    Helping(const Helping&) = delete;
    Helping& operator=(const Helping&) = delete;

   private:
    Shared& shared_;
  };

  bool forked() const { return forks_ != forks(); }
  bool has_threads();
  bool finished(size_t copy) const { return progress_[copy].left.load(std::memory_order_acquire) == 0; }
  size_t chunks_of(size_t copy) const { return chunks_.first_of(copy + 1) - chunks_.first_of(copy); }
  void do_all();
  void do_chunks(size_t copy, Clock::time_point deadline);
  void do_chunk(size_t copy, size_t index);
  // Stores the digest of a chunk if that is the known one.
  bool is_there(const uint8_t* source, size_t length, size_t chunk);

  const uint64_t forks_ = forks();
  const std::span<uint8_t> arena_;
  const std::vector<Copy> copies_;
  const std::vector<Range> targets_;
  const ChunkList chunks_;
  const size_t chunk_bytes_;
  const Stores stores_;
  unsigned helping_ = 0;  // threads, the calling one included, that wait() works with
  const std::vector<uint8_t> known_;
  std::vector<uint8_t> digests_;
  std::vector<Progress> progress_;
  std::atomic<size_t> nbytes_done_{0};
  std::atomic<size_t> nbytes_copied_{0};
  std::atomic<size_t> chunks_skipped_{0};
  std::atomic<bool> cancelled_{false};
  std::unique_ptr<Shared> shared_;
};

}  // namespace dtruntime
