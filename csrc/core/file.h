// One open file, by the calls of system_calls.h. Every failure is reported as kSystem with the step in words.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <string>

#include "status.h"

namespace dtruntime {

// Owns its descriptor. Const methods may be called from any thread.
class File {
 public:
  File() = default;
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Opens for writing a file that this call makes: EEXIST if there is something at `path`, a link included.
  Status create(const char* path);

  // Opens a regular file for reading and stores its size. kInvalid if it is none.
  Status open_to_read(const char* path, size_t& size);

  // Opens a folder, which can only be synced.
  Status open_folder(const char* path);

  // Gives the file its length, which reads as zeros, and disk space for all of it. A file system that
  // reserves nothing only sets the length.
  Status reserve(size_t nbytes) const;

  // False where the file system refuses it. Changes the open file, so nothing else may be using it.
  bool set_direct(bool on) const;

  // As pread and pwrite of the C library: fewer bytes, or -1 and errno.
  ssize_t write(const void* data, size_t length, size_t offset) const;
  ssize_t read(void* data, size_t length, size_t offset) const;

  // Makes the bytes, or a folder's names, durable. After a failure they must be taken for lost: see file.cpp.
  Status sync() const;

  // Some file systems report a failed write only here. The descriptor is gone whatever is reported.
  Status close();

 private:
  Status opened(int fd, const char* step);

  int fd_ = -1;
};

// The folder that holds `path`.
std::string folder_of(const char* path);

}  // namespace dtruntime
