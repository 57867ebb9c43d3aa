#include "../core/digest.h"

#include <pybind11/stl.h>

#include <optional>

#include "../core/bytes.h"
#include "bindings.h"

namespace dtruntime::bindings {
namespace {

using Sizes = std::vector<int64_t>;
using Name = std::optional<std::string>;

std::vector<Range> make_ranges(const Sizes& offsets, const Sizes& lengths) {
  if (offsets.size() != lengths.size()) throw py::value_error("offsets and lengths differ in number");
  std::vector<Range> ranges(offsets.size());
  for (size_t i = 0; i < ranges.size(); ++i) {
    ranges[i] = {check_size(offsets[i], "an offset"), check_size(lengths[i], "a length")};
  }
  return ranges;
}

// The digests of `ranges` of a buffer of `nbytes` bytes, as fill(where they go) stores them without the GIL:
// nobody sees the object yet.
template <typename Fill>
py::bytes make_digests(std::span<const Range> ranges, size_t nbytes, size_t chunk_bytes, Fill fill) {
  raise_if_failed(check_ranges(ranges, nbytes, chunk_bytes));
  size_t chunks = 0;
  for (const Range& range : ranges) chunks += divide_up(range.length, chunk_bytes);
  auto digests = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(chunks * kXxh3DigestBytes)));
  if (!digests) throw py::error_already_set();
  auto* target = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(digests.ptr()));
  raise_if_failed(without_gil([&] { return fill(target); }));
  return digests;
}

std::optional<Stores> check_stores(std::optional<bool> stream) {
  if (!stream) return std::nullopt;
  return *stream ? Stores::kStream : Stores::kPlain;
}

py::bytes digest_of(std::span<const uint8_t> data, std::span<const Range> ranges, int64_t chunk_bytes,
                    int64_t threads, const Name& impl) {
  const size_t chunk = check_chunk_bytes(chunk_bytes);
  const unsigned count = check_threads(threads);
  const Xxh3Variant& variant = find_variant(impl);
  return make_digests(ranges, data.size(), chunk, [&](uint8_t* digests) {
    return digest_ranges(data, ranges, chunk, count, digests, variant);
  });
}

py::bytes py_digest(py::object data, int64_t chunk_bytes, int64_t threads, const Name& impl) {
  const Buffer buffer(data);
  const Range whole{0, buffer.bytes().size()};
  return digest_of(buffer.bytes(), {&whole, 1}, chunk_bytes, threads, impl);
}

py::bytes py_digest_ranges(py::object data, const Sizes& offsets, const Sizes& lengths, int64_t chunk_bytes,
                           int64_t threads, const Name& impl) {
  const Buffer buffer(data);
  return digest_of(buffer.bytes(), make_ranges(offsets, lengths), chunk_bytes, threads, impl);
}

py::bytes py_copy_digest(py::object arena, const std::vector<uintptr_t>& sources, const Sizes& lengths,
                         const Sizes& offsets, int64_t chunk_bytes, int64_t threads, const Name& impl,
                         std::optional<bool> stream) {
  if (!py::isinstance<ArenaObject>(arena)) throw py::type_error("the target must be an Arena");
  const Buffer buffer(arena, Buffer::Access::kWrite);
  const std::vector<Copy> copies = make_copies(sources, lengths, offsets);
  const std::vector<Range> targets = targets_of(copies);
  const size_t chunk = check_chunk_bytes(chunk_bytes);
  const unsigned count = check_threads(threads);
  const Xxh3Variant& variant = find_variant(impl);
  return make_digests(targets, buffer.bytes().size(), chunk, [&](uint8_t* digests) {
    return copy_digest(buffer.bytes(), copies, chunk, count, digests, check_stores(stream), variant);
  });
}

}  // namespace

const Xxh3Variant& find_variant(const std::optional<std::string>& impl) {
  const Xxh3Variant* variant = &xxh3_variant();
  raise_if_failed(impl ? find_xxh3_variant(*impl, variant) : check_xxh3_variant());
  return *variant;
}

void bind_digest(py::module_& module) {
  using py::arg;
  module.def("digest_impls", [] {
    py::list names;
    for (const Xxh3Variant* variant : xxh3_variants()) names.append(variant->name);
    return py::tuple(names);
  });
  module.def("digest", &py_digest, arg("data"), arg("chunk_bytes"), arg("threads") = 0, py::kw_only(),
             arg("impl") = py::none());
  module.def("digest_ranges", &py_digest_ranges, arg("data"), arg("offsets"), arg("lengths"),
             arg("chunk_bytes"), arg("threads") = 0, py::kw_only(), arg("impl") = py::none());
  module.def("copy_digest", &py_copy_digest, arg("arena"), arg("sources"), arg("lengths"), arg("offsets"),
             arg("chunk_bytes"), arg("threads") = 0, py::kw_only(), arg("impl") = py::none(),
             arg("stream") = py::none());
}

}  // namespace dtruntime::bindings
