#include "../core/system_calls.h"

#include "bindings.h"

namespace dtruntime::bindings {
namespace {

void py_inject_fault(const std::string& call, int64_t nth, const std::string& action, int64_t value) {
  const std::optional<Call> kind = call_named(call);
  if (!kind) throw py::value_error("there is no call '" + call + "'");
  const std::optional<Action> what = action_named(action);
  if (!what) throw py::value_error("there is no action '" + action + "'");
  raise_if_failed(inject_fault(*kind, check_size(nth, "nth"), *what, value));
}

py::dict py_clear_faults() {
  const auto made = clear_faults();
  py::dict counts;
  for (size_t i = 0; i < made.size(); ++i) {
    counts[py::str(std::string(name_of(static_cast<Call>(i))))] = made[i];
  }
  return counts;
}

}  // namespace

void bind_system_calls(py::module_& module) {
  module.def("inject_fault", &py_inject_fault, py::arg("call"), py::arg("nth"), py::arg("action"),
             py::arg("value") = 0);
  module.def("clear_faults", &py_clear_faults);
}

}  // namespace dtruntime::bindings
