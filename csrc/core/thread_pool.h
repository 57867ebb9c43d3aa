// Worker threads for the process, made at their first use and never torn down: one pool whose threads run as
// their makers do, and one whose threads give way to them.
//
// A forked child makes its own at its first use: threads do not survive fork, and the DataLoader forks.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <mutex>

#include "forks.h"

namespace dtruntime {

enum class Priority { kNormal, kLow };

class ThreadPool {
 public:
  // What several workers may be in at once. Its owner keeps it in place from offer() until withdraw() has
  // returned, and reads and writes none of it meanwhile.
  struct Work {
    std::function<void()> run;  // called by each worker that joins; throws nothing
    unsigned wanted;            // workers that may still join
    unsigned active = 0;        // workers inside
    std::condition_variable idle{};
  };

  // The process's pool of that priority. Not to be kept over a fork.
  static ThreadPool& of(Priority priority);

  // Lets up to `work.wanted` workers join, and starts threads if there are too few. Work offered first is
  // joined first. Where no thread can be started, fewer join, or none.
  void offer(Work& work);

  // Lets no further worker join, and returns when none is inside: what they wrote is visible then. May be
  // called again, and from several threads.
  void withdraw(Work& work);

  // Threads that there are. Never fewer later; 0 only where none could be started, or nothing was offered.
  unsigned workers();

 private:
  explicit ThreadPool(Priority priority) : priority_(priority) {}

  void grow(unsigned wanted);
  void serve();
  Work* open_work() const;

  const Priority priority_;
  const uint64_t forks_ = forks();  // of the process that the threads are in
  std::mutex mutex_;
  std::condition_variable wake_;
  std::list<Work*> offered_;
  unsigned workers_ = 0;
};

// How many threads a call works with at most, whatever number it is given.
inline constexpr unsigned kMostThreads = 256;

// How many threads compute at once by default: the CPUs that this process may run on, at most 16.
unsigned default_threads();

// Calls task(0) ... task(count - 1), each once, in any order, on at most `threads` threads of which the
// calling one is one (0: default_threads()), and returns when all have returned. What the tasks wrote is
// visible to the caller then.
//
// Callable from any thread, also from several at once and from within a task. Where no thread can be started,
// fewer do the work. REQUIRES: task throws nothing; it must not wait for another task.
void parallel_for(size_t count, unsigned threads, const std::function<void(size_t)>& task);

}  // namespace dtruntime
