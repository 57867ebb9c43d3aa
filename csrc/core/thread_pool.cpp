#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

namespace dtruntime {
namespace {

// What a thread of low priority adds to its nice value; docs/ARCHITECTURE.md has the measurements.
constexpr int kNicer = 10;

// On Linux a nice value belongs to a thread, and 0 is the calling one.
void lower_priority() { (void)setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + kNicer); }

}  // namespace

ThreadPool& ThreadPool::of(Priority priority) {
  // Never deleted: workers may outlive main(). A forked child abandons its parent's, locks and all.
  static std::atomic<ThreadPool*> pools[2];
  std::atomic<ThreadPool*>& place = pools[static_cast<int>(priority)];
  ThreadPool* current = place;
  if (current != nullptr && current->forks_ == forks()) return *current;
  ThreadPool* made = new ThreadPool(priority);
  if (place.compare_exchange_strong(current, made)) return *made;
  delete made;
  return *current;
}

void ThreadPool::offer(Work& work) {
  {
    std::lock_guard lock(mutex_);
    grow(work.wanted);
    offered_.push_back(&work);
  }
  wake_.notify_all();
}

void ThreadPool::withdraw(Work& work) {
  std::unique_lock lock(mutex_);
  offered_.remove(&work);
  work.idle.wait(lock, [&] { return work.active == 0; });
}

unsigned ThreadPool::workers() {
  std::lock_guard lock(mutex_);
  return workers_;
}

void ThreadPool::grow(unsigned wanted) {
  if (workers_ >= wanted) return;
  // Signals belong to the threads that Python knows: a worker inherits a full mask.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
  } catch (const std::exception&) {
    // The system has no more threads, or no memory for them; those that there are do the work.
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void ThreadPool::serve() {
  const bool low = priority_ == Priority::kLow;
  pthread_setname_np(pthread_self(), low ? "dtruntime-low" : "dtruntime");
  if (low) lower_priority();
  std::unique_lock lock(mutex_);
  for (;;) {
    Work* work = nullptr;
    wake_.wait(lock, [&] { return (work = open_work()) != nullptr; });
    --work->wanted;
    ++work->active;
    lock.unlock();
    work->run();
    lock.lock();
    if (--work->active == 0) work->idle.notify_all();
  }
}

ThreadPool::Work* ThreadPool::open_work() const {
  const auto work = std::find_if(offered_.begin(), offered_.end(), [](Work* w) { return w->wanted > 0; });
  return work == offered_.end() ? nullptr : *work;
}

unsigned default_threads() { return std::clamp(std::thread::hardware_concurrency(), 1u, 16u); }

void parallel_for(size_t count, unsigned threads, const std::function<void(size_t)>& task) {
  if (threads == 0) threads = default_threads();
  const size_t useful = std::min<size_t>({count, threads, kMostThreads});
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  };
  if (useful <= 1) return work();
  ThreadPool& pool = ThreadPool::of(Priority::kNormal);
  ThreadPool::Work shared{std::ref(work), static_cast<unsigned>(useful - 1)};
  pool.offer(shared);
  work();
  pool.withdraw(shared);
}

}  // namespace dtruntime
