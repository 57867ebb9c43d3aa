// The XXH3 block loop in variants for the instruction sets of this processor, and the choice among them.
//
// All variants give the same digests; they differ in speed alone. Everything here may be called from any
// thread and throws nothing but std::bad_alloc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "status.h"
#include "xxh3.h"

namespace dtruntime {

// Adds `stripes` stripes at `source`, of any alignment, to `lanes`, and scrambles after each 16:
// xxh3_full_stripes(length) of an input, at once or in pieces of which each but the last holds whole blocks.
// `lanes.finish_last` follows.
using Xxh3Loop = void (*)(Xxh3Lanes& lanes, const uint8_t* source, size_t stripes, uint8_t* target);

struct Xxh3Variant {
  const char* name;
  bool (*runs_here)();

  // Ignores `target`.
  Xxh3Loop add;
  // Stores at `target`, of any alignment, what it adds: each byte is read from `source` once, so that the
  // lanes describe what arrived even if the source is written meanwhile. REQUIRES: source and target do not
  // overlap.
  Xxh3Loop copy;
  // The same past the caches, and in order with what the thread stores afterwards. REQUIRES: target is a
  // multiple of 64. Null if the instruction set has no such stores.
  Xxh3Loop stream;
};

// Each in the file of its name.
extern const Xxh3Variant kXxh3Avx512, kXxh3Avx2, kXxh3Neon, kXxh3Scalar;

// Those that run on this machine, widest first; "scalar", the last, always does.
std::span<const Xxh3Variant* const> xxh3_variants();

// Stores the variant of that name. kInvalid, with the names to choose from, if there is none here.
Status find_xxh3_variant(std::string_view name, const Xxh3Variant*& variant);

// The variant of this process: the one that DTRUNTIME_DIGEST_IMPL names, if it is set and not empty, else the
// widest. The variable is read once, at the first call of either function.
const Xxh3Variant& xxh3_variant();

// kInvalid, with the names to choose from, if DTRUNTIME_DIGEST_IMPL names none that runs here. xxh3_variant()
// is the widest then: who lets a user in checks this first.
Status check_xxh3_variant();

}  // namespace dtruntime
