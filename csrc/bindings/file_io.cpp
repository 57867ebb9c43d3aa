#include "../core/file_io.h"

#include <pybind11/stl.h>

#include <deque>
#include <optional>
#include <tuple>

#include "bindings.h"

namespace dtruntime::bindings {
namespace {

// Offset in the memory, offset in the file, length.
using Pieces = std::vector<std::tuple<int64_t, int64_t, int64_t>>;

IoOptions make_options(int64_t queue_depth, bool direct) {
  return {check_threads(queue_depth, "queue_depth"), direct};
}

std::vector<Extent> make_extents(std::span<uint8_t> memory, const Pieces& pieces) {
  std::vector<Range> ranges;
  std::vector<Extent> extents;
  for (const auto& [start, offset, length] : pieces) {
    ranges.push_back({check_size(start, "an offset"), check_size(length, "a length")});
    // An extent that ends after the memory is refused below; its address is not made.
    uint8_t* const address = ranges.back().offset <= memory.size() ? memory.data() + start : nullptr;
    extents.push_back({address, check_size(offset, "a file offset"), ranges.back().length});
  }
  raise_if_failed(check_ranges(ranges, memory.size(), 1));
  return extents;
}

void py_write_file(py::object path, py::iterable data, int64_t queue_depth, bool direct) {
  const std::string name = path_bytes(path);
  const WriteOptions options{make_options(queue_depth, direct), {}, false};
  std::deque<Buffer> buffers;  // a deque: a pinned view must not move
  std::vector<std::span<const uint8_t>> runs;
  for (py::handle object : data) runs.push_back(buffers.emplace_back(object).bytes());
  raise_if_failed(without_gil([&] { return write_file(name.c_str(), runs, options); }), path.ptr());
}

void py_write_extents(py::object path, py::object data, const Pieces& pieces, std::optional<int64_t> nbytes,
                      int64_t queue_depth, bool direct, bool sync_folder) {
  const std::string name = path_bytes(path);
  const Buffer buffer(data);
  const std::vector<Extent> extents = make_extents(buffer.bytes(), pieces);
  WriteOptions options{make_options(queue_depth, direct), {}, sync_folder};
  if (nbytes) options.nbytes = check_size(*nbytes, "nbytes");
  raise_if_failed(without_gil([&] { return write_extents(name.c_str(), extents, options); }), path.ptr());
}

std::unique_ptr<ArenaObject> py_read_file(py::object path, int64_t offset, int64_t length,
                                          int64_t queue_depth, bool direct) {
  const std::string name = path_bytes(path);
  const size_t start = check_size(offset, "offset");
  const size_t nbytes = check_size(length, "length");
  const IoOptions options = make_options(queue_depth, direct);
  auto object = std::make_unique<ArenaObject>();
  raise_if_failed(without_gil([&] { return read_file(name.c_str(), start, nbytes, options, object->arena); }),
                  path.ptr());
  return object;
}

void py_read_extents(py::object path, py::object arena, const Pieces& pieces, int64_t queue_depth,
                     bool direct) {
  const std::string name = path_bytes(path);
  const Buffer buffer(arena, Buffer::Access::kWrite);
  const std::vector<Extent> extents = make_extents(buffer.bytes(), pieces);
  const IoOptions options = make_options(queue_depth, direct);
  raise_if_failed(without_gil([&] { return read_extents(name.c_str(), extents, options); }), path.ptr());
}

void py_rename_noreplace(py::object source, py::object target) {
  const std::string from = path_bytes(source);
  const std::string to = path_bytes(target);
  raise_if_failed(without_gil([&] { return rename_noreplace(from.c_str(), to.c_str()); }), source.ptr(),
                  target.ptr());
}

}  // namespace

void bind_file_io(py::module_& module) {
  module.def("write_file", &py_write_file, py::arg("path"), py::arg("data"), py::arg("queue_depth") = 0,
             py::arg("direct") = true);
  module.def("write_extents", &py_write_extents, py::arg("path"), py::arg("data"), py::arg("extents"),
             py::kw_only(), py::arg("nbytes") = py::none(), py::arg("queue_depth") = 0,
             py::arg("direct") = true, py::arg("sync_folder") = false);
  module.def("read_file", &py_read_file, py::arg("path"), py::arg("offset"), py::arg("length"),
             py::arg("queue_depth") = 0, py::arg("direct") = true);
  module.def("read_extents", &py_read_extents, py::arg("path"), py::arg("arena"), py::arg("extents"),
             py::kw_only(), py::arg("queue_depth") = 0, py::arg("direct") = true);
  module.def("rename_noreplace", &py_rename_noreplace, py::arg("source"), py::arg("target"));
}

}  // namespace dtruntime::bindings
