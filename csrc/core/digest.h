// XXH3-128 digests of many chunks at once, and copying and digesting in one pass.
//
// A digest is 16 bytes in canonical (big-endian) form; digests lie in the order of a ChunkList.
//
// All functions may be called from any thread and return only when every byte is done. They keep none of the
// memory that they are given, which nobody may write meanwhile. `threads` as in parallel_for. `variant`
// decides the speed alone; the default is that of the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "chunks.h"
#include "status.h"
#include "xxh3_dispatch.h"

namespace dtruntime {

// Work below this is done sooner than a sleeping thread wakes up.
inline constexpr size_t kBytesPerThread = 128 << 10;

// From memory anywhere to a place in an arena. `source` may be null if length is 0.
struct Copy {
  const uint8_t* source;
  Range target;
};

// In the order of the copies.
std::vector<Range> targets_of(std::span<const Copy> copies);

// How a copy is stored: into the caches, or past them, which spares reading the target's lines first and
// leaves the caches to others, but makes whoever reads the target next wait for memory.
enum class Stores { kPlain, kStream };

// What is faster for a call that copies `nbytes` in all.
Stores stores_for(size_t nbytes);

// Stores the digest of one chunk. `data` may be null if length is 0.
void digest_chunk(const uint8_t* data, size_t length, uint8_t* digest,
                  const Xxh3Variant& variant = xxh3_variant());

// Copies one chunk and stores the digest of what arrived: also if the source is written meanwhile.
// REQUIRES: source and target do not overlap.
void copy_digest_chunk(uint8_t* target, const uint8_t* source, size_t length, uint8_t* digest,
                       Stores stores = Stores::kStream, const Xxh3Variant& variant = xxh3_variant());

// Stores the digests of `ranges` of `data` at `digests`. REQUIRES: digests holds 16 bytes a chunk.
// kInvalid as check_ranges; nothing is stored then.
Status digest_ranges(std::span<const uint8_t> data, std::span<const Range> ranges, size_t chunk_bytes,
                     unsigned threads, uint8_t* digests, const Xxh3Variant& variant = xxh3_variant());

// kInvalid if chunk_bytes is 0, a target ends after the arena, two targets overlap or a source of more than 0
// bytes is null.
Status check_copies(std::span<const uint8_t> arena, std::span<const Copy> copies, size_t chunk_bytes);

// Copies each source to its target in `arena` and stores the digests of what arrived there.
// `stores`: nothing for what stores_for says of all the bytes together.
// REQUIRES: digests holds 16 bytes a chunk; no source overlaps a target.
// kInvalid as check_copies; nothing is copied then.
Status copy_digest(std::span<uint8_t> arena, std::span<const Copy> copies, size_t chunk_bytes,
                   unsigned threads, uint8_t* digests, std::optional<Stores> stores = std::nullopt,
                   const Xxh3Variant& variant = xxh3_variant());

}  // namespace dtruntime
