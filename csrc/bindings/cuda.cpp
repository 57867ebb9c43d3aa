#include <pybind11/stl.h>

#include <limits>

#include "../cuda/digest.h"
#include "../cuda/transfer.h"
#include "bindings.h"

// Addresses and streams are trusted: nothing here can tell whether one is right.
namespace dtruntime::bindings {
namespace {

using Addresses = std::vector<uintptr_t>;
using Sizes = std::vector<int64_t>;

constexpr size_t kDigestAlignment = 16;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

size_t check_count(int64_t count, const char* name) {
  if (count > std::numeric_limits<int32_t>::max()) {
    throw py::value_error(std::string(name) + " must be below 2**31, got " + std::to_string(count));
  }
  return check_size(count, name);
}

void check_aligned(uintptr_t address, const char* name) {
  if (address % kDigestAlignment != 0) {
    throw py::value_error(std::string(name) + " must be aligned to 16, got address " +
                          std::to_string(address));
  }
}

std::vector<cuda::DeviceRange> make_ranges(const Addresses& sources, const Sizes& lengths,
                                           const Addresses& targets) {
  if (sources.size() != lengths.size()) throw py::value_error("sources and lengths differ in number");
  if (!targets.empty() && targets.size() != sources.size())
    throw py::value_error("sources and targets differ in number");
  std::vector<cuda::DeviceRange> ranges(sources.size());
  for (size_t i = 0; i < ranges.size(); ++i) {
    ranges[i] = {pointer<const uint8_t>(sources[i]), check_size(lengths[i], "a length"),
                 pointer<uint8_t>(targets.empty() ? 0 : targets[i])};
  }
  return ranges;
}

void list_chunks(const Addresses& sources, const Sizes& lengths, const Addresses& targets,
                 int64_t chunk_bytes, uintptr_t chunks, int device, uintptr_t stream) {
  const std::vector<cuda::DeviceRange> ranges = make_ranges(sources, lengths, targets);
  const size_t chunk = check_chunk_bytes(chunk_bytes);
  raise_if_failed(without_gil([&] {
    return cuda::list_chunks(ranges, chunk, pointer<cuda::DeviceChunk>(chunks),
                             {device, pointer<void>(stream)});
  }));
}

void digest(uintptr_t chunks, int64_t count, uintptr_t digests, uintptr_t queue, int device, uintptr_t stream,
            bool copy) {
  const size_t number = check_count(count, "count");
  check_aligned(digests, "digests");
  const auto enqueue = copy ? cuda::copy_digest_chunks : cuda::digest_chunks;
  raise_if_failed(without_gil([&] {
    return enqueue(pointer<const cuda::DeviceChunk>(chunks), number, pointer<uint8_t>(digests),
                   pointer<uint32_t>(queue), {device, pointer<void>(stream)});
  }));
}

void find_changed(uintptr_t digests, uintptr_t known, int64_t count, uintptr_t changed,
                  uintptr_t changed_count, int device, uintptr_t stream) {
  const size_t number = check_count(count, "count");
  check_aligned(digests, "digests");
  check_aligned(known, "known");
  raise_if_failed(without_gil([&] {
    return cuda::find_changed(pointer<const uint8_t>(digests), pointer<uint8_t>(known), number,
                              pointer<uint32_t>(changed), pointer<uint32_t>(changed_count),
                              {device, pointer<void>(stream)});
  }));
}

void gather_changed(uintptr_t chunks, uintptr_t changed, uintptr_t changed_count, int64_t most,
                    uintptr_t staging, int64_t stride, int device, uintptr_t stream) {
  const size_t bound = check_count(most, "most");
  const size_t step = check_size(stride, "stride");
  raise_if_failed(without_gil([&] {
    return cuda::gather_changed(pointer<const cuda::DeviceChunk>(chunks), pointer<const uint32_t>(changed),
                                pointer<const uint32_t>(changed_count), bound, pointer<uint8_t>(staging),
                                step, {device, pointer<void>(stream)});
  }));
}

void read(uintptr_t data, int64_t nbytes, uintptr_t sink, int device, uintptr_t stream) {
  const size_t size = check_size(nbytes, "nbytes");
  check_aligned(data, "data");
  raise_if_failed(without_gil([&] {
    return cuda::read_memory(pointer<const uint8_t>(data), size, pointer<uint64_t>(sink),
                             {device, pointer<void>(stream)});
  }));
}

int device_count() {
  int count = 0;
  raise_if_failed(without_gil([&] { return cuda::device_count(&count); }));
  return count;
}

}  // namespace

void bind_cuda(py::module_& module) {
  const py::arg chunks("chunks"), changed("changed"), device("device"), stream("stream");
  module.def("cuda_device_count", &device_count);
  module.def("cuda_list_chunks", &list_chunks, py::arg("sources"), py::arg("lengths"), py::arg("targets"),
             py::arg("chunk_bytes"), chunks, device, stream);
  module.def("cuda_digest", &digest, chunks, py::arg("count"), py::arg("digests"), py::arg("queue"), device,
             stream, py::arg("copy") = false);
  module.def("cuda_find_changed", &find_changed, py::arg("digests"), py::arg("known"), py::arg("count"),
             changed, py::arg("changed_count"), device, stream);
  module.def("cuda_gather_changed", &gather_changed, chunks, changed, py::arg("changed_count"),
             py::arg("most"), py::arg("staging"), py::arg("stride"), device, stream);
  module.def("cuda_read", &read, py::arg("data"), py::arg("nbytes"), py::arg("sink"), device, stream);
}

}  // namespace dtruntime::bindings
