#include "../core/digest_read.h"

#include <pybind11/stl.h>

#include <deque>

#include "../core/bytes.h"
#include "bindings.h"

namespace dtruntime::bindings {
namespace {

py::bytes py_read_and_digest(py::object path, py::iterable targets, const std::vector<int64_t>& offsets,
                             int64_t chunk_bytes, int64_t threads) {
  const std::string name = path_bytes(path);
  const size_t chunk = check_chunk_bytes(chunk_bytes);
  const unsigned count = check_threads(threads);
  std::deque<Buffer> buffers;  // a deque: a pinned view must not move
  for (py::handle object : targets) buffers.emplace_back(object, Buffer::Access::kWrite);
  if (buffers.size() != offsets.size()) throw py::value_error("targets and offsets differ in number");
  std::vector<Extent> extents;
  size_t chunks = 0;
  for (size_t i = 0; i < offsets.size(); ++i) {
    const std::span<uint8_t> memory = buffers[i].bytes();
    extents.push_back({memory.data(), check_size(offsets[i], "an offset"), memory.size()});
    chunks += divide_up(memory.size(), chunk);
  }
  std::string digests(chunks * kXxh3DigestBytes, '\0');
  auto* const found = reinterpret_cast<uint8_t*>(digests.data());
  raise_if_failed(without_gil([&] { return read_and_digest(name.c_str(), extents, chunk, count, found); }),
                  path.ptr());
  return digests;
}

}  // namespace

void bind_digest_read(py::module_& module) {
  module.def("read_and_digest", &py_read_and_digest, py::arg("path"), py::arg("targets"), py::arg("offsets"),
             py::arg("chunk_bytes"), py::arg("threads") = 0);
}

}  // namespace dtruntime::bindings
