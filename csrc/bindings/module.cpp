#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  using namespace dtruntime::bindings;
  module.doc() = "The native core of dtruntime_torch; its manual is _C.pyi.";
  bind_arena(module);
  bind_build_info(module);
  bind_copy_job(module);
  bind_cuda(module);
  bind_digest(module);
  bind_digest_into(module);
  bind_digest_read(module);
  bind_file_io(module);
  bind_permutation(module);
  bind_system_calls(module);
  bind_yardsticks(module);
}
