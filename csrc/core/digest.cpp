#include "digest.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "bytes.h"
#include "thread_pool.h"
#include "xxh3.h"

namespace dtruntime {
namespace {

// What was copied is still in L1 when it is digested (measured: 7.5 GB/s, against 6.8 for 128 KiB).
constexpr size_t kPieceBytes = 8 << 10;
// Work below this is done sooner than a sleeping thread wakes up.
constexpr size_t kBytesPerThread = 128 << 10;

// Calls act(chunk, where its digest goes) for every chunk, in parallel.
template <typename Act>
void for_each_chunk(const ChunkList& chunks, size_t chunk_bytes, unsigned threads, uint8_t* digests,
                    Act act) {
  const size_t batch = std::max<size_t>(1, kBytesPerThread / chunk_bytes);
  if (threads == 0) threads = default_threads();
  threads = static_cast<unsigned>(std::min<size_t>(threads, chunks.nbytes() / kBytesPerThread + 1));
  parallel_for(divide_up(chunks.size(), batch), threads, [&](size_t task) {
    const size_t end = std::min(chunks.size(), (task + 1) * batch);
    for (size_t i = task * batch; i < end; ++i) act(chunks[i], digests + i * kXxh3DigestBytes);
  });
}

std::vector<Range> targets_of(std::span<const Copy> copies) {
  std::vector<Range> targets;
  for (const Copy& copy : copies) targets.push_back(copy.target);
  return targets;
}

}  // namespace

void digest_chunk(const uint8_t* data, size_t length, uint8_t* digest) {
  xxh3_store(xxh3_128(data, length), digest);
}

void copy_digest_chunk(uint8_t* target, const uint8_t* source, size_t length, uint8_t* digest) {
  if (length <= kPieceBytes) {
    if (length > 0) memcpy(target, source, length);
    return digest_chunk(target, length, digest);
  }
  Xxh3Lanes lanes;
  const size_t last_block = xxh3_full_blocks(length) * kXxh3BlockBytes;
  for (size_t done = 0; done < last_block;) {
    const size_t piece = std::min(kPieceBytes, last_block - done);
    memcpy(target + done, source + done, piece);
    lanes.add_blocks(target + done, piece / kXxh3BlockBytes);
    done += piece;
  }
  memcpy(target + last_block, source + last_block, length - last_block);
  xxh3_store(lanes.finish(target, length), digest);
}

Status digest_ranges(std::span<const uint8_t> data, std::span<const Range> ranges, size_t chunk_bytes,
                     unsigned threads, uint8_t* digests) {
  if (Status status = check_ranges(ranges, data.size(), chunk_bytes); !status.ok()) return status;
  const ChunkList chunks(ranges, chunk_bytes);
  for_each_chunk(chunks, chunk_bytes, threads, digests, [&](Chunk chunk, uint8_t* digest) {
    digest_chunk(data.data() + ranges[chunk.range].offset + chunk.start, chunk.length, digest);
  });
  return {};
}

Status check_copies(std::span<const uint8_t> arena, std::span<const Copy> copies, size_t chunk_bytes) {
  for (const Copy& copy : copies) {
    if (copy.source == nullptr && copy.target.length > 0) return Status::invalid("a source is null");
  }
  const std::vector<Range> targets = targets_of(copies);
  if (Status status = check_ranges(targets, arena.size(), chunk_bytes); !status.ok()) return status;
  return check_disjoint(targets);
}

Status copy_digest(std::span<uint8_t> arena, std::span<const Copy> copies, size_t chunk_bytes,
                   unsigned threads, uint8_t* digests) {
  if (Status status = check_copies(arena, copies, chunk_bytes); !status.ok()) return status;
  const std::vector<Range> targets = targets_of(copies);
  const ChunkList chunks(targets, chunk_bytes);
  for_each_chunk(chunks, chunk_bytes, threads, digests, [&](Chunk chunk, uint8_t* digest) {
    uint8_t* target = arena.data() + targets[chunk.range].offset + chunk.start;
    copy_digest_chunk(target, copies[chunk.range].source + chunk.start, chunk.length, digest);
  });
  return {};
}

}  // namespace dtruntime
