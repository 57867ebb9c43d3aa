// One pool of worker threads for the process, made at its first use and never torn down.
//
// A forked child makes its own at its first use: threads do not survive fork, and the DataLoader forks.
#pragma once

#include <cstddef>
#include <functional>

namespace dtruntime {

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
