#include <cxxabi.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "bindings.h"

namespace dtruntime::bindings {
namespace {

[[noreturn]] void raise(PyObject* type, py::tuple arguments) {
  PyErr_SetObject(type, arguments.ptr());
  throw py::error_already_set();
}

}  // namespace

void raise_if_failed(const Status& status, PyObject* path, PyObject* target) {
  const std::string where = path == nullptr ? "" : py::str(py::repr(path)).cast<std::string>() + ": ";
  switch (status.code) {
    case Code::kOk:
      return;
    case Code::kInvalid:
      throw py::value_error(where + status.what);
    case Code::kEndOfFile:
      raise(PyExc_EOFError, py::make_tuple(where + status.what));
    case Code::kDevice:
      throw std::runtime_error(where + status.what);
    case Code::kSystem:
      if (status.error == ENOMEM) raise(PyExc_MemoryError, py::make_tuple(where + status.what));
      const std::string text = std::string(std::strerror(status.error)) + " (" + status.what + ")";
      // OSError picks its subclass by errno when it is called, not when it is raised with a tuple later.
      py::object none = py::none();
      py::object error = py::reinterpret_borrow<py::object>(PyExc_OSError)(
          status.error, text, path ? py::reinterpret_borrow<py::object>(path) : none, none,
          target ? py::reinterpret_borrow<py::object>(target) : none);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
      throw py::error_already_set();
  }
}

void take_gil(PyThreadState* state) {
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind&) {
    // The interpreter is gone and ends threads that come back to it, up to Python 3.13 by unwinding their
    // stack. Destructors there would touch Python objects: the thread sleeps instead until the process ends.
    for (;;) pause();
  }
}

std::string path_bytes(py::handle path) {
  PyObject* bytes = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), &bytes) == 0) throw py::error_already_set();
  return std::string(py::reinterpret_steal<py::bytes>(bytes));
}

std::vector<Copy> make_copies(const std::vector<uintptr_t>& sources, const std::vector<int64_t>& lengths,
                              const std::vector<int64_t>& offsets) {
  if (sources.size() != lengths.size() || offsets.size() != lengths.size())
    throw py::value_error("sources, lengths and offsets differ in number");
  std::vector<Copy> copies(sources.size());
  for (size_t i = 0; i < copies.size(); ++i) {
    copies[i].source = reinterpret_cast<const uint8_t*>(sources[i]);
    copies[i].target = {check_size(offsets[i], "an offset"), check_size(lengths[i], "a length")};
  }
  return copies;
}

size_t check_size(int64_t value, const char* name) {
  if (value < 0)
    throw py::value_error(std::string(name) + " must not be negative, got " + std::to_string(value));
  return static_cast<size_t>(value);
}

unsigned check_threads(int64_t threads, const char* name) {
  if (threads < 0 || threads > std::numeric_limits<int>::max()) {
    throw py::value_error(std::string(name) + " must not be negative, got " + std::to_string(threads));
  }
  return static_cast<unsigned>(threads);
}

std::chrono::steady_clock::time_point deadline_after(std::optional<double> seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr double kLongest = 1e9;
  if (seconds && std::isnan(*seconds)) throw py::value_error("timeout is not a number");
  const std::chrono::duration<double> span(std::clamp(seconds.value_or(kLongest), 0.0, kLongest));
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(span);
}

size_t check_chunk_bytes(int64_t chunk_bytes) {
  if (chunk_bytes < 1)
    throw py::value_error("chunk_bytes must be at least 1, got " + std::to_string(chunk_bytes));
  return static_cast<size_t>(chunk_bytes);
}

}  // namespace dtruntime::bindings
