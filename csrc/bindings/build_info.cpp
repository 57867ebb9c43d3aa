#include "bindings.h"

#if defined(DTRUNTIME_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace dtruntime::bindings {
namespace {

py::object cuda_version() {
#if defined(DTRUNTIME_WITH_CUDA)
  return py::str(std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10));
#else
  return py::bool_(false);
#endif
}

py::dict build_info() {
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
  py::dict info;
  info["compiler"] = compiler;
  info["cuda"] = cuda_version();
  info["simd"] = find_variant(std::nullopt).name;
  return info;
}

}  // namespace

void bind_build_info(py::module_& module) { module.def("build_info", &build_info); }

}  // namespace dtruntime::bindings
