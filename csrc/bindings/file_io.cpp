#include "../core/file_io.h"

#include <deque>

#include "bindings.h"

namespace dtruntime::bindings {
namespace {

void py_write_file(py::object path, py::iterable data, int64_t threads, bool direct) {
  const std::string name = path_bytes(path);
  const unsigned count = check_threads(threads);
  std::deque<Buffer> buffers;  // a deque: a pinned view must not move
  std::vector<std::span<const uint8_t>> runs;
  for (py::handle object : data) runs.push_back(buffers.emplace_back(object).bytes());
  raise_if_failed(without_gil([&] { return write_file(name.c_str(), runs, count, direct); }), path.ptr());
}

std::unique_ptr<ArenaObject> py_read_file(py::object path, int64_t offset, int64_t length, int64_t threads,
                                          bool direct) {
  const std::string name = path_bytes(path);
  const size_t start = check_size(offset, "offset");
  const size_t nbytes = check_size(length, "length");
  const unsigned count = check_threads(threads);
  auto object = std::make_unique<ArenaObject>();
  raise_if_failed(
      without_gil([&] { return read_file(name.c_str(), start, nbytes, count, direct, object->arena); }),
      path.ptr());
  return object;
}

void py_rename_noreplace(py::object source, py::object target) {
  const std::string from = path_bytes(source);
  const std::string to = path_bytes(target);
  raise_if_failed(without_gil([&] { return rename_noreplace(from.c_str(), to.c_str()); }), source.ptr(),
                  target.ptr());
}

}  // namespace

void bind_file_io(py::module_& module) {
  module.def("write_file", &py_write_file, py::arg("path"), py::arg("data"), py::arg("threads") = 0,
             py::arg("direct") = true);
  module.def("read_file", &py_read_file, py::arg("path"), py::arg("offset"), py::arg("length"),
             py::arg("threads") = 0, py::arg("direct") = true);
  module.def("rename_noreplace", &py_rename_noreplace, py::arg("source"), py::arg("target"));
}

}  // namespace dtruntime::bindings
