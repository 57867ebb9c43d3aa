#include <pybind11/stl.h>

#include <optional>

#include "../core/digest.h"
#include "bindings.h"

namespace dtruntime::bindings {
namespace {

using Name = std::optional<std::string>;

void py_digest_into(uintptr_t digests, uintptr_t source, int64_t nbytes, int64_t chunk_bytes, int64_t threads,
                    const Name& impl) {
  const Range whole{0, check_size(nbytes, "nbytes")};
  const std::span data(reinterpret_cast<const uint8_t*>(source), whole.length);
  const size_t chunk = check_chunk_bytes(chunk_bytes);
  const unsigned count = check_threads(threads);
  const Xxh3Variant& variant = find_variant(impl);
  raise_if_failed(without_gil([&] {
    return digest_ranges(data, {&whole, 1}, chunk, count, reinterpret_cast<uint8_t*>(digests), variant);
  }));
}

void py_copy_digest_into(uintptr_t digests, uintptr_t target, uintptr_t source, int64_t nbytes,
                         int64_t chunk_bytes, int64_t threads, const Name& impl) {
  const Copy copy{reinterpret_cast<const uint8_t*>(source), {0, check_size(nbytes, "nbytes")}};
  const std::span arena(reinterpret_cast<uint8_t*>(target), copy.target.length);
  const size_t chunk = check_chunk_bytes(chunk_bytes);
  const unsigned count = check_threads(threads);
  const Xxh3Variant& variant = find_variant(impl);
  raise_if_failed(without_gil([&] {
    return copy_digest(arena, {&copy, 1}, chunk, count, reinterpret_cast<uint8_t*>(digests), std::nullopt,
                       variant);
  }));
}

}  // namespace

void bind_digest_into(py::module_& module) {
  using py::arg;
  module.def("digest_into", &py_digest_into, arg("digests"), arg("source"), arg("nbytes"), arg("chunk_bytes"),
             arg("threads") = 0, py::kw_only(), arg("impl") = py::none());
  module.def("copy_digest_into", &py_copy_digest_into, arg("digests"), arg("target"), arg("source"),
             arg("nbytes"), arg("chunk_bytes"), arg("threads") = 0, py::kw_only(), arg("impl") = py::none());
}

}  // namespace dtruntime::bindings
