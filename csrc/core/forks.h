// Whether this process is still the one that made something.
//
// Threads do not survive fork, locks are left in whatever state they were, and memory may be missing in the
// child. What depends on them remembers forks() and compares.
#pragma once

#include <cstdint>

namespace dtruntime {

// How often this process and its ancestors have come out of fork() since the library was loaded: a child's
// number differs from its parent's. Callable from any thread.
uint64_t forks();

}  // namespace dtruntime
