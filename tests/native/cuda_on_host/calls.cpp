// The functions of csrc/cuda/*.h for ctypes. Each returns what went wrong, or null; the text is the calling
// thread's until its next call.
#include <cuda_runtime.h>

#include <string>

#include "../../../csrc/cuda/digest.h"
#include "../../../csrc/cuda/transfer.h"

namespace {

using namespace dtruntime;
using namespace dtruntime::cuda;

const char* words_of(const Status& status) {
  static thread_local std::string words;
  if (status.ok()) return nullptr;
  words = status.what;
  return words.c_str();
}

}  // namespace

extern "C" {

const char* list_chunks(const DeviceRange* ranges, size_t count, uint64_t chunk_bytes, DeviceChunk* chunks,
                        int device) {
  return words_of(cuda::list_chunks({ranges, count}, chunk_bytes, chunks, {device, nullptr}));
}

const char* digest_chunks(const DeviceChunk* chunks, size_t count, uint8_t* digests, uint32_t* queue,
                          int device) {
  return words_of(cuda::digest_chunks(chunks, count, digests, queue, {device, nullptr}));
}

const char* copy_digest_chunks(const DeviceChunk* chunks, size_t count, uint8_t* digests, uint32_t* queue,
                               int device) {
  return words_of(cuda::copy_digest_chunks(chunks, count, digests, queue, {device, nullptr}));
}

const char* find_changed(const uint8_t* digests, uint8_t* known, size_t count, uint32_t* changed,
                         uint32_t* changed_count, int device) {
  return words_of(cuda::find_changed(digests, known, count, changed, changed_count, {device, nullptr}));
}

const char* gather_changed(const DeviceChunk* chunks, const uint32_t* changed, const uint32_t* changed_count,
                           size_t most, uint8_t* staging, uint64_t stride, int device) {
  return words_of(
      cuda::gather_changed(chunks, changed, changed_count, most, staging, stride, {device, nullptr}));
}

const char* read_memory(const uint8_t* data, size_t nbytes, uint64_t* sink, int device) {
  return words_of(cuda::read_memory(data, nbytes, sink, {device, nullptr}));
}

const char* pin_memory(void* address, size_t nbytes) { return words_of(cuda::pin_memory(address, nbytes)); }
const char* unpin_memory(void* address) { return words_of(cuda::unpin_memory(address)); }
const char* device_count(int* count) { return words_of(cuda::device_count(count)); }

void set_driver(int version, int error) { set_driver(version, static_cast<cudaError_t>(error)); }

void set_device(int device) { (void)cudaSetDevice(device); }

int get_device() {
  int device = -1;
  (void)cudaGetDevice(&device);
  return device;
}

const char* get_last_error() { return cudaGetErrorName(cudaGetLastError()); }

}  // extern "C"
