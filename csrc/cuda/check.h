// How the device code calls CUDA's runtime: failures become a Status in CUDA's own words, and the calling
// thread's current device is as before.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "../core/status.h"
#include "digest.h"

namespace dtruntime::cuda {

// kDevice, with what was being done, if `error` is one. Takes it back from the runtime too, so that whoever
// asks for the thread's last error next is not told of ours.
inline Status check(cudaError_t error, const std::string& doing) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  return Status::device(doing + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Makes a device the thread's current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : status_(enter(device)) {}
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);  // it was the current one: there is nothing to report
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  const Status& status() const { return status_; }

 private:
  Status enter(int device) {
    if (Status status = check(cudaGetDevice(&before_), "asking for the current device"); !status.ok()) {
      return status;
    }
    if (before_ == device) return {};
    Status status = check(cudaSetDevice(device), "choosing device " + std::to_string(device));
    changed_ = status.ok();
    return status;
  }

  int before_ = 0;
  bool changed_ = false;
  Status status_;
};

inline cudaStream_t raw(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

// Enqueues a kernel, called `name` in errors. REQUIRES: a DeviceGuard for stream.device; no empty grid.
template <typename... Parameters, typename... Arguments>
Status launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, unsigned threads, Stream stream,
              Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = raw(stream);
  return check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...),
               std::string("launching ") + name + " on device " + std::to_string(stream.device));
}

// Sets 32-bit words in device memory to 0.
inline Status clear(void* words, size_t nbytes, Stream stream) {
  return check(cudaMemsetAsync(words, 0, nbytes, raw(stream)),
               "clearing a counter on device " + std::to_string(stream.device));
}

// Stores how many multiprocessors the device has. REQUIRES: as launch.
inline Status count_processors(int device, unsigned* processors) {
  int count = 0;
  Status status = check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
                        "asking device " + std::to_string(device) + " for its multiprocessors");
  *processors = static_cast<unsigned>(count);
  return status;
}

// Stores how many blocks of a kernel the device holds at once. REQUIRES: as launch.
template <typename... Parameters>
Status count_resident_blocks(void (*kernel)(Parameters...), int threads, int device, unsigned* blocks) {
  unsigned processors = 0;
  if (Status status = count_processors(device, &processors); !status.ok()) return status;
  int each = 0;
  Status status = check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0),
                        "asking device " + std::to_string(device) + " for a kernel's occupancy");
  *blocks = processors * static_cast<unsigned>(each > 0 ? each : 1);
  return status;
}

}  // namespace dtruntime::cuda
