#include "copy_job.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "xxh3.h"

namespace dtruntime {

CopyJob::Helping::Helping(Shared& shared) : shared_(shared) {
  std::lock_guard lock(shared_.mutex);
  ++shared_.helpers;
}

CopyJob::Helping::~Helping() {
  std::lock_guard lock(shared_.mutex);
  if (--shared_.helpers == 0) shared_.changed.notify_all();
}

CopyJob::CopyJob(std::span<uint8_t> arena, std::vector<Copy> copies, size_t chunk_bytes, unsigned threads,
                 std::vector<uint8_t> known, bool hold)
    : arena_(arena),
      copies_(std::move(copies)),
      targets_(targets_of(copies_)),
      chunks_(targets_, chunk_bytes),
      chunk_bytes_(chunk_bytes),
      stores_(stores_for(chunks_.nbytes())),
      known_(std::move(known)),
      digests_(chunks_.size() * kXxh3DigestBytes),
      progress_(copies_.size()) {
  for (size_t copy = 0; copy < size(); ++copy) progress_[copy].left = chunks_of(copy);
  if (threads == 0) threads = default_threads();
  const size_t useful = std::min<size_t>({threads, kMostThreads, chunks_.size()});
  helping_ = static_cast<unsigned>(std::min(useful, chunks_.nbytes() / kBytesPerThread + 1));
  shared_.reset(new Shared{{[this] { do_all(); }, static_cast<unsigned>(useful)}});
  if (!hold) release();
}

void CopyJob::release() {
  if (forked()) return;
  std::lock_guard lock(shared_->mutex);
  if (shared_->offered || cancelled_ || shared_->work.wanted == 0) return;
  ThreadPool::of(Priority::kLow).offer(shared_->work);
  shared_->offered = true;
}

bool CopyJob::has_threads() {
  std::lock_guard lock(shared_->mutex);
  return shared_->offered && ThreadPool::of(Priority::kLow).workers() > 0;
}

CopyJob::~CopyJob() {
  if (forked()) {
    (void)shared_.release();
  } else {
    cancel();
  }
}

CopyJob::Outcome CopyJob::wait(std::span<const size_t> numbers, Clock::time_point deadline, bool help) {
  size_t at = 0;  // all before it are done
  const auto all_done = [&] {
    while (at < numbers.size() && finished(numbers[at])) ++at;
    return at == numbers.size();
  };
  if (all_done()) return Outcome::kDone;
  if (forked()) return Outcome::kForked;
  if (help || !has_threads()) {
    const Helping helping(*shared_);
    // One thread a task, so that each goes through all of them.
    parallel_for(helping_, helping_, [&](size_t) {
      for (const size_t copy : numbers) do_chunks(copy, deadline);
    });
  }
  std::unique_lock lock(shared_->mutex);
  shared_->changed.wait_until(lock, deadline, [&] { return all_done() || cancelled_; });
  if (all_done()) return Outcome::kDone;
  return cancelled_ ? Outcome::kCancelled : Outcome::kTimeout;
}

bool CopyJob::done() const {
  for (size_t copy = 0; copy < size(); ++copy) {
    if (!finished(copy)) return false;
  }
  return true;
}

void CopyJob::cancel() {
  if (forked()) {
    cancelled_ = true;
    return;
  }
  {
    std::lock_guard lock(shared_->mutex);
    cancelled_ = true;  // from here on release() does nothing
  }
  ThreadPool::of(Priority::kLow).withdraw(shared_->work);
  std::unique_lock lock(shared_->mutex);
  shared_->changed.notify_all();
  shared_->changed.wait(lock, [&] { return shared_->helpers == 0; });
}

void CopyJob::do_all() {
  for (size_t copy = 0; copy < size() && !cancelled_; ++copy) do_chunks(copy, Clock::time_point::max());
}

void CopyJob::do_chunks(size_t copy, Clock::time_point deadline) {
  const size_t count = chunks_of(copy);
  while (!cancelled_ && Clock::now() < deadline) {
    const size_t index = progress_[copy].next.fetch_add(1, std::memory_order_relaxed);
    if (index >= count) return;
    do_chunk(copy, index);
  }
}

void CopyJob::do_chunk(size_t copy, size_t index) {
  const size_t start = index * chunk_bytes_;
  const size_t length = std::min(chunk_bytes_, targets_[copy].length - start);
  const uint8_t* source = copies_[copy].source + start;
  const size_t chunk = chunks_.first_of(copy) + index;
  if (is_there(source, length, chunk)) {
    chunks_skipped_.fetch_add(1, std::memory_order_relaxed);
  } else {
    // Digests again, in the pass that copies: the source may have changed since it was looked at.
    copy_digest_chunk(arena_.data() + targets_[copy].offset + start, source, length,
                      digests_.data() + chunk * kXxh3DigestBytes, stores_);
    nbytes_copied_.fetch_add(length, std::memory_order_relaxed);
  }
  nbytes_done_.fetch_add(length, std::memory_order_relaxed);
  if (progress_[copy].left.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  std::lock_guard lock(shared_->mutex);
  shared_->changed.notify_all();
}

bool CopyJob::is_there(const uint8_t* source, size_t length, size_t chunk) {
  if (known_.empty()) return false;
  uint8_t* digest = digests_.data() + chunk * kXxh3DigestBytes;
  digest_chunk(source, length, digest);
  return memcmp(digest, known_.data() + chunk * kXxh3DigestBytes, kXxh3DigestBytes) == 0;
}

}  // namespace dtruntime
