#include "digest.h"

#include <algorithm>
#include <cstring>

#include "bytes.h"
#include "streaming.h"
#include "thread_pool.h"
#include "xxh3.h"
#include "xxh3_dispatch.h"

namespace dtruntime {
namespace {

// What a target that is not aligned to lines is streamed through: it stays in L1 beside the source.
constexpr size_t kBounceStripes = 64;
static_assert(kLineBytes == kXxh3StripeBytes && kBounceStripes % (kXxh3BlockBytes / kXxh3StripeBytes) == 0);
// From about here on source and target together push each other out of a last-level cache of 32 MiB. Measured
// with both in it, plain against streamed: 8 MiB 33 against 28 GB/s, 16 MiB 22 against 27, and from memory 10
// against 19.
constexpr size_t kStreamFrom = 8 << 20;

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

// Streams to a target that lies `lead` bytes after the start of a line, by way of a buffer that lies in its
// lines as the target does. Lines that are not wholly the target's are stored plainly.
void stream_shifted(const Xxh3Variant& variant, Xxh3Lanes& lanes, const uint8_t* source, size_t stripes,
                    uint8_t* target, size_t lead) {
  alignas(kLineBytes) uint8_t bounce[kLineBytes + kBounceStripes * kXxh3StripeBytes];
  uint8_t* line = target - lead;
  for (size_t done = 0; done < stripes; done += kBounceStripes) {
    const size_t piece = std::min(kBounceStripes, stripes - done);
    const uint8_t* next = source + piece * kXxh3StripeBytes;
    variant.copy(lanes, source, piece, bounce + lead);
    if (done == 0) {
      memcpy(target, bounce + lead, kLineBytes - lead);
      stream_lines(line + kLineBytes, bounce + kLineBytes, piece - 1, next);
    } else {
      stream_lines(line, bounce, piece, next);
    }
    source = next;
    line += piece * kLineBytes;
    memcpy(bounce, bounce + piece * kLineBytes, lead);  // what is there of the next line
  }
  memcpy(line, bounce, lead);
  end_streaming();
}

// REQUIRES: stripes > 0.
void copy_stripes(const Xxh3Variant& variant, Stores stores, Xxh3Lanes& lanes, const uint8_t* source,
                  size_t stripes, uint8_t* target) {
  if (stores == Stores::kPlain || variant.stream == nullptr) {
    return variant.copy(lanes, source, stripes, target);
  }
  const size_t lead = reinterpret_cast<uintptr_t>(target) % kLineBytes;
  if (lead == 0) return variant.stream(lanes, source, stripes, target);
  stream_shifted(variant, lanes, source, stripes, target, lead);
}

}  // namespace

std::vector<Range> targets_of(std::span<const Copy> copies) {
  std::vector<Range> targets;
  targets.reserve(copies.size());
  for (const Copy& copy : copies) targets.push_back(copy.target);
  return targets;
}

Stores stores_for(size_t nbytes) { return nbytes < kStreamFrom ? Stores::kPlain : Stores::kStream; }

void digest_chunk(const uint8_t* data, size_t length, uint8_t* digest, const Xxh3Variant& variant) {
  if (length <= kXxh3MediumBytes) return xxh3_store(xxh3_128(data, length), digest);
  Xxh3Lanes lanes;
  variant.add(lanes, data, xxh3_full_stripes(length), nullptr);
  xxh3_store(lanes.finish_last(data + length - kXxh3StripeBytes, length), digest);
}

void copy_digest_chunk(uint8_t* target, const uint8_t* source, size_t length, uint8_t* digest, Stores stores,
                       const Xxh3Variant& variant) {
  if (length <= kXxh3MediumBytes) {
    if (length > 0) memcpy(target, source, length);
    return digest_chunk(target, length, digest, variant);
  }
  const size_t stripes = xxh3_full_stripes(length);
  const size_t done = stripes * kXxh3StripeBytes;
  Xxh3Lanes lanes;
  copy_stripes(variant, stores, lanes, source, stripes, target);
  memcpy(target + done, source + done, length - done);
  xxh3_store(lanes.finish_last(target + length - kXxh3StripeBytes, length), digest);
}

Status digest_ranges(std::span<const uint8_t> data, std::span<const Range> ranges, size_t chunk_bytes,
                     unsigned threads, uint8_t* digests, const Xxh3Variant& variant) {
  if (Status status = check_ranges(ranges, data.size(), chunk_bytes); !status.ok()) return status;
  const ChunkList chunks(ranges, chunk_bytes);
  for_each_chunk(chunks, chunk_bytes, threads, digests, [&](Chunk chunk, uint8_t* digest) {
    digest_chunk(data.data() + ranges[chunk.range].offset + chunk.start, chunk.length, digest, variant);
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
                   unsigned threads, uint8_t* digests, std::optional<Stores> stores,
                   const Xxh3Variant& variant) {
  if (Status status = check_copies(arena, copies, chunk_bytes); !status.ok()) return status;
  const std::vector<Range> targets = targets_of(copies);
  const ChunkList chunks(targets, chunk_bytes);
  const Stores chosen = stores.value_or(stores_for(chunks.nbytes()));
  for_each_chunk(chunks, chunk_bytes, threads, digests, [&](Chunk chunk, uint8_t* digest) {
    uint8_t* target = arena.data() + targets[chunk.range].offset + chunk.start;
    copy_digest_chunk(target, copies[chunk.range].source + chunk.start, chunk.length, digest, chosen,
                      variant);
  });
  return {};
}

}  // namespace dtruntime
