// The bindings as a build without CUDA has them.
#include "../../csrc/bindings/bindings.h"
#include "../../csrc/cuda/absent.cpp"

PYBIND11_MODULE(cuda_absent, module) { dtruntime::bindings::bind_cuda(module); }
