// What a build without CUDA links instead of the .cu files.
#include "digest.h"
#include "transfer.h"

namespace dtruntime::cuda {
namespace {

Status absent() {
  return Status::device(
      "this dtruntime_torch was built without CUDA; build it again with CUDA_HOME set to a CUDA toolkit");
}

}  // namespace

Status device_count(int* count) {
  *count = 0;
  return {};
}

Status list_chunks(std::span<const DeviceRange>, uint64_t, DeviceChunk*, Stream) { return absent(); }
Status digest_chunks(const DeviceChunk*, size_t, uint8_t*, uint32_t*, Stream) { return absent(); }
Status copy_digest_chunks(const DeviceChunk*, size_t, uint8_t*, uint32_t*, Stream) { return absent(); }
Status find_changed(const uint8_t*, uint8_t*, size_t, uint32_t*, uint32_t*, Stream) { return absent(); }

Status pin_memory(void*, size_t) { return absent(); }
Status unpin_memory(void*) { return absent(); }
Status gather_changed(const DeviceChunk*, const uint32_t*, const uint32_t*, size_t, uint8_t*, uint64_t,
                      Stream) {
  return absent();
}
Status read_memory(const uint8_t*, size_t, uint64_t*, Stream) { return absent(); }

}  // namespace dtruntime::cuda
