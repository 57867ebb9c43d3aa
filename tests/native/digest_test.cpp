#include "../../csrc/core/digest.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/core/xxh3.h"
#include "../../csrc/core/xxh3_dispatch.h"
#include "heap_block.h"
#include "vectors.h"

namespace dtruntime {
namespace {

// Byte i is i % 251, as in the vectors.
HeapBlock pattern(size_t length, size_t shift = 0) {
  static const std::vector<uint8_t> bytes = [] {
    std::vector<uint8_t> made(4 << 20);
    for (size_t i = 0; i < made.size(); ++i) made[i] = static_cast<uint8_t>(i % 251);
    return made;
  }();
  REQUIRE(length <= bytes.size());
  HeapBlock block(length, shift);
  memcpy(block.data(), bytes.data(), length);
  return block;
}

std::string hex(const HeapBlock& bytes) {
  std::string text;
  for (size_t i = 0; i < bytes.size(); ++i) {
    for (int nibble : {bytes.data()[i] >> 4, bytes.data()[i] & 15}) text += "0123456789abcdef"[nibble];
  }
  return text;
}

// ---- all ways to the digests of one buffer's chunks ----------------------------------------------------

HeapBlock room_for_digests(const HeapBlock& data, size_t chunk_bytes) {
  return HeapBlock(divide_up(data.size(), chunk_bytes) * kXxh3DigestBytes);
}

// Calls digest(chunk, its length, where its digest goes) chunk by chunk.
template <typename Digest>
HeapBlock chunk_by_chunk(const HeapBlock& data, size_t chunk_bytes, Digest digest) {
  HeapBlock digests = room_for_digests(data, chunk_bytes);
  uint8_t* place = digests.data();
  for (size_t start = 0; start < data.size(); start += std::min(chunk_bytes, data.size() - start)) {
    digest(data.data() + start, std::min(chunk_bytes, data.size() - start), place);
    place += kXxh3DigestBytes;
  }
  return digests;
}

// What host and device share: the other ways must agree with it.
HeapBlock by_definition(const HeapBlock& data, size_t chunk_bytes) {
  return chunk_by_chunk(data, chunk_bytes, [](const uint8_t* chunk, size_t length, uint8_t* digest) {
    xxh3_store(xxh3_128(chunk, length), digest);
  });
}

HeapBlock by_digest_chunk(const HeapBlock& data, size_t chunk_bytes) {
  return chunk_by_chunk(data, chunk_bytes, [](const uint8_t* chunk, size_t length, uint8_t* digest) {
    digest_chunk(chunk, length, digest);
  });
}

HeapBlock by_ranges(const HeapBlock& data, size_t chunk_bytes, unsigned threads, const Xxh3Variant& variant) {
  HeapBlock digests = room_for_digests(data, chunk_bytes);
  const Range all = {0, data.size()};
  const std::span bytes = {data.data(), data.size()};
  REQUIRE(digest_ranges(bytes, {&all, 1}, chunk_bytes, threads, digests.data(), variant).ok());
  return digests;
}

HeapBlock by_copying(const HeapBlock& data, size_t chunk_bytes, Stores stores, const Xxh3Variant& variant) {
  // Another alignment than the source's.
  HeapBlock target(data.size(), (data.shift() * 5 + 3) % 64), digests = room_for_digests(data, chunk_bytes);
  const Copy copy = {data.data(), {0, data.size()}};
  const std::span arena = {target.data(), target.size()};
  REQUIRE(copy_digest(arena, {&copy, 1}, chunk_bytes, 3, digests.data(), stores, variant).ok());
  REQUIRE(target == data);
  return digests;
}

struct Way {
  std::string name;
  std::function<HeapBlock(const HeapBlock& data, size_t chunk_bytes)> digests;
};

std::vector<Way> all_ways() {
  std::vector<Way> ways = {{"xxh3_128", by_definition}, {"digest_chunk", by_digest_chunk}};
  for (const Xxh3Variant* variant : xxh3_variants()) {
    const std::string by = std::string(" by ") + variant->name;
    for (unsigned threads : {1, 3}) {
      ways.push_back({"digest_ranges on " + std::to_string(threads) + " threads" + by,
                      [=](const HeapBlock& data, size_t chunk_bytes) {
                        return by_ranges(data, chunk_bytes, threads, *variant);
                      }});
    }
    for (Stores stores : {Stores::kPlain, Stores::kStream}) {
      ways.push_back({(stores == Stores::kPlain ? "copy_digest" : "streaming copy_digest") + by,
                      [=](const HeapBlock& data, size_t chunk_bytes) {
                        return by_copying(data, chunk_bytes, stores, *variant);
                      }});
    }
  }
  return ways;
}

TEST_CASE("digest: the golden vectors hold") {
  REQUIRE_FALSE(vectors::kWhole.empty());
  REQUIRE_FALSE(vectors::kChunked.empty());
  for (const Way& way : all_ways()) {
    CAPTURE(way.name);
    for (const vectors::Whole& expected : vectors::kWhole) {
      CAPTURE(expected.length);
      if (expected.length == 0) continue;  // no chunk, no digest: below
      CHECK(hex(way.digests(pattern(expected.length), SIZE_MAX)) == expected.digest);
    }
    for (const vectors::Chunked& expected : vectors::kChunked) {
      CAPTURE(expected.length);
      CAPTURE(expected.chunk_bytes);
      CHECK(hex(way.digests(pattern(expected.length), expected.chunk_bytes)) == expected.digests);
    }
  }
}

TEST_CASE("digest: every way gives the same at each boundary and alignment") {
  const std::vector<Way> ways = all_ways();
  for (size_t length : vectors::kLengths) {
    for (size_t chunk_bytes : {size_t{1000}, size_t{4096}, size_t{1} << 20}) {
      const HeapBlock expected = by_definition(pattern(length), chunk_bytes);
      for (size_t shift : {0, 1, 8, 63}) {
        const HeapBlock data = pattern(length, shift);
        for (const Way& way : ways) {
          CAPTURE(way.name);
          CAPTURE(length);
          CAPTURE(chunk_bytes);
          CAPTURE(shift);
          CHECK(way.digests(data, chunk_bytes) == expected);
        }
      }
    }
  }
}

TEST_CASE("digest: nothing has the digest that the vectors say, also by a null pointer") {
  const vectors::Whole& nothing = vectors::kWhole.front();
  REQUIRE(nothing.length == 0);
  HeapBlock digested(kXxh3DigestBytes), copied(kXxh3DigestBytes);
  digest_chunk(nullptr, 0, digested.data());
  copy_digest_chunk(nullptr, nullptr, 0, copied.data());
  CHECK(hex(digested) == nothing.digest);
  CHECK(hex(copied) == nothing.digest);
}

TEST_CASE("digest: what is refused stores nothing") {
  const HeapBlock source = pattern(100);
  HeapBlock arena(100), digests(kXxh3DigestBytes * 100);
  const HeapBlock arena_before = arena, digests_before = digests;
  const std::span<uint8_t> bytes = {arena.data(), arena.size()};
  const std::vector<Range> beyond = {{0, 50}, {60, 41}};
  CHECK(digest_ranges(bytes, beyond, 10, 2, digests.data()).code == Code::kInvalid);
  CHECK(digest_ranges(bytes, {}, 0, 2, digests.data()).code == Code::kInvalid);
  const std::vector<Copy> bad[] = {
      {{source.data(), {0, 50}}, {source.data(), {60, 41}}},
      {{source.data(), {0, 50}}, {source.data(), {49, 2}}},
      {{source.data(), {0, 50}}, {nullptr, {60, 1}}},
  };
  for (const auto& copies : bad) {
    CHECK(check_copies(bytes, copies, 10).code == Code::kInvalid);
    CHECK(copy_digest(bytes, copies, 10, 2, digests.data()).code == Code::kInvalid);
  }
  CHECK(arena == arena_before);
  CHECK(digests == digests_before);
}

TEST_CASE("digest: a copy leaves what is beside its target") {
  const HeapBlock source = pattern(5000, 1);
  HeapBlock arena(20'000), digests(kXxh3DigestBytes * 4);
  HeapBlock expected = arena;
  memcpy(expected.data() + 10'003, source.data(), 5000);
  memcpy(expected.data() + 1, source.data(), 700);
  const std::vector<Copy> copies = {
      {source.data(), {10'003, 5000}}, {nullptr, {0, 0}}, {source.data(), {1, 700}}};
  REQUIRE(copy_digest({arena.data(), arena.size()}, copies, 4096, 2, digests.data()).ok());
  CHECK(arena == expected);
}

TEST_CASE("digest: random lengths, alignments, chunks and ranges, in blocks of exactly that size") {
#if defined(__SANITIZE_THREAD__)
  constexpr int kRounds = 1000;  // twenty times slower there, and no place for reads past the end
#else
  constexpr int kRounds = 20'000;
#endif
  const uint32_t wanted = doctest::getContextOptions()->rand_seed;
  const uint32_t seed = wanted != 0 ? wanted : std::random_device()();  // --rand-seed=N repeats a run
  CAPTURE(seed);
  const std::vector<Way> ways = all_ways();
  std::mt19937 random(seed);
  std::vector<uint8_t> noise(256 << 10);
  for (uint8_t& byte : noise) byte = static_cast<uint8_t>(random());
  const auto below = [&](size_t end) { return std::uniform_int_distribution<size_t>(0, end - 1)(random); };
  for (int round = 0; round < kRounds; ++round) {
    // Each magnitude alike: most paths belong to short data.
    const size_t length = below((size_t{1} << below(18)) + 1);
    const size_t chunk_bytes = length / 1000 + 1 + below(2 * length + 1);
    HeapBlock data(length, below(64));
    memcpy(data.data(), noise.data() + below(noise.size() - length + 1), length);
    CAPTURE(length);
    CAPTURE(chunk_bytes);
    CAPTURE(data.shift());
    const HeapBlock expected = by_definition(data, chunk_bytes);
    for (const Way& way : ways) {
      CAPTURE(way.name);
      REQUIRE(way.digests(data, chunk_bytes) == expected);
    }
  }
}

}  // namespace
}  // namespace dtruntime
