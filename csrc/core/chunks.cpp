#include "chunks.h"

#include <algorithm>
#include <string>

#include "bytes.h"

namespace dtruntime {
namespace {

std::string describe(size_t index, Range range) {
  return "range " + std::to_string(index) + " [" + std::to_string(range.offset) + ", +" +
         std::to_string(range.length) + ")";
}

}  // namespace

ChunkList::ChunkList(std::span<const Range> ranges, size_t chunk_bytes)
    : ranges_(ranges), chunk_bytes_(chunk_bytes), first_{0} {
  first_.reserve(ranges.size() + 1);
  for (const Range& range : ranges) {
    first_.push_back(first_.back() + divide_up(range.length, chunk_bytes));
    nbytes_ += range.length;
  }
}

Chunk ChunkList::operator[](size_t index) const {
  // The last range that starts at or before the chunk: empty ranges start where their successor does.
  const size_t range = std::upper_bound(first_.begin(), first_.end(), index) - first_.begin() - 1;
  const size_t start = (index - first_[range]) * chunk_bytes_;
  return {range, start, std::min(chunk_bytes_, ranges_[range].length - start)};
}

Status check_ranges(std::span<const Range> ranges, size_t nbytes, size_t chunk_bytes) {
  if (chunk_bytes == 0) return Status::invalid("chunk_bytes must be at least 1");
  for (size_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].offset > nbytes || ranges[i].length > nbytes - ranges[i].offset) {
      return Status::invalid(describe(i, ranges[i]) + " ends after the " + std::to_string(nbytes) +
                             " bytes of the buffer");
    }
  }
  return {};
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

}  // namespace dtruntime
