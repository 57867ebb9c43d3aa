// What a call of this core reports: success, or one of four failures.
#pragma once

#include <string>
#include <utility>

namespace dtruntime {

enum class Code {
  kOk,
  kInvalid,    // an argument is out of range; nothing was touched
  kEndOfFile,  // a file holds fewer bytes than were asked for
  kSystem,     // a system call failed; `error` is its errno
  kDevice,     // the accelerator's runtime failed or is missing; `what` has its own words
};

// A value; owns its text. Safe to copy between threads.
struct [[nodiscard]] Status {
  Code code = Code::kOk;
  int error = 0;     // errno, for kSystem only
  std::string what;  // what was being done, for a human; empty for kOk

  bool ok() const { return code == Code::kOk; }

  static Status invalid(std::string what) { return {Code::kInvalid, 0, std::move(what)}; }
  static Status end_of_file(std::string what) { return {Code::kEndOfFile, 0, std::move(what)}; }
  static Status device(std::string what) { return {Code::kDevice, 0, std::move(what)}; }
  static Status system(int error, std::string what) { return {Code::kSystem, error, std::move(what)}; }
};

}  // namespace dtruntime
