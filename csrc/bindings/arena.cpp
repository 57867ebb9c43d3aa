#include <pybind11/stl.h>

#include <optional>

#include "../cuda/transfer.h"
#include "bindings.h"

namespace dtruntime::bindings {
namespace {

constexpr PinTable kCudaPins{&cuda::pin_memory, &cuda::unpin_memory};

py::str path_of(const std::string& name) { return py::str(kSharedMemoryFolder + name); }

std::unique_ptr<ArenaObject> make_arena(int64_t nbytes, const std::optional<std::string>& name, bool pin,
                                        bool dont_fork) {
  const size_t size = check_size(nbytes, "nbytes");
  auto object = std::make_unique<ArenaObject>(ArenaOptions{pin ? &kCudaPins : nullptr, dont_fork});
  Arena& arena = object->arena;
  if (!name) {
    raise_if_failed(without_gil([&] { return arena.resize(size); }));
  } else {
    raise_if_failed(without_gil([&] { return arena.create(*name, size); }), path_of(*name).ptr());
  }
  return object;
}

std::unique_ptr<ArenaObject> attach(const std::string& name) {
  auto object = std::make_unique<ArenaObject>();
  raise_if_failed(without_gil([&] { return object->arena.attach(name); }), path_of(name).ptr());
  return object;
}

void resize(ArenaObject& object, int64_t nbytes) {
  const size_t wanted = check_size(nbytes, "nbytes");
  if (object.exports > 0 || object.resizing) {
    throw py::buffer_error("the arena cannot be resized: " +
                           (object.resizing ? "another thread is at it"
                                            : std::to_string(object.exports) + " views of it are in use"));
  }
  object.resizing = true;
  const Status status = without_gil([&] { return object.arena.resize(wanted); });
  object.resizing = false;
  raise_if_failed(status);
  ++object.resizes;
}

void populate(py::object self, int64_t threads) {
  const unsigned count = check_threads(threads);
  const Buffer buffer(self);  // nobody may resize it meanwhile
  Arena& arena = self.cast<ArenaObject&>().arena;
  raise_if_failed(without_gil([&] { return arena.populate(count); }));
}

void unlink(ArenaObject& object) {
  const std::string& name = object.arena.name();
  raise_if_failed(object.arena.unlink(), name.empty() ? nullptr : path_of(name).ptr());
}

std::optional<std::string> name_of(const ArenaObject& object) {
  return object.arena.name().empty() ? std::nullopt : std::optional(object.arena.name());
}

std::optional<std::string> pin_refusal(const ArenaObject& object) {
  return object.arena.refusal().empty() ? std::nullopt : std::optional(object.arena.refusal());
}

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
  ArenaObject& object = py::handle(self).cast<ArenaObject&>();
  if (object.resizing) {
    view->obj = nullptr;
    PyErr_SetString(PyExc_BufferError, "the arena is being resized");
    return -1;
  }
  const auto bytes = object.arena.bytes();
  const int result =
      PyBuffer_FillInfo(view, self, bytes.data(), static_cast<Py_ssize_t>(bytes.size()), 0, flags);
  if (result == 0) ++object.exports;
  return result;
}

void release_buffer(PyObject* self, Py_buffer*) { --py::handle(self).cast<ArenaObject&>().exports; }

}  // namespace

void bind_arena(py::module_& module) {
  py::class_<ArenaObject>(module, "Arena", py::custom_type_setup([](PyHeapTypeObject* type) {
                            type->as_buffer.bf_getbuffer = get_buffer;
                            type->as_buffer.bf_releasebuffer = release_buffer;
                            type->ht_type.tp_as_buffer = &type->as_buffer;
                          }))
      .def(py::init(&make_arena), py::arg("nbytes"), py::kw_only(), py::arg("name") = py::none(),
           py::arg("pin") = false, py::arg("dont_fork") = false)
      .def_static("attach", &attach, py::arg("name"))
      .def("unlink", &unlink)
      .def("populate", &populate, py::arg("threads") = 0)
      .def("resize", &resize, py::arg("nbytes"))
      .def("__len__", [](const ArenaObject& object) { return object.arena.nbytes(); })
      .def_property_readonly("name", &name_of)
      .def_property_readonly("pinned", [](const ArenaObject& object) { return object.arena.pinned(); })
      .def_property_readonly("pin_refusal", &pin_refusal)
      .def_property_readonly("nbytes", [](const ArenaObject& object) { return object.arena.nbytes(); })
      .def_property_readonly("resizes", [](const ArenaObject& object) { return object.resizes; })
      .def_property_readonly("address", [](const ArenaObject& object) {
        return reinterpret_cast<uintptr_t>(object.arena.address());
      });
}

}  // namespace dtruntime::bindings
