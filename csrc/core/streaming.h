// Copies past the caches, and the plainest read and copy that memory allows, which benchmarks compare with.
//
// Everything here may be called from any thread and throws nothing. Where the processor has no non-temporal
// stores that we use (all but x86-64), copies are plain ones.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dtruntime {

// A line of the caches, which is what streaming stores at once.
inline constexpr size_t kLineBytes = 64;

// Copies `lines` lines, and meanwhile asks the memory for as many lines from `next` on, which is
// only a hint: it need not be readable. Other threads may see these stores after later ones, unless
// end_streaming() comes between. REQUIRES: target is a multiple of kLineBytes; source (of any alignment) and
// target do not overlap.
void stream_lines(uint8_t* target, const uint8_t* source, size_t lines, const uint8_t* next);
void end_streaming();

// Copies `nbytes` bytes of any alignment, in order with what the thread stores afterwards, and nothing else:
// what copy_digest is measured against. REQUIRES: they do not overlap.
void copy_streaming(uint8_t* target, const uint8_t* source, size_t nbytes);

// Reads every byte and does next to nothing with it: what digests are measured against. Returns the exclusive
// or of its 8-byte words, so that the reads must happen; bytes after the last whole line are left out.
uint64_t read_memory(const uint8_t* data, size_t nbytes);

}  // namespace dtruntime
