#include "xxh3_dispatch.h"

#include <cstdlib>
#include <string>
#include <vector>

namespace dtruntime {
namespace {

constexpr const char* kVariable = "DTRUNTIME_DIGEST_IMPL";

constexpr const Xxh3Variant* kWidestFirst[] = {
#if defined(__x86_64__)
    &kXxh3Avx512,
    &kXxh3Avx2,
#elif defined(__aarch64__)
    &kXxh3Neon,
#endif
    &kXxh3Scalar,
};

struct Choice {
  const Xxh3Variant* variant = xxh3_variants().front();
  Status status;

  explicit Choice(const char* wanted) {
    if (wanted == nullptr || *wanted == '\0') return;
    status = find_xxh3_variant(wanted, variant);
    if (!status.ok()) status.what = std::string(kVariable) + " must be changed or unset: " + status.what;
  }
};

const Choice& choice() {
  static const Choice made(std::getenv(kVariable));
  return made;
}

}  // namespace

std::span<const Xxh3Variant* const> xxh3_variants() {
  static const auto* const found = [] {
    auto* variants = new std::vector<const Xxh3Variant*>;  // lives as long as threads that outlive main()
    for (const Xxh3Variant* variant : kWidestFirst) {
      if (variant->runs_here()) variants->push_back(variant);
    }
    return variants;
  }();
  return *found;
}

Status find_xxh3_variant(std::string_view name, const Xxh3Variant*& variant) {
  std::string names;
  for (const Xxh3Variant* candidate : xxh3_variants()) {
    if (candidate->name == name) {
      variant = candidate;
      return {};
    }
    names += (names.empty() ? "" : ", ") + std::string(candidate->name);
  }
  return Status::invalid("this machine has no digest variant '" + std::string(name) +
                         "'; choose one of: " + names);
}

const Xxh3Variant& xxh3_variant() { return *choice().variant; }

Status check_xxh3_variant() { return choice().status; }

}  // namespace dtruntime
