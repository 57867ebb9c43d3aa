#include <algorithm>
#include <vector>

#include "../core/bytes.h"
#include "../core/streaming.h"
#include "../core/thread_pool.h"
#include "bindings.h"

namespace dtruntime::bindings {
namespace {

// As much as a chunk of a digest, so that both are shared out alike.
constexpr size_t kPiece = 1 << 20;

// Calls act(start, length) for each piece of `nbytes` bytes, in parallel.
template <typename Act>
void for_each_piece(size_t nbytes, unsigned threads, Act act) {
  parallel_for(divide_up(nbytes, kPiece), threads,
               [&](size_t i) { act(i * kPiece, std::min(kPiece, nbytes - i * kPiece)); });
}

uint64_t py_read_memory(py::object data, int64_t threads) {
  const Buffer buffer(data);
  const auto bytes = buffer.bytes();
  const unsigned count = check_threads(threads);
  std::vector<uint64_t> sums(divide_up(bytes.size(), kPiece));
  without_gil([&] {
    for_each_piece(bytes.size(), count, [&](size_t start, size_t length) {
      sums[start / kPiece] = read_memory(bytes.data() + start, length);
    });
  });
  uint64_t all = 0;
  for (const uint64_t sum : sums) all ^= sum;
  return all;
}

void py_copy_streaming(py::object target, py::object source, int64_t threads) {
  const Buffer to(target, Buffer::Access::kWrite);
  const Buffer from(source);
  if (to.bytes().size() != from.bytes().size()) throw py::value_error("target and source differ in length");
  const unsigned count = check_threads(threads);
  without_gil([&] {
    for_each_piece(to.bytes().size(), count, [&](size_t start, size_t length) {
      copy_streaming(to.bytes().data() + start, from.bytes().data() + start, length);
    });
  });
}

}  // namespace

void bind_yardsticks(py::module_& module) {
  module.def("read_memory", &py_read_memory, py::arg("data"), py::arg("threads") = 0);
  module.def("copy_streaming", &py_copy_streaming, py::arg("target"), py::arg("source"),
             py::arg("threads") = 0);
}

}  // namespace dtruntime::bindings
