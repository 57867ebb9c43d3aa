#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>

namespace dtruntime {
namespace {

constexpr unsigned kMostThreads = 256;

// Lives on the stack of its caller, who leaves only when no worker is in it.
struct Job {
  const std::function<void(size_t)>& task;
  const size_t count;
  std::atomic<size_t> next{0};
  unsigned wanted;      // workers that may still join
  unsigned active = 0;  // workers inside
  std::condition_variable idle;

  Job(const std::function<void(size_t)>& task, size_t count, unsigned wanted)
      : task(task), count(count), wanted(wanted) {}

  void work() {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  }
};

class Pool {
 public:
  void run(Job& job) {
    std::unique_lock lock(mutex_);
    grow(job.wanted);
    const auto place = jobs_.insert(jobs_.end(), &job);
    lock.unlock();
    wake_.notify_all();
    job.work();
    lock.lock();
    jobs_.erase(place);
    job.idle.wait(lock, [&] { return job.active == 0; });
  }

 private:
  void grow(unsigned wanted) {
    if (workers_ >= wanted) return;
    // Signals belong to the threads that Python knows: a worker inherits a full mask.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // The system has no more threads to give; those that there are do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void serve() {
    pthread_setname_np(pthread_self(), "dtruntime");
    std::unique_lock lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      wake_.wait(lock, [&] { return (job = open_job()) != nullptr; });
      --job->wanted;
      ++job->active;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->active == 0) job->idle.notify_one();
    }
  }

  Job* open_job() const {
    const auto job = std::find_if(jobs_.begin(), jobs_.end(), [](Job* job) { return job->wanted > 0; });
    return job == jobs_.end() ? nullptr : *job;
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::list<Job*> jobs_;
  unsigned workers_ = 0;
};

// Never deleted: workers may outlive main(). In a forked child the parent's pool is abandoned, its locks
// in whatever state they were.
std::atomic<Pool*> the_pool{nullptr};

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { the_pool = nullptr; });

Pool& pool() {
  Pool* current = the_pool;
  if (current != nullptr) return *current;
  Pool* made = new Pool;
  if (the_pool.compare_exchange_strong(current, made)) return *made;
  delete made;
  return *current;
}

}  // namespace

unsigned default_threads() { return std::clamp(std::thread::hardware_concurrency(), 1u, 16u); }

void parallel_for(size_t count, unsigned threads, const std::function<void(size_t)>& task) {
  if (threads == 0) threads = default_threads();
  const size_t useful = std::min<size_t>({count, threads, kMostThreads});
  Job job(task, count, useful > 0 ? static_cast<unsigned>(useful - 1) : 0);
  if (job.wanted == 0) return job.work();
  pool().run(job);
}

}  // namespace dtruntime
