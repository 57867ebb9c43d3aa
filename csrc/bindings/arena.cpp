#include "bindings.h"

namespace dtruntime::bindings {
namespace {

std::unique_ptr<ArenaObject> make_arena(int64_t nbytes) {
  auto object = std::make_unique<ArenaObject>();
  raise_if_failed(object->arena.resize(check_size(nbytes, "nbytes")));
  return object;
}

void resize(ArenaObject& object, int64_t nbytes) {
  const size_t wanted = check_size(nbytes, "nbytes");
  if (object.exports > 0) {
    throw py::buffer_error("the arena cannot be resized: " + std::to_string(object.exports) +
                           " views of it are in use");
  }
  raise_if_failed(object.arena.resize(wanted));
}

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
  ArenaObject& object = py::handle(self).cast<ArenaObject&>();
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
      .def(py::init(&make_arena), py::arg("nbytes"))
      .def("resize", &resize, py::arg("nbytes"))
      .def("__len__", [](const ArenaObject& object) { return object.arena.nbytes(); })
      .def_property_readonly("nbytes", [](const ArenaObject& object) { return object.arena.nbytes(); })
      .def_property_readonly("address", [](const ArenaObject& object) {
        return reinterpret_cast<uintptr_t>(object.arena.address());
      });
}

}  // namespace dtruntime::bindings
