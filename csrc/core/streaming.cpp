#include "streaming.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "bytes.h"

namespace dtruntime {
namespace {

constexpr size_t kPrefetchBytes = 512;

}  // namespace

void stream_lines(uint8_t* target, const uint8_t* source, size_t lines, const uint8_t* next) {
#if defined(__x86_64__)
  // Not wider: memory is the limit, and these every x86-64 has.
  for (size_t line = 0; line < lines; ++line) {
    const auto* from = reinterpret_cast<const __m128i*>(source + line * kLineBytes);
    auto* to = reinterpret_cast<__m128i*>(target + line * kLineBytes);
    _mm_prefetch(next + line * kLineBytes, _MM_HINT_T0);
    for (int i = 0; i < 4; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
  }
#else
  (void)next;
  memcpy(target, source, lines * kLineBytes);
#endif
}

void end_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

void copy_streaming(uint8_t* target, const uint8_t* source, size_t nbytes) {
  if (nbytes == 0) return;
  const size_t lead = reinterpret_cast<uintptr_t>(target) % kLineBytes;
  const size_t head = std::min(nbytes, (kLineBytes - lead) % kLineBytes);
  const size_t lines = (nbytes - head) / kLineBytes;
  const size_t done = head + lines * kLineBytes;
  memcpy(target, source, head);
  stream_lines(target + head, source + head, lines, source + head + kPrefetchBytes);
  end_streaming();
  memcpy(target + done, source + done, nbytes - done);
}

uint64_t read_memory(const uint8_t* data, size_t nbytes) {
  uint64_t sums[8] = {};
  for (const uint8_t* end = data + nbytes / kLineBytes * kLineBytes; data != end; data += kLineBytes) {
    __builtin_prefetch(data + kPrefetchBytes);
    for (size_t i = 0; i < 8; ++i) sums[i] ^= load64(data + 8 * i);
  }
  uint64_t all = 0;
  for (const uint64_t sum : sums) all ^= sum;
  return all;
}

}  // namespace dtruntime
