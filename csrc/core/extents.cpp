#include "extents.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "arena.h"
#include "bytes.h"

namespace dtruntime {
namespace {

constexpr size_t kLargestOffset = std::numeric_limits<int64_t>::max();

void cut_run(size_t start, size_t end, size_t request_bytes, bool whole_pages,
             std::vector<Request>& requests) {
  for (size_t at = start; at < end; at += request_bytes) {
    requests.push_back({at, std::min(request_bytes, end - at), whole_pages});
  }
}

}  // namespace

Status check_extents(std::span<const Extent> extents) {
  std::vector<Range> ranges;
  ranges.reserve(extents.size());
  for (const Extent& extent : extents) ranges.push_back({extent.offset, extent.length});
  for (size_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].offset > kLargestOffset || ranges[i].length > kLargestOffset - ranges[i].offset) {
      return Status::invalid("extent " + std::to_string(i) +
                             " ends after the last byte that a file can have");
    }
  }
  Status status = check_disjoint(ranges);
  if (!status.ok()) status.what = "in the file, " + status.what;
  return status;
}

ExtentMap::ExtentMap(std::span<const Extent> extents) {
  for (const Extent& extent : extents) {
    if (extent.length > 0) extents_.push_back(extent);
  }
  std::sort(extents_.begin(), extents_.end(),
            [](const Extent& a, const Extent& b) { return a.offset < b.offset; });
  size_t kept = 0;
  for (const Extent& extent : extents_) {
    end_ = extent.offset + extent.length;
    if (kept > 0) {
      Extent& before = extents_[kept - 1];
      if (before.offset + before.length == extent.offset && before.memory + before.length == extent.memory) {
        before.length += extent.length;
        continue;
      }
    }
    extents_[kept++] = extent;
  }
  extents_.resize(kept);
}

std::vector<Request> ExtentMap::cut(size_t request_bytes, size_t pages_from) const {
  std::vector<Request> requests;
  for (size_t i = 0; i < extents_.size();) {
    const size_t start = extents_[i].offset;
    size_t end = start;
    while (i < extents_.size() && extents_[i].offset == end) end += extents_[i++].length;

    const size_t first_page = round_up(start, kPageBytes);
    const size_t last_page = end - end % kPageBytes;
    if (last_page <= first_page || last_page - first_page < pages_from) {
      cut_run(start, end, request_bytes, false, requests);
    } else {
      cut_run(start, first_page, request_bytes, false, requests);
      cut_run(first_page, last_page, request_bytes, true, requests);
      cut_run(last_page, end, request_bytes, false, requests);
    }
  }
  return requests;
}

uint8_t* ExtentMap::find(size_t offset, size_t length) const {
  const Extent& extent = extents_[extent_at(offset)];
  const size_t inside = offset - extent.offset;
  return length <= extent.length - inside ? extent.memory + inside : nullptr;
}

void ExtentMap::gather(size_t offset, size_t length, uint8_t* target) const {
  for_each_piece(offset, length,
                 [&](uint8_t* memory, size_t at, size_t count) { memcpy(target + at, memory, count); });
}

void ExtentMap::scatter(size_t offset, size_t length, const uint8_t* source) const {
  for_each_piece(offset, length,
                 [&](uint8_t* memory, size_t at, size_t count) { memcpy(memory, source + at, count); });
}

// The last extent that starts at or before offset.
size_t ExtentMap::extent_at(size_t offset) const {
  const auto after =
      std::upper_bound(extents_.begin(), extents_.end(), offset,
                       [](size_t value, const Extent& extent) { return value < extent.offset; });
  return static_cast<size_t>(after - extents_.begin()) - 1;
}

// Calls copy(memory, bytes before it, bytes) for each piece of [offset, offset + length).
template <typename Copy>
void ExtentMap::for_each_piece(size_t offset, size_t length, Copy copy) const {
  size_t done = 0;
  for (size_t i = extent_at(offset); done < length; ++i) {
    const size_t inside = offset + done - extents_[i].offset;
    const size_t count = std::min(length - done, extents_[i].length - inside);
    copy(extents_[i].memory + inside, done, count);
    done += count;
  }
}

}  // namespace dtruntime
