// The functions `cuda_*` of the native module over the kernels of csrc/cuda as they run on the host.
#include "../../../csrc/bindings/bindings.h"

PYBIND11_MODULE(cuda_on_host, module) { dtruntime::bindings::bind_cuda(module); }
