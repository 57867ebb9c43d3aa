// XXH3-128 digests of chunks in device memory, and finding the chunks that changed.
//
// Every function enqueues its work on `stream`, a raw cudaStream_t of device number `device`, and returns
// without waiting for it; the calling thread's current device is as before. Pointers are to memory that the
// device can reach and, but for what is documented as stored, are only read; all of it must stay valid until
// the stream has passed the work. Callable from any thread, also while the stream is captured into a CUDA
// graph.
//
// kDevice, in CUDA's own words, if something cannot be enqueued, and where this build has no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "../core/status.h"

namespace dtruntime::cuda {

struct Stream {
  int device;
  void* handle;  // cudaStream_t; null is the default stream
};

// A piece of memory of at least 1 byte, at any alignment. The list of chunks that the device works on is an
// array of these in device memory.
struct DeviceChunk {
  const uint8_t* source;
  uint64_t length;  // bytes
  uint8_t* target;  // where a copy goes: device memory, or mapped pinned memory of the host; may be null
};

// Python counts on it where it makes room for a list.
static_assert(sizeof(DeviceChunk) == 24);

// A piece of memory that is cut into chunks, as core/chunks.h cuts a Range.
struct DeviceRange {
  const uint8_t* source;
  uint64_t length;  // bytes
  uint8_t* target;  // may be null
};

// Stores the chunks of `ranges`, which are in host memory and not kept, at `chunks` in device memory.
// REQUIRES: chunk_bytes > 0; chunks has room for them all.
Status list_chunks(std::span<const DeviceRange> ranges, uint64_t chunk_bytes, DeviceChunk* chunks,
                   Stream stream);

// Stores the digest of each chunk, 16 canonical bytes, at digests + 16 * its number. `queue` is scratch
// memory for one uint32_t, this call's own until the stream has passed it. REQUIRES: count < 2^31; digests is
// aligned to 16.
Status digest_chunks(const DeviceChunk* chunks, size_t count, uint8_t* digests, uint32_t* queue,
                     Stream stream);

// The same, and copies each chunk to its target in the same pass. REQUIRES: no target is null or overlaps a
// source.
Status copy_digest_chunks(const DeviceChunk* chunks, size_t count, uint8_t* digests, uint32_t* queue,
                          Stream stream);

// Stores the numbers of the chunks whose digests differ, in any order, at `changed`, and how many there are
// at `changed_count`, and brings `known` up to `digests`. REQUIRES: changed has room for count numbers; both
// tables are aligned to 16.
Status find_changed(const uint8_t* digests, uint8_t* known, size_t count, uint32_t* changed,
                    uint32_t* changed_count, Stream stream);

}  // namespace dtruntime::cuda
