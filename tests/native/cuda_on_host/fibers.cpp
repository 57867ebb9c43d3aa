// Fibers take turns on the calling thread; one that waits hands on to the next. If all wait, none ever goes
// on.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#include "cuda_runtime.h"
#include "lanes.h"

namespace cuda_on_host {
namespace {

constexpr size_t kStackBytes = 128 << 10;

struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it goes on: a jump needs no system call, and swapcontext two
  bool started = false;
  std::unique_ptr<char[]> stack;
  dim3 thread, block;  // what threadIdx and blockIdx are while it runs
  bool done = false;
};

thread_local const std::function<void(unsigned)>* body;
thread_local std::vector<Fiber> fibers;
thread_local unsigned current;
thread_local unsigned waits_in_turn;  // without one that went on
thread_local ucontext_t caller;

[[noreturn]] void go_to(unsigned next) {
  Fiber& fiber = fibers[next];
  current = next;
  threadIdx = fiber.thread;
  blockIdx = fiber.block;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
  fail("setcontext failed");
}

// The next fiber that is not done; none is left if it is the current one again.
unsigned next_fiber() {
  unsigned next = current;
  do next = (next + 1) % fibers.size();
  while (fibers[next].done && next != current);
  return next;
}

// Returns when the current fiber's turn has come again.
void hand_on() {
  const unsigned next = next_fiber();
  if (next == current) return;
  fibers[current].thread = threadIdx;
  fibers[current].block = blockIdx;
  if (_setjmp(fibers[current].place) == 0) go_to(next);
}

void enter() {
  (*body)(current);
  fibers[current].done = true;
  waits_in_turn = 0;
  const unsigned next = next_fiber();
  if (next == current) setcontext(&caller);
  go_to(next);
}

}  // namespace

void run_at_once(unsigned count, const std::function<void(unsigned)>& lane) {
  body = &lane;
  fibers = std::vector<Fiber>(count);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.stack.reset(new char[kStackBytes]);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  current = 0;
  waits_in_turn = 0;
  fibers[0].started = true;
  swapcontext(&caller, &fibers[0].context);
  fibers.clear();
}

void wait_until_changed(std::atomic<uint32_t>& word, uint32_t old) {
  while (word.load() == old) {
    if (++waits_in_turn > 2 * fibers.size()) fail("the lanes wait for each other at different places");
    hand_on();
  }
  waits_in_turn = 0;
}

void wake_waiting(std::atomic<uint32_t>&) { waits_in_turn = 0; }

}  // namespace cuda_on_host
