#include "digest.h"

#include <algorithm>
#include <cstring>
#include <string>
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

std::string describe(size_t index, Range range) {
  return "range " + std::to_string(index) + " [" + std::to_string(range.offset) + ", +" +
         std::to_string(range.length) + ")";
}

Status check_disjoint(std::span<const Range> ranges) {
  std::vector<size_t> order;
  for (size_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].length > 0) order.push_back(i);
  }
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return ranges[a].offset < ranges[b].offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    const Range before = ranges[order[i - 1]];
    if (before.offset + before.length > ranges[order[i]].offset) {
      return Status::invalid(describe(order[i - 1], before) + " overlaps " +
                             describe(order[i], ranges[order[i]]));
    }
  }
  return {};
}

// Calls act(index of the range, first byte of the chunk in the range, its length, where its digest goes)
// for every chunk, in parallel.
template <typename Act>
void for_each_chunk(std::span<const Range> ranges, size_t chunk_bytes, unsigned threads, uint8_t* digests,
                    Act act) {
  std::vector<size_t> first_chunk;
  size_t chunks = 0;
  size_t nbytes = 0;
  for (const Range& range : ranges) {
    first_chunk.push_back(chunks);
    chunks += divide_up(range.length, chunk_bytes);
    nbytes += range.length;
  }
  const size_t batch = std::max<size_t>(1, kBytesPerThread / chunk_bytes);
  if (threads == 0) threads = default_threads();
  threads = static_cast<unsigned>(std::min<size_t>(threads, nbytes / kBytesPerThread + 1));
  parallel_for(divide_up(chunks, batch), threads, [&](size_t task) {
    size_t chunk = task * batch;
    const size_t end = std::min(chunks, chunk + batch);
    // The last range that starts at or before the chunk: empty ranges start where their successor does.
    size_t i = std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk) - first_chunk.begin() - 1;
    for (; chunk < end; ++chunk) {
      while (i + 1 < first_chunk.size() && first_chunk[i + 1] <= chunk) ++i;
      const size_t start = (chunk - first_chunk[i]) * chunk_bytes;
      const size_t length = std::min(chunk_bytes, ranges[i].length - start);
      act(i, start, length, digests + chunk * kXxh3DigestBytes);
    }
  });
}

Xxh3Digest copy_digest_chunk(uint8_t* target, const uint8_t* source, size_t length) {
  if (length <= kPieceBytes) {
    memcpy(target, source, length);
    return xxh3_128(target, length);
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
  return lanes.finish(target, length);
}

}  // namespace

Status count_chunks(std::span<const Range> ranges, size_t nbytes, size_t chunk_bytes, size_t* chunks) {
  if (chunk_bytes == 0) return Status::invalid("chunk_bytes must be at least 1");
  size_t sum = 0;
  for (size_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].offset > nbytes || ranges[i].length > nbytes - ranges[i].offset) {
      return Status::invalid(describe(i, ranges[i]) + " ends after the " + std::to_string(nbytes) +
                             " bytes of the buffer");
    }
    sum += divide_up(ranges[i].length, chunk_bytes);
  }
  *chunks = sum;
  return {};
}

Status digest_ranges(std::span<const uint8_t> data, std::span<const Range> ranges, size_t chunk_bytes,
                     unsigned threads, uint8_t* digests) {
  size_t chunks;
  if (Status status = count_chunks(ranges, data.size(), chunk_bytes, &chunks); !status.ok()) return status;
  for_each_chunk(ranges, chunk_bytes, threads, digests,
                 [&](size_t i, size_t start, size_t length, uint8_t* digest) {
                   xxh3_store(xxh3_128(data.data() + ranges[i].offset + start, length), digest);
                 });
  return {};
}

Status copy_digest(std::span<uint8_t> arena, std::span<const Copy> copies, size_t chunk_bytes,
                   unsigned threads, uint8_t* digests) {
  std::vector<Range> targets;
  for (const Copy& copy : copies) {
    if (copy.source == nullptr && copy.target.length > 0) return Status::invalid("a source is null");
    targets.push_back(copy.target);
  }
  size_t chunks;
  if (Status status = count_chunks(targets, arena.size(), chunk_bytes, &chunks); !status.ok()) return status;
  if (Status status = check_disjoint(targets); !status.ok()) return status;
  for_each_chunk(targets, chunk_bytes, threads, digests,
                 [&](size_t i, size_t start, size_t length, uint8_t* digest) {
                   uint8_t* target = arena.data() + targets[i].offset + start;
                   xxh3_store(copy_digest_chunk(target, copies[i].source + start, length), digest);
                 });
  return {};
}

}  // namespace dtruntime
