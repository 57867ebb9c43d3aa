// A thread block takes a chunk at a time from a queue. Its warps sum the chunk's blocks, four each, while the
// next four of each are on their way from memory; bytes in flight are what bounds the speed. One warp then
// adds and scrambles these sums, which is serial, while all others sum the next batch: so there are two
// tables of sums, and one barrier a batch.
#include "digest.h"

#include <algorithm>

#include "../core/bytes.h"
#include "../core/xxh3.h"
#include "block_sums.h"
#include "check.h"
#include "pieces.h"

namespace dtruntime::cuda {
namespace {

constexpr unsigned kWarps = 8;
constexpr unsigned kThreads = 32 * kWarps;
constexpr unsigned kBatchBlocks = kWarps * kBlocksAtOnce;
constexpr unsigned kResidentBlocks = 2;  // a multiprocessor: 64 KiB on their way to it
static_assert(kThreads >= kXxh3MediumBytes, "a short chunk is copied by a thread a byte");

// What the threads of a block share.
struct Workspace {
  uint64_t sums[2][kBatchBlocks][kColumns];
  uint64_t start[kColumns];  // the columns before the first block
  uint64_t columns[kColumns];
  uint32_t next[2];  // the chunk after this one, by turns: a slow warp may still have to read the last one
};

// One thread's part of a block's work, from chunk to chunk.
struct Worker {
  Workspace& shared;
  uint32_t* queue;
  unsigned warp;
  unsigned lane;
  LaneKeys keys;
  uint64_t scramble_key;  // of column lane % 8
  unsigned turn = 0;      // counts chunks
  unsigned table = 0;     // of sums, in turn

  // Takes the next chunk; every thread reads its number after the next barrier. Called when loads are on
  // their way, so that the queue's answer comes while they do.
  __device__ void claim_next() {
    if (threadIdx.x == 0) shared.next[turn % 2] = gridDim.x + atomicAdd(queue, 1u);
  }
};

template <bool kCopy>
__device__ void digest_short_chunk(Worker& worker, const DeviceChunk& chunk, uint8_t* digest) {
  if (kCopy && threadIdx.x < chunk.length) chunk.target[threadIdx.x] = chunk.source[threadIdx.x];
  if (threadIdx.x == 0) xxh3_store(xxh3_128(chunk.source, chunk.length), digest);
  worker.claim_next();
  __syncthreads();
}

// A chunk of more than kXxh3MediumBytes: full blocks, then one of 1 to 1024 bytes that is not scrambled.
template <bool kCopy, typename Word>
struct LongChunk {
  const DeviceChunk& chunk;
  uint64_t full;  // blocks
  int64_t left;   // of these, from the first of this warp's four in the current batch on; negative after all
  const uint8_t* source;  // this lane's piece of that block
  uint8_t* target;
  Piece pieces[kBlocksAtOnce][2] = {};

  __device__ LongChunk(const Worker& worker, const DeviceChunk& chunk)
      : chunk(chunk), full(xxh3_full_blocks(chunk.length)) {
    const unsigned first = worker.warp * kBlocksAtOnce;
    const unsigned offset = first * kXxh3BlockBytes + worker.lane * kPieceBytes;
    left = static_cast<int64_t>(full) - first;
    source = chunk.source + offset;
    target = chunk.target + offset;
  }

  __device__ void load(unsigned i, unsigned batches_on) {
    if (left <= static_cast<int64_t>(i + batches_on * kBatchBlocks)) return;
    const uint8_t* block = source + (batches_on * kBatchBlocks + i) * kXxh3BlockBytes;
    pieces[i][0] = load_piece<Word>(block);
    pieces[i][1] = load_piece<Word>(block + kHalfBlockBytes);
  }

  __device__ void store(unsigned i) {
    if (left <= static_cast<int64_t>(i)) return;
    store_piece<Word>(target + i * kXxh3BlockBytes, pieces[i][0]);
    store_piece<Word>(target + i * kXxh3BlockBytes + kHalfBlockBytes, pieces[i][1]);
  }

