// Runs every kernel of csrc/cuda on the host and compares with core/xxh3.h and memcpy: small enough for a
// thread a lane under the sanitizers, large enough for several blocks and batches. Every source, target and
// table is a heap block of just its size, so that AddressSanitizer sees a byte too many.
#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../../csrc/core/xxh3.h"
#include "../../../csrc/cuda/digest.h"
#include "../../../csrc/cuda/transfer.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace {

using namespace dtruntime;
using namespace dtruntime::cuda;

constexpr Stream kStream = {0, nullptr};

void require(bool holds, const char* what, size_t number = 0) {
  if (holds) return;
  fprintf(stderr, "kernels_test: %s (%zu)\n", what, number);
  exit(1);
}

void require(const Status& status) { require(status.ok(), status.what.c_str()); }

// `length` bytes at `start` bytes after an address that is aligned to 16, in a heap block that ends with
// them. Of what is before them AddressSanitizer forbids whole words of 8 bytes.
class Bytes {
 public:
  Bytes(size_t start, size_t length) : start_(start), length_(length), block_(new uint8_t[start + length]) {
    ASAN_POISON_MEMORY_REGION(block_.get(), start);
  }
  Bytes(Bytes&&) = default;
  ~Bytes() {
    if (block_) ASAN_UNPOISON_MEMORY_REGION(block_.get(), start_);
  }

  uint8_t* data() const { return block_.get() + start_; }
  size_t size() const { return length_; }

  void fill(std::mt19937_64& random) {
    for (size_t i = 0; i < length_; ++i) data()[i] = static_cast<uint8_t>(random());
  }

 private:
  size_t start_;
  size_t length_;
  std::unique_ptr<uint8_t[]> block_;
};

// Lengths around what the kernel tells apart: short forms, stripes, blocks, batches of 32 blocks.
std::vector<size_t> lengths() {
  std::vector<size_t> all;
  for (size_t length = 1; length <= 20; ++length) all.push_back(length);
  for (size_t edge : {128, 240, 256, 1024, 2048, 4096, 5120, 32768, 33792, 65536}) {
    for (size_t length = edge - 1; length <= edge + 1; ++length) all.push_back(length);
  }
  for (size_t length : {1024 + 63, 1024 + 64, 1024 + 65, 4096 + 1000, 32768 + 15, 100'000}) {
    all.push_back(length);
  }
  return all;
}

std::vector<uint8_t> expected_digests(const std::vector<Bytes>& sources) {
  std::vector<uint8_t> digests(sources.size() * kXxh3DigestBytes);
  for (size_t i = 0; i < sources.size(); ++i) {
    xxh3_store(xxh3_128(sources[i].data(), sources[i].size()), &digests[i * kXxh3DigestBytes]);
  }
  return digests;
}

void compare(const std::vector<uint8_t>& got, const std::vector<uint8_t>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    require(got[i] == expected[i], "a digest is wrong: of chunk", i / kXxh3DigestBytes);
  }
}

// Digests and copies chunks whose sources start at each of `starts` after an aligned address; of the targets
// every second starts elsewhere.
void digest_and_copy(std::span<const size_t> starts, std::span<const size_t> of_lengths) {
  std::mt19937_64 random(1);
  std::vector<Bytes> sources;
  std::vector<Bytes> targets;
  std::vector<DeviceChunk> chunks;
  for (size_t start : starts) {
    for (size_t length : of_lengths) {
      sources.emplace_back(start, length).fill(random);
      targets.emplace_back(chunks.size() % 2 == 0 ? start : 8 + random() % 8, length);
      chunks.push_back({sources.back().data(), length, targets.back().data()});
    }
  }
  const std::vector<uint8_t> expected = expected_digests(sources);
  std::vector<uint8_t> digests(expected.size());
  uint32_t queue = 7;
  require(digest_chunks(chunks.data(), chunks.size(), digests.data(), &queue, kStream));
  compare(digests, expected);
  digests.assign(digests.size(), 0);
  require(copy_digest_chunks(chunks.data(), chunks.size(), digests.data(), &queue, kStream));
  compare(digests, expected);
  for (size_t i = 0; i < chunks.size(); ++i) {
    require(memcmp(targets[i].data(), sources[i].data(), sources[i].size()) == 0, "a copy is wrong: of chunk",
            i);
  }
}

