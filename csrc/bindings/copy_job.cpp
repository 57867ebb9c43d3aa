#include "../core/copy_job.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <set>
#include <stdexcept>

#include "../core/xxh3.h"
#include "bindings.h"

namespace dtruntime::bindings {
namespace {

using Clock = CopyJob::Clock;
using Outcome = CopyJob::Outcome;

// How long Ctrl-C may have to wait.
constexpr auto kSlice = std::chrono::milliseconds(50);

// All that there are. Used under the GIL. Each is held by whoever cancels it too: its object may be deleted
// by another thread meanwhile.
std::set<std::shared_ptr<CopyJob>>& running() {
  static auto* jobs = new std::set<std::shared_ptr<CopyJob>>;
  return *jobs;
}

void check_known(const std::vector<uint8_t>& known, std::span<const Copy> copies, size_t chunk_bytes) {
  const size_t expected = kXxh3DigestBytes * ChunkList(targets_of(copies), chunk_bytes).size();
  if (known.size() == expected) return;
  throw py::value_error("known must hold " + std::to_string(expected) +
                        " bytes, 16 for each chunk, and holds " + std::to_string(known.size()));
}

std::optional<std::vector<uint8_t>> bytes_of(const std::optional<py::object>& object) {
  if (!object) return std::nullopt;
  const Buffer buffer(*object);
  return std::vector<uint8_t>(buffer.bytes().begin(), buffer.bytes().end());
}

// A job and its hold on the arena, which it lets go of once it has been seen to be done.
class CopyJobObject {
 public:
  CopyJobObject(py::handle arena, std::vector<Copy> copies, size_t chunk_bytes, unsigned threads,
                std::optional<std::vector<uint8_t>> known, bool hold) {
    buffer_.emplace(arena, Buffer::Access::kWrite);
    raise_if_failed(check_copies(buffer_->bytes(), copies, chunk_bytes));
    if (known) check_known(*known, copies, chunk_bytes);
    job_ = std::make_shared<CopyJob>(buffer_->bytes(), std::move(copies), chunk_bytes, threads,
                                     std::move(known).value_or(std::vector<uint8_t>{}), hold);
    running().insert(job_);
  }
  ~CopyJobObject() {
    cancel();
    running().erase(job_);
  }

  CopyJob& job() { return *job_; }

  bool done() {
    const bool all = job_->done();
    if (all) buffer_.reset();
    return all;
  }

  void cancel() {
    without_gil([&] { job_->cancel(); });
    buffer_.reset();
  }

 private:
  std::optional<Buffer> buffer_;
  std::shared_ptr<CopyJob> job_;
};

// When the interpreter ends it frees the sources in any order, and jobs perhaps never.
void cancel_all() {
  for (const std::shared_ptr<CopyJob>& job : std::set(running())) without_gil([&] { job->cancel(); });
}

std::unique_ptr<CopyJobObject> start(py::object arena, const std::vector<uintptr_t>& sources,
                                     const std::vector<int64_t>& lengths, const std::vector<int64_t>& offsets,
                                     int64_t chunk_bytes, int64_t threads,
                                     const std::optional<py::object>& known, bool hold) {
  if (!py::isinstance<ArenaObject>(arena)) throw py::type_error("the target must be an Arena");
  (void)find_variant(std::nullopt);  // refused here, and not by a thread that can tell nobody
  return std::make_unique<CopyJobObject>(arena, make_copies(sources, lengths, offsets),
                                         check_size(chunk_bytes, "chunk_bytes"), check_threads(threads),
                                         bytes_of(known), hold);
}

[[noreturn]] void raise_dead(Outcome outcome) {
  if (outcome == Outcome::kCancelled) throw std::runtime_error("the copy job was cancelled");
  throw std::runtime_error("the copy job runs in the process that this one was forked from, and never here");
}

// None means all of them.
std::vector<size_t> check_numbers(const std::optional<std::vector<int64_t>>& numbers, size_t count) {
  std::vector<size_t> checked(numbers ? numbers->size() : count);
  for (size_t i = 0; i < checked.size(); ++i) {
    const int64_t number = numbers ? (*numbers)[i] : static_cast<int64_t>(i);
    if (number < 0 || static_cast<size_t>(number) >= count)
      throw py::index_error("copy " + std::to_string(number) + " of " + std::to_string(count));
    checked[i] = static_cast<size_t>(number);
  }
  return checked;
}

bool wait(CopyJobObject& self, const std::optional<std::vector<int64_t>>& copies,
          std::optional<double> timeout, bool help) {
  const std::vector<size_t> numbers = check_numbers(copies, self.job().size());
  const Clock::time_point deadline = deadline_after(timeout);
  for (;;) {
    const Clock::time_point until = std::min(deadline, Clock::now() + kSlice);
    const Outcome outcome = without_gil([&] { return self.job().wait(numbers, until, help); });
    self.done();
    if (outcome == Outcome::kDone) return true;
    if (outcome != Outcome::kTimeout) raise_dead(outcome);
    if (Clock::now() >= deadline) return false;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

py::bytes digests(CopyJobObject& self) {
  if (!self.done()) {
    if (self.job().cancelled()) raise_dead(Outcome::kCancelled);
    throw py::value_error("the copy job is not done: " + std::to_string(self.job().nbytes_done()) + " of " +
                          std::to_string(self.job().nbytes()) + " bytes");
  }
  const auto bytes = self.job().digests();
  return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

}  // namespace

void bind_copy_job(py::module_& module) {
  py::class_<CopyJobObject>(module, "CopyJob")
      .def(py::init(&start), py::arg("arena"), py::arg("sources"), py::arg("lengths"), py::arg("offsets"),
           py::arg("chunk_bytes"), py::arg("threads") = 0, py::arg("known") = py::none(),
           py::arg("hold") = false)
      .def("release", [](CopyJobObject& self) { without_gil([&] { self.job().release(); }); })
      .def("wait", &wait, py::arg("copies") = py::none(), py::arg("timeout") = py::none(),
           py::arg("help") = true)
      .def("cancel", &CopyJobObject::cancel)
      .def("digests", &digests)
      .def_property_readonly("done", &CopyJobObject::done)
      .def_property_readonly("nbytes", [](CopyJobObject& self) { return self.job().nbytes(); })
      .def_property_readonly("nbytes_done", [](CopyJobObject& self) { return self.job().nbytes_done(); })
      .def_property_readonly("nbytes_copied", [](CopyJobObject& self) { return self.job().nbytes_copied(); })
      .def_property_readonly("chunks_skipped",
                             [](CopyJobObject& self) { return self.job().chunks_skipped(); });
  py::module_::import("atexit").attr("register")(py::cpp_function(&cancel_all));
}

}  // namespace dtruntime::bindings
