#include "transfer.h"

#include <algorithm>

#include "../core/bytes.h"
#include "check.h"
#include "pieces.h"

namespace dtruntime::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kAtOnce = 4;  // pieces of a thread that are on their way from memory
constexpr unsigned kRowBytes = kThreads * kPieceBytes;
// What a block copies at a time of a chunk: small enough that a few changed chunks keep all blocks busy.
constexpr unsigned kShareBytes = 4 * kAtOnce * kRowBytes;

// Copies by all threads of a block.
template <typename Word>
__device__ void copy_share(uint8_t* target, const uint8_t* source, uint64_t nbytes) {
  const uint64_t whole = nbytes / kPieceBytes * kPieceBytes;
  for (uint64_t start = threadIdx.x * kPieceBytes; start < whole; start += kAtOnce * kRowBytes) {
    Piece pieces[kAtOnce];
#pragma unroll
    for (unsigned i = 0; i < kAtOnce; ++i) {
      if (start + i * kRowBytes < whole) pieces[i] = load_piece<Word>(source + start + i * kRowBytes);
    }
#pragma unroll
    for (unsigned i = 0; i < kAtOnce; ++i) {
      if (start + i * kRowBytes < whole) store_piece<Word>(target + start + i * kRowBytes, pieces[i]);
    }
  }
  if (whole + threadIdx.x < nbytes) target[whole + threadIdx.x] = source[whole + threadIdx.x];
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(const DeviceChunk* chunks, const uint32_t* changed, const uint32_t* changed_count,
                  uint64_t shares_of_chunk, uint8_t* staging, uint64_t stride) {
  const uint64_t shares = *changed_count * shares_of_chunk;
  for (uint64_t share = blockIdx.x; share < shares; share += gridDim.x) {
    const uint64_t place = share / shares_of_chunk;
    const uint64_t start = share % shares_of_chunk * kShareBytes;
    const DeviceChunk chunk = chunks[changed[place]];
    if (start >= chunk.length) continue;
    const uint64_t rest = chunk.length - start;
    const uint8_t* source = chunk.source + start;
    uint8_t* target = (staging == nullptr ? chunk.target : staging + place * stride) + start;
    with_widest_word(reinterpret_cast<uintptr_t>(source) | reinterpret_cast<uintptr_t>(target),
                     [&](auto word) {
                       copy_share<decltype(word)>(target, source, rest < kShareBytes ? rest : kShareBytes);
                     });
  }
}

__device__ inline uint64_t sum_of(Piece piece) { return first(piece) + second(piece); }

// Adds the words of 8 bytes, and the bytes after the last whole piece.
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint8_t* data, uint64_t nbytes, unsigned long long* sink) {
  const uint64_t whole = nbytes / kPieceBytes * kPieceBytes;
  const uint64_t row = static_cast<uint64_t>(gridDim.x) * kRowBytes;
  uint64_t start = blockIdx.x * kRowBytes + threadIdx.x * kPieceBytes;
  uint64_t sum = 0;
  // No condition between the loads: with one each, the compiler waits for the first to reuse its register.
  for (; start + (kAtOnce - 1) * row < whole; start += kAtOnce * row) {
    Piece pieces[kAtOnce];
#pragma unroll
    for (unsigned i = 0; i < kAtOnce; ++i) pieces[i] = load_piece<Piece>(data + start + i * row);
#pragma unroll
    for (unsigned i = 0; i < kAtOnce; ++i) sum += sum_of(pieces[i]);
  }
  for (; start < whole; start += row) sum += sum_of(load_piece<Piece>(data + start));
  if (blockIdx.x == 0 && whole + threadIdx.x < nbytes) sum += data[whole + threadIdx.x];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) atomicAdd(sink, static_cast<unsigned long long>(sum));
}

// CUDA reports a driver that is not there as one that is too old; but it has no version.
bool means_no_device(cudaError_t error) {
  if (error == cudaErrorNoDevice) return true;
  int version = 0;
  return error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&version) == cudaSuccess &&
         version == 0;
}

}  // namespace

Status device_count(int* count) {
  int found = 0;
  const cudaError_t error = cudaGetDeviceCount(&found);
  Status status = check(error, "counting devices");
  if (!status.ok() && !means_no_device(error)) return status;
  *count = status.ok() ? found : 0;
  return {};
}

Status pin_memory(void* address, size_t nbytes) {
  return check(cudaHostRegister(address, nbytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
               "pinning " + std::to_string(nbytes) + " bytes");
}

Status unpin_memory(void* address) { return check(cudaHostUnregister(address), "unpinning memory"); }

Status gather_changed(const DeviceChunk* chunks, const uint32_t* changed, const uint32_t* changed_count,
                      size_t most, uint8_t* staging, uint64_t stride, Stream stream) {
  const DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  unsigned processors = 0;
  if (Status status = count_processors(stream.device, &processors); !status.ok()) return status;
  const uint64_t shares_of_chunk = divide_up(stride, kShareBytes);
  // One block a multiprocessor: the rest of each is left to the training that runs beside.
  const uint64_t blocks = std::min<uint64_t>(processors, most * shares_of_chunk);
  if (blocks == 0) return {};
  return launch("gather_changed", gather_kernel, static_cast<unsigned>(blocks), kThreads, stream, chunks,
                changed, changed_count, shares_of_chunk, staging, stride);
}

Status read_memory(const uint8_t* data, size_t nbytes, uint64_t* sink, Stream stream) {
  const DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  unsigned blocks = 0;
  if (Status status = count_resident_blocks(read_kernel, kThreads, stream.device, &blocks); !status.ok()) {
    return status;
  }
  if (Status status = clear(sink, sizeof *sink, stream); !status.ok()) return status;
  return launch("read_memory", read_kernel, blocks, kThreads, stream, data, static_cast<uint64_t>(nbytes),
                reinterpret_cast<unsigned long long*>(sink));
}

}  // namespace dtruntime::cuda