void list() {
  std::vector<DeviceRange> ranges;
  std::vector<DeviceChunk> expected;
  const auto at = [](uint64_t address) { return reinterpret_cast<uint8_t*>(address); };
  for (uint64_t i = 0; i < 250; ++i) {
    const DeviceRange range = {at(1'000'000 * (i + 1)), i == 130 ? 300'000 : i * 37 % 2000,
                               i % 2 ? at(i << 40) : nullptr};
    ranges.push_back(range);
    for (uint64_t start = 0; start < range.length; start += 1000) {
      expected.push_back({range.source + start, std::min<uint64_t>(1000, range.length - start),
                          range.target == nullptr ? nullptr : range.target + start});
    }
  }
  std::vector<DeviceChunk> chunks(expected.size());
  require(list_chunks(ranges, 1000, chunks.data(), kStream));
  for (size_t i = 0; i < chunks.size(); ++i) {
    require(chunks[i].source == expected[i].source && chunks[i].length == expected[i].length &&
                chunks[i].target == expected[i].target,
            "a listed chunk is wrong", i);
  }
}

void find_and_gather() {
  std::mt19937_64 random(2);
  constexpr size_t kCount = 300;  // not a multiple of a warp
  constexpr size_t kStride = 70'001;
  alignas(16) static uint8_t digests[kCount][kXxh3DigestBytes];
  alignas(16) static uint8_t known[kCount][kXxh3DigestBytes];
  std::vector<Bytes> sources, targets;
  std::vector<DeviceChunk> chunks;
  std::vector<bool> differs(kCount);
  for (size_t i = 0; i < kCount; ++i) {
    sources.emplace_back(8 + i % 16, i == 77 ? kStride : 1 + random() % 300).fill(random);
    targets.emplace_back(8 + (i / 16) % 16, sources[i].size());
    memset(targets[i].data(), 0xa5, targets[i].size());
    chunks.push_back({sources[i].data(), sources[i].size(), targets[i].data()});
    for (size_t byte = 0; byte < kXxh3DigestBytes; ++byte) {
      digests[i][byte] = known[i][byte] = static_cast<uint8_t>(random());
    }
    differs[i] = i == 77 || random() % 10 == 0;
    if (differs[i]) known[i][i % kXxh3DigestBytes] ^= 1;
  }
  std::vector<uint32_t> changed(kCount);
  uint32_t count = 99;
  require(find_changed(digests[0], known[0], kCount, changed.data(), &count, kStream));
  require(memcmp(digests, known, sizeof known) == 0, "the known digests are not brought up to date");
  std::vector<bool> found(kCount);
  for (uint32_t i = 0; i < count; ++i) {
    require(!found[changed[i]], "a chunk is listed twice", changed[i]);
    found[changed[i]] = true;
  }
  require(found == differs, "the list of changed chunks is wrong");

  const Bytes staging(8, count * kStride);
  require(gather_changed(chunks.data(), changed.data(), &count, kCount, staging.data(), kStride, kStream));
  for (uint32_t i = 0; i < count; ++i) {
    const Bytes& source = sources[changed[i]];
    require(memcmp(staging.data() + i * kStride, source.data(), source.size()) == 0,
            "a gathered chunk is wrong", i);
  }

  require(gather_changed(chunks.data(), changed.data(), &count, kCount, nullptr, kStride, kStream));
  for (size_t i = 0; i < kCount; ++i) {
    const uint8_t* target = targets[i].data();
    if (differs[i]) {
      require(memcmp(target, sources[i].data(), sources[i].size()) == 0, "a chunk is not in its place", i);
    } else {
      require(std::all_of(target, target + targets[i].size(), [](uint8_t byte) { return byte == 0xa5; }),
              "a chunk that did not change was written", i);
    }
  }
}

void read() {
  std::mt19937_64 random(3);
  Bytes data(0, (1 << 20) + 11);
  data.fill(random);
  uint64_t expected = 0;
  for (size_t i = 0; i < 1 << 20; i += 8) expected += load64(data.data() + i);
  for (size_t i = 1 << 20; i < data.size(); ++i) expected += data.data()[i];
  uint64_t sum = 5;
  require(read_memory(data.data(), data.size(), &sum, kStream));
  require(sum == expected, "the sum of what was read is wrong");
}

}  // namespace

int main() {
  alarm(900);  // a kernel that hangs ends the test
  // From 8 on AddressSanitizer sees a start that is rounded down.
  const std::vector<size_t> every = {0, 8, 9, 10, 12};
  digest_and_copy(every, lengths());
  const std::vector<size_t> aligned = {0};
  const std::vector<size_t> large = {(1 << 20) - 1, 1 << 20, (1 << 20) + 1};
  digest_and_copy(aligned, large);
  list();
  find_and_gather();
  read();
  puts("kernels_test: every kernel agrees");
}
