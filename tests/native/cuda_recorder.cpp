// Stands where csrc/cuda is linked, and writes down what the bindings call: `calls()` takes the list.
// `refuse()` says why devices cannot be counted from then on.
#include <sstream>

#include "../../csrc/bindings/bindings.h"
#include "../../csrc/cuda/digest.h"
#include "../../csrc/cuda/transfer.h"

namespace dtruntime::cuda {
namespace {

std::vector<std::string> calls;
std::string refusal;  // to count devices

template <typename... Arguments>
Status record(const char* name, Stream stream, Arguments... arguments) {
  std::ostringstream text;
  text << name;
  ((text << ' ' << (uint64_t)arguments), ...);
  text << " on " << stream.device << ":" << (uint64_t)stream.handle;
  calls.push_back(text.str());
  return {};
}

}  // namespace

Status device_count(int* count) {
  if (!refusal.empty()) return Status::device(refusal);
  *count = 3;
  return {};
}

Status list_chunks(std::span<const DeviceRange> ranges, uint64_t chunk_bytes, DeviceChunk* chunks,
                   Stream stream) {
  for (const DeviceRange& range : ranges) {
    (void)record("range", stream, range.source, range.length, range.target);
  }
  return record("list_chunks", stream, chunk_bytes, chunks);
}

Status digest_chunks(const DeviceChunk* chunks, size_t count, uint8_t* digests, uint32_t* queue,
                     Stream stream) {
  return record("digest_chunks", stream, chunks, count, digests, queue);
}

Status copy_digest_chunks(const DeviceChunk* chunks, size_t count, uint8_t* digests, uint32_t* queue,
                          Stream stream) {
  return record("copy_digest_chunks", stream, chunks, count, digests, queue);
}

Status find_changed(const uint8_t* digests, uint8_t* known, size_t count, uint32_t* changed,
                    uint32_t* changed_count, Stream stream) {
  return record("find_changed", stream, digests, known, count, changed, changed_count);
}

Status gather_changed(const DeviceChunk* chunks, const uint32_t* changed, const uint32_t* changed_count,
                      size_t most, uint8_t* staging, uint64_t stride, Stream stream) {
  return record("gather_changed", stream, chunks, changed, changed_count, most, staging, stride);
}

Status read_memory(const uint8_t* data, size_t nbytes, uint64_t* sink, Stream stream) {
  return record("read_memory", stream, data, nbytes, sink);
}

}  // namespace dtruntime::cuda

PYBIND11_MODULE(cuda_recorder, module) {
  dtruntime::bindings::bind_cuda(module);
  module.def("refuse", [](const std::string& words) { dtruntime::cuda::refusal = words; });
  module.def("calls", [] {
    pybind11::list taken;
    for (const std::string& call : dtruntime::cuda::calls) taken.append(call);
    dtruntime::cuda::calls.clear();
    return taken;
  });
}
