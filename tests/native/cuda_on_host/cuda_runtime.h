// As much of CUDA as csrc/cuda/*.cu uses, on the host, for tests alone: the kernels' own source runs here,
// with a thread or a fiber for each lane and a barrier for each warp and block (lanes.h). So launch geometry,
// tails, alignment and shared memory are executed without a device, also under AddressSanitizer and
// ThreadSanitizer.
//
// A launch returns when it is done; streams are not looked at. The blocks of a grid run one after another,
// for __shared__ is a static variable here. What would be an error of the device ends the process with a
// message: an access that is not aligned, lanes of a warp at different collectives, one that ended before a
// collective. What it cannot show: blocks that race, and memory that a shuffle does not order; here it does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

// ---- types
// ---------------------------------------------------------------------------------------------------

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- where a lane is, and meets the others
// ---------------------------------------------------------------------

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr unsigned kWarpLanes = 32;

// Ends the process: what the device would not forgive.
[[noreturn]] void fail(const char* what, const void* address = nullptr);

// Runs `lane` for every lane of every block.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& lane);

void meet_block();
void meet_warp(const char* collective);

// Hands a value to the lanes of this warp and returns what each handed over; good until the lane's next
// collective.
const uint64_t* exchange(const char* collective, unsigned mask, uint64_t value);

// Every access by word: the device wants it aligned.
template <typename Word>
Word load(const Word* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Word) != 0) fail("misaligned load", address);
  Word value;
  memcpy(&value, address, sizeof value);
  return value;
}

template <typename Word>
void store(Word* address, Word value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Word) != 0) fail("misaligned store", address);
  memcpy(address, &value, sizeof value);
}

}  // namespace cuda_on_host

// ---- what kernels call
// -----------------------------------------------------------------------------------------

inline void __syncthreads() { cuda_on_host::meet_block(); }
inline void __syncwarp() { cuda_on_host::meet_warp("__syncwarp"); }

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int distance) {
  const unsigned lane = threadIdx.x % cuda_on_host::kWarpLanes;
  return static_cast<Value>(cuda_on_host::exchange("__shfl_xor_sync", mask, value)[lane ^ distance]);
}

template <typename Value>
Value __shfl_sync(unsigned mask, Value value, int lane) {
  return static_cast<Value>(cuda_on_host::exchange("__shfl_sync", mask, value)[lane]);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* votes = cuda_on_host::exchange("__ballot_sync", mask, vote);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < cuda_on_host::kWarpLanes; ++lane) ballot |= (votes[lane] & 1u) << lane;
  return ballot;
}

template <typename Word>
Word atomicAdd(Word* address, Word value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <typename Word>
Word __ldcs(const Word* address) {
  return cuda_on_host::load(address);
}

template <typename Word>
void __stcs(Word* address, Word value) {
  cuda_on_host::store(address, value);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// ---- what the host calls: a machine of two devices of three multiprocessors
// ------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
constexpr unsigned cudaHostRegisterPortable = 1;
constexpr unsigned cudaHostRegisterMapped = 2;

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();  // and forgets it
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);  // 0: there is none
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int byte, size_t nbytes, cudaStream_t stream);
cudaError_t cudaHostRegister(void* address, size_t nbytes, unsigned flags);
cudaError_t cudaHostUnregister(void* address);
// Not CUDA's: from now on the driver is of that version, and to count devices gives that error.
void set_driver(int version, cudaError_t error);
cudaError_t check_launch(const cudaLaunchConfig_t& config);

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (const cudaError_t error = check_launch(*config); error != cudaSuccess) return error;
  cuda_on_host::run_grid(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
