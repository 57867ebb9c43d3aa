// The part of CUDA's runtime that the host calls.
#include "cuda_runtime.h"

#include <utility>

namespace {

constexpr int kDevices = 2;
constexpr int kProcessors = 3;

int driver_version = 13000;
cudaError_t count_error = cudaSuccess;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
  }
  return "unknown";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
  if (count_error == cudaSuccess) *count = kDevices;
  return remember(count_error);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return cudaSuccess;
}

void set_driver(int version, cudaError_t error) {
  driver_version = version;
  count_error = error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return remember(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  if (device < 0 || device >= kDevices) return remember(cudaErrorInvalidDevice);
  *value = kProcessors;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t nbytes, cudaStream_t) {
  if (memory == nullptr) return remember(cudaErrorInvalidValue);
  memset(memory, byte, nbytes);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* address, size_t nbytes, unsigned) {
  return remember(address == nullptr || nbytes == 0 ? cudaErrorInvalidValue : cudaSuccess);
}

cudaError_t cudaHostUnregister(void* address) {
  return remember(address == nullptr ? cudaErrorInvalidValue : cudaSuccess);
}

cudaError_t check_launch(const cudaLaunchConfig_t& config) {
  const dim3 grid = config.gridDim;
  const bool possible = grid.x > 0 && grid.y > 0 && grid.y < 65536 && grid.z == 1 && config.blockDim.x > 0 &&
                        config.blockDim.x <= 1024 && config.blockDim.y == 1 && config.blockDim.z == 1;
  return remember(possible ? cudaSuccess : cudaErrorInvalidConfiguration);
}
