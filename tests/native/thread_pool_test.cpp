#include "../../csrc/core/thread_pool.h"

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace dtruntime {
namespace {

// How often each task ran. Plain ints: ThreadSanitizer sees it where what tasks wrote is not handed to the
// caller, or two threads run the same task.
std::vector<int> times_run(size_t count, unsigned threads) {
  std::vector<int> times(count, 0);
  parallel_for(count, threads, [&](size_t task) { ++times[task]; });
  return times;
}

std::vector<int> once(size_t count) { return std::vector<int>(count, 1); }

// Runs tasks until one ran on a worker, and shows what `look` returned there. Where no worker comes, the
// time limit of the whole run ends it.
template <typename Look>
auto seen_by_a_worker(Look look) {
  const auto caller = std::this_thread::get_id();
  std::mutex mutex;
  decltype(look()) seen{};
  for (bool found = false; !found;) {
    parallel_for(64, 4, [&](size_t) {
      if (std::this_thread::get_id() == caller) return std::this_thread::yield();
      const auto here = look();
      const std::lock_guard lock(mutex);
      seen = here;
      found = true;
    });
  }
  return seen;
}

TEST_CASE("thread pool: each task runs once") {
  for (size_t count : {0, 1, 2, 3, 7, 64, 1000}) {
    for (unsigned threads : {0, 1, 2, 7, 300}) {
      CAPTURE(count);
      CAPTURE(threads);
      for (int round = 0; round < 20; ++round) REQUIRE(times_run(count, threads) == once(count));
    }
  }
}

TEST_CASE("thread pool: there is at least one thread by default, and not more than 16") {
  CHECK(default_threads() >= 1);
  CHECK(default_threads() <= 16);
}

TEST_CASE("thread pool: one thread is the caller's") {
  std::set<std::thread::id> threads;
  parallel_for(100, 1, [&](size_t) { threads.insert(std::this_thread::get_id()); });
  CHECK(threads == std::set{std::this_thread::get_id()});
}

TEST_CASE("thread pool: no more threads than asked for are in one call") {
  times_run(100, 8);  // the pool has more workers now
  for (int round = 0; round < 50; ++round) {
    std::atomic<int> inside{0}, most{0};
    parallel_for(200, 3, [&](size_t) {
      const int now = ++inside;
      for (int before = most; before < now && !most.compare_exchange_weak(before, now);) {
      }
      std::this_thread::yield();
      --inside;
    });
    REQUIRE(most <= 3);
  }
}

TEST_CASE("thread pool: workers take part") {
  CHECK(seen_by_a_worker([] { return std::this_thread::get_id(); }) != std::this_thread::get_id());
}

TEST_CASE("thread pool: a worker leaves signals to the threads of the program") {
  const sigset_t blocked = seen_by_a_worker([] {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    return mask;
  });
  for (int signal : {SIGINT, SIGTERM, SIGCHLD, SIGALRM, SIGUSR1}) CHECK(sigismember(&blocked, signal) == 1);
  sigset_t own;
  pthread_sigmask(SIG_SETMASK, nullptr, &own);
  CHECK(sigismember(&own, SIGINT) == 0);
}

TEST_CASE("thread pool: a task may call it again") {
  for (unsigned threads : {2, 5}) {
    for (int round = 0; round < 20; ++round) {
      std::vector<std::vector<int>> times(12);
      parallel_for(times.size(), threads, [&](size_t task) { times[task] = times_run(task * 3, threads); });
      for (size_t task = 0; task < times.size(); ++task) REQUIRE(times[task] == once(task * 3));
    }
  }
}

TEST_CASE("thread pool: several threads may call it at once") {
  constexpr int kCallers = 4;
  std::vector<int> right(kCallers, 0);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&right, caller] {
      for (size_t round = 0; round < 200; ++round) right[caller] += times_run(round, 3) == once(round);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(right == std::vector<int>(kCallers, 200));
}

TEST_CASE("thread pool: a forked child makes its own, and the parent's goes on") {
  seen_by_a_worker([] { return 0; });  // the workers exist now, and stay behind
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(60);  // a child that hangs ends, and fails the test
    seen_by_a_worker([] { return 0; });
    _exit(times_run(1000, 3) == once(1000) ? 0 : 1);
  }
  CHECK(times_run(1000, 3) == once(1000));
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

}  // namespace
}  // namespace dtruntime
