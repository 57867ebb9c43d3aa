#include "../../csrc/core/status.h"

#include <doctest/doctest.h>

#include <cerrno>

namespace dtruntime {
namespace {

TEST_CASE("status: one that nothing was said about is success") {
  const Status status;
  CHECK(status.ok());
  CHECK(status.code == Code::kOk);
  CHECK(status.error == 0);
  CHECK(status.what.empty());
}

TEST_CASE("status: each failure has its code and keeps what was said") {
  const Status invalid = Status::invalid("a"), end = Status::end_of_file("b"), device = Status::device("c");
  CHECK(invalid.code == Code::kInvalid);
  CHECK(invalid.what == "a");
  CHECK(end.code == Code::kEndOfFile);
  CHECK(end.what == "b");
  CHECK(device.code == Code::kDevice);
  CHECK(device.what == "c");
  for (const Status& status : {invalid, end, device}) {
    CHECK_FALSE(status.ok());
    CHECK(status.error == 0);
  }
}

TEST_CASE("status: a failed system call keeps its errno") {
  const Status status = Status::system(ENOSPC, "writing");
  CHECK_FALSE(status.ok());
  CHECK(status.code == Code::kSystem);
  CHECK(status.error == ENOSPC);
  CHECK(status.what == "writing");
}

}  // namespace
}  // namespace dtruntime
