#include "../core/permutation.h"

#include <utility>

#include "bindings.h"

namespace dtruntime::bindings {
namespace {

using Key = std::pair<uint64_t, uint64_t>;

// Throws ValueError unless all of start, start + stride, ... lie in [0, n).
void check_positions(uint64_t n, uint64_t start, uint64_t stride, uint64_t count) {
  if (n > kPermutationMaxLength) throw py::value_error("n must be at most 2**62, got " + std::to_string(n));
  if (stride == 0) throw py::value_error("stride must be at least 1");
  if (count > 0 && (start >= n || (count - 1) > (n - 1 - start) / stride)) {
    throw py::value_error("positions " + std::to_string(start) + " + i * " + std::to_string(stride) +
                          " for " + std::to_string(count) + " values leave [0, " + std::to_string(n) + ")");
  }
}

py::list permute(int64_t n, const Key& key, int64_t start, int64_t stride, int64_t count, int version) {
  if (version != kPermutationVersion) {
    throw py::value_error("unknown permutation version " + std::to_string(version) +
                          ", known: " + std::to_string(kPermutationVersion));
  }
  const uint64_t length = check_size(n, "n");
  const uint64_t first = check_size(start, "start");
  const uint64_t step = check_size(stride, "stride");
  check_positions(length, first, step, check_size(count, "count"));
  std::vector<uint64_t> values(static_cast<size_t>(count));
  if (!values.empty()) {
    without_gil([&] {
      const Permutation permutation(length, key.first, key.second);
      for (size_t i = 0; i < values.size(); ++i) values[i] = permutation(first + i * step);
    });
  }
  py::list result(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    PyList_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), py::int_(values[i]).release().ptr());
  }
  return result;
}

}  // namespace

void bind_permutation(py::module_& module) {
  module.def("permute", &permute, py::arg("n"), py::arg("key"), py::arg("start"), py::arg("stride"),
             py::arg("count"), py::arg("version") = 0);
}

}  // namespace dtruntime::bindings
