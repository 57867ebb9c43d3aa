// What the files of this folder share: one bind_* per core part, buffers in, errors out.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "../core/arena.h"
#include "../core/digest.h"
#include "../core/status.h"
#include "../core/xxh3_dispatch.h"

namespace dtruntime::bindings {

namespace py = pybind11;

void bind_arena(py::module_& module);
void bind_build_info(py::module_& module);
void bind_copy_job(py::module_& module);
void bind_cuda(py::module_& module);
void bind_digest(py::module_& module);
void bind_digest_into(py::module_& module);
void bind_digest_read(py::module_& module);
void bind_file_io(py::module_& module);
void bind_permutation(py::module_& module);
void bind_system_calls(py::module_& module);
void bind_yardsticks(py::module_& module);

// A Python object's contiguous bytes, pinned (no resize, no release) while this lives. Made and destroyed
// with the GIL held; the bytes may be used without it.
class Buffer {
 public:
  enum class Access { kRead = PyBUF_SIMPLE, kWrite = PyBUF_WRITABLE };

  explicit Buffer(py::handle object, Access access = Access::kRead) {
    if (PyObject_GetBuffer(object.ptr(), &view_, static_cast<int>(access)) != 0)
      throw py::error_already_set();
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::span<uint8_t> bytes() const {
    return {static_cast<uint8_t*>(view_.buf), static_cast<size_t>(view_.len)};
  }

 private:
  Py_buffer view_;
};

// Takes the GIL back, or never returns if the interpreter has ended meanwhile.
void take_gil(PyThreadState* state);

// Calls work() without the GIL and returns what it returned, or throws what it threw: memory may be short.
template <typename Work>
auto without_gil(Work&& work) {
  PyThreadState* const state = PyEval_SaveThread();
  try {
    if constexpr (std::is_void_v<decltype(work())>) {
      work();
      take_gil(state);
    } else {
      auto result = work();
      take_gil(state);
      return result;
    }
  } catch (...) {
    take_gil(state);
    throw;
  }
}

// Throws the Python error for a failure: ValueError, EOFError, MemoryError, RuntimeError (the accelerator's)
// or OSError(errno, text, path). `path` may be null; with `target` it becomes the OSError's filename2.
void raise_if_failed(const Status& status, PyObject* path = nullptr, PyObject* target = nullptr);

// What Python calls an Arena. Views of it keep it alive and are counted in `exports`; none can be had while
// it is being resized. All under the GIL.
struct ArenaObject {
  ArenaObject() = default;
  explicit ArenaObject(ArenaOptions options) : arena(options) {}

  Arena arena;
  Py_ssize_t exports = 0;
  bool resizing = false;
  size_t resizes = 0;  // how often it was resized since it was made
};

// The bytes of a path: str, bytes or os.PathLike, without NUL.
std::string path_bytes(py::handle path);

// Copies from addresses to places in an arena. Throws ValueError if the three differ in number or a length or
// an offset is negative.
std::vector<Copy> make_copies(const std::vector<uintptr_t>& sources, const std::vector<int64_t>& lengths,
                              const std::vector<int64_t>& offsets);

// A count or a size from Python. Throws ValueError if it is negative.
size_t check_size(int64_t value, const char* name);
unsigned check_threads(int64_t threads, const char* name = "threads");

// When a time-out of that many seconds from now ends; none is 30 years, and a negative one has ended. Throws
// ValueError if it is not a number.
std::chrono::steady_clock::time_point deadline_after(std::optional<double> seconds);

// Throws ValueError if it is less than 1.
size_t check_chunk_bytes(int64_t chunk_bytes);

// The digest variant of that name; without one that of the process. Throws ValueError, with the names to
// choose from, if it, or what DTRUNTIME_DIGEST_IMPL names, does not run here.
const Xxh3Variant& find_variant(const std::optional<std::string>& impl);

}  // namespace dtruntime::bindings
