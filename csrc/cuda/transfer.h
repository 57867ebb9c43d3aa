// Memory of the host that the device reaches, and moving changed chunks there. As digest.h, but for what is
// said to be done at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/status.h"
#include "digest.h"

namespace dtruntime::cuda {

// Stores how many devices there are: 0 without a driver, and where this build has no CUDA. Done at once.
// kDevice if there is a driver that cannot be used, as one that is too old; nothing is stored then.
Status device_count(int* count);

// Pins pages of the host and maps them for every device (cudaHostRegister), so that copies to them run beside
// the CPU and kernels may write them. Done at once; unpin_memory before they are unmapped. REQUIRES: nbytes >
// 0.
Status pin_memory(void* address, size_t nbytes);
Status unpin_memory(void* address);

// Copies the chunks of the list that `changed` names, as many as `changed_count` says, which are both
// read on the device: the i-th of them to `staging + i * stride`, or to its own target if staging is null.
// `most` bounds how many there can be. REQUIRES: each is at most `stride` long; nothing overlaps.
Status gather_changed(const DeviceChunk* chunks, const uint32_t* changed, const uint32_t* changed_count,
                      size_t most, uint8_t* staging, uint64_t stride, Stream stream);

// Reads `nbytes` from `data` by plain 16-byte loads and stores a sum that nobody needs at `sink` (8 bytes):
// what gpucheck compares the digest's speed with. REQUIRES: data is aligned to 16.
Status read_memory(const uint8_t* data, size_t nbytes, uint64_t* sink, Stream stream);

}  // namespace dtruntime::cuda