  // Sums the four blocks that are here, and calls for those of the next batch. What lies in the pieces of a
  // block that is not full is summed too, and nobody reads it.
  __device__ void sum_batch(const Worker& worker, uint64_t* sum) {
    uint64_t sums[2 * kBlocksAtOnce];
#pragma unroll
    for (unsigned i = 0; i < kBlocksAtOnce; ++i) {
      PairSums pair = {};
      add_piece(pair, pieces[i][0], worker.keys.half[0]);
      add_piece(pair, pieces[i][1], worker.keys.half[1]);
      sums[2 * i] = pair.even;
      sums[2 * i + 1] = pair.odd;
      if constexpr (kCopy) store(i);
    }
    *sum = add_lanes(sums, worker.lane);
    // Not before the shuffles: the compiler would move the loads up and the pieces aside, by 24 instructions.
#pragma unroll
    for (unsigned i = 0; i < kBlocksAtOnce; ++i) load(i, 1);
    left -= kBatchBlocks;
    source += kBatchBlocks * kXxh3BlockBytes;
    target += kBatchBlocks * kXxh3BlockBytes;
  }

  // Sums the last block, by one warp. At most 15 of its 16 stripes are whole; the place of the 16th takes the
  // chunk's last 64 bytes, which have a key of their own and may be anywhere.
  __device__ void sum_last_block(const Worker& worker, uint64_t* row) {
    const uint64_t start = full * kXxh3BlockBytes;
    const unsigned stripes = static_cast<unsigned>((chunk.length - 1 - start) / kXxh3StripeBytes);
    PairSums pair = {};
#pragma unroll
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned stripe = 8 * half + worker.lane / 4;
      if (stripe < stripes) {
        const uint64_t offset = start + half * kHalfBlockBytes + worker.lane * kPieceBytes;
        const Piece piece = load_piece<Word>(chunk.source + offset);
        add_piece(pair, piece, worker.keys.half[half]);
        if (kCopy) store_piece<Word>(chunk.target + offset, piece);
      } else if (stripe == 15) {
        const unsigned offset = worker.lane % 4 * kPieceBytes;
        const uint8_t* data = chunk.source + chunk.length - kXxh3StripeBytes + offset;
        add_piece(pair, load_piece<unsigned char>(data), key_at(kXxh3SecretBytes - 71 + offset));
      }
    }
    store_sums(pair, worker.lane, row);
    if constexpr (kCopy) {
      for (uint64_t i = start + stripes * kXxh3StripeBytes + worker.lane; i < chunk.length; i += 32) {
        chunk.target[i] = chunk.source[i];
      }
    }
  }
};

// Adds the sums of full blocks to a column and scrambles it after each.
__device__ inline uint64_t add_blocks(uint64_t column, const uint64_t (*sums)[kColumns], unsigned blocks,
                                      const Worker& worker) {
#pragma unroll 4
  for (unsigned i = 0; i < blocks; ++i) {
    column = xxh3::scrambled(column + sums[i][worker.lane % kColumns], worker.scramble_key);
  }
  return column;
}

// Stores the digest that the columns come to, by one warp.
__device__ inline void finish(Worker& worker, uint64_t column, uint64_t length, uint8_t* digest) {
  if (worker.lane < kColumns) worker.shared.columns[worker.lane] = column;
  __syncwarp();
  if (worker.lane < 2) {  // the first word in memory is the high one
    const bool high = worker.lane == 0;
    const uint64_t start = high ? ~(length * xxh3::kPrime64_2) : length * xxh3::kPrime64_1;
    const size_t key = high ? kXxh3SecretBytes - 75 : 11;
    reinterpret_cast<uint64_t*>(digest)[worker.lane] =
        swap_bytes64(xxh3::merge(worker.shared.columns, start, key));
  }
}

// Returns what the chunk's columns come to, to the lanes of the first warp.
template <bool kCopy, typename Word>
__device__ uint64_t sum_long_chunk(Worker& worker, const DeviceChunk& chunk) {
  LongChunk<kCopy, Word> work(worker, chunk);
#pragma unroll
  for (unsigned i = 0; i < kBlocksAtOnce; ++i) work.load(i, 0);
  worker.claim_next();

  uint64_t column = worker.shared.start[worker.lane % kColumns];
  uint64_t* sum =
      &worker.shared.sums[0][worker.warp * kBlocksAtOnce + worker.lane / 8][column_of(worker.lane)];
  for (uint64_t batches = work.full / kBatchBlocks; batches > 0; --batches) {
    auto* table = worker.shared.sums[worker.table];
    work.sum_batch(worker, sum + worker.table * kBatchBlocks * kColumns);
    __syncthreads();
    if (worker.warp == 0) column = add_blocks(column, table, kBatchBlocks, worker);
    worker.table ^= 1;
  }

  const unsigned rest = static_cast<unsigned>(work.full % kBatchBlocks);
  auto* table = worker.shared.sums[worker.table];
  work.sum_batch(worker, sum + worker.table * kBatchBlocks * kColumns);
  __syncwarp();  // the last block's row is about to be written again, by other lanes
  if (worker.warp == rest / kBlocksAtOnce) work.sum_last_block(worker, table[rest]);
  __syncthreads();
  if (worker.warp == 0) {
    column = add_blocks(column, table, rest, worker) + table[rest][worker.lane % kColumns];
  }
  worker.table ^= 1;
  return column;
}

template <bool kCopy>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    digest_kernel(const DeviceChunk* chunks, uint32_t count, uint8_t* digests, uint32_t* queue) {
  __shared__ Workspace shared;
  const unsigned lane = threadIdx.x % 32;
  const size_t scramble_offset = kXxh3SecretBytes - kXxh3StripeBytes + 8 * (lane % kColumns);
  Worker worker = {shared, queue, threadIdx.x / 32, lane, keys_of(lane), xxh3::secret64(scramble_offset)};
  if (threadIdx.x == 0) {
    const Xxh3Lanes lanes;
    for (unsigned i = 0; i < kColumns; ++i) shared.start[i] = lanes.lanes[i];
  }
  __syncthreads();
  for (uint32_t number = blockIdx.x; number < count; number = shared.next[worker.turn++ % 2]) {
    const DeviceChunk chunk = chunks[number];
    uint8_t* digest = digests + static_cast<uint64_t>(number) * kXxh3DigestBytes;
    if (chunk.length <= kXxh3MediumBytes) {
      digest_short_chunk<kCopy>(worker, chunk, digest);
      continue;
    }
    uint64_t column = 0;
    const uintptr_t target = kCopy ? reinterpret_cast<uintptr_t>(chunk.target) : 0;
    with_widest_word(reinterpret_cast<uintptr_t>(chunk.source) | target,
                     [&](auto word) { column = sum_long_chunk<kCopy, decltype(word)>(worker, chunk); });
    if (worker.warp == 0) finish(worker, column, chunk.length, digest);
  }
}

template <bool kCopy>
Status digest_on_device(const DeviceChunk* chunks, size_t count, uint8_t* digests, uint32_t* queue,
                        Stream stream) {
  if (count == 0) return {};
  const DeviceGuard guard(stream.device);
  if (!guard.status().ok()) return guard.status();
  unsigned blocks = 0;
  if (Status status = count_resident_blocks(digest_kernel<kCopy>, kThreads, stream.device, &blocks);
      !status.ok())
    return status;
  if (Status status = clear(queue, sizeof *queue, stream); !status.ok()) return status;
  const auto chunk_count = static_cast<uint32_t>(count);
  return launch("digest", digest_kernel<kCopy>, std::min(blocks, chunk_count), kThreads, stream, chunks,
                chunk_count, digests, queue);
}

}  // namespace

Status digest_chunks(const DeviceChunk* chunks, size_t count, uint8_t* digests, uint32_t* queue,
                     Stream stream) {
  return digest_on_device<false>(chunks, count, digests, queue, stream);
}

Status copy_digest_chunks(const DeviceChunk* chunks, size_t count, uint8_t* digests, uint32_t* queue,
                          Stream stream) {
  return digest_on_device<true>(chunks, count, digests, queue, stream);
}

}  // namespace dtruntime::cuda
