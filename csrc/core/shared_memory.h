// Memory with a name that outlives its process: a file in /dev/shm, which Linux keeps in memory.
#pragma once

#include <cstddef>
#include <string>

#include "status.h"

namespace dtruntime {

inline constexpr char kSharedMemoryFolder[] = "/dev/shm/";

// An open file there, or none. Closed when it is destroyed, and only then; the name stays until unlink().
// Not copied. Methods are for one thread at a time.
class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // Makes an empty one that only our user can open, and holds an exclusive flock on it until it is closed, by
  // the kernel if the process is killed: of a name that nobody holds the maker is dead. REQUIRES: none is
  // open. kInvalid for a name that is not [A-Za-z0-9._-]{1,200} or begins with a dot; kSystem, EEXIST if the
  // name is in use, EAGAIN if somebody took it for a dead one's before it was held. Nothing has changed then.
  Status create(const std::string& name);

  // Opens one that is there, and stores its size. REQUIRES: none is open. kInvalid as create() and for what
  // is no regular file; kSystem: ENOENT, EPERM if it belongs to another user.
  Status attach(const std::string& name, size_t* nbytes);

  // Changes its size; space for what is new is not reserved yet. REQUIRES: is_open().
  Status truncate(size_t nbytes);

  // Reserves space for its first bytes, so that writing there cannot fail later: for what populate_pages()
  // has not got yet. kSystem, ENOSPC if there is no room. REQUIRES: is_open().
  Status reserve(size_t nbytes);

  // Bytes that the system has handed out for it; 0 if it does not say. REQUIRES: is_open().
  size_t allocated() const;

  // ENOSPC if reserve() would surely fail: nobody is to fill the folder to its brim to find out.
  Status check_room(size_t nbytes) const;

  // Removes the name; the memory lives on until the last who has it lets go. kSystem, ENOENT if ours was
  // removed already, whatever bears the name now. REQUIRES: is_open().
  Status unlink();

  bool is_open() const { return file_ >= 0; }
  int file() const { return file_; }
  const std::string& name() const { return name_; }

 private:
  Status open(const std::string& name, int flags);
  Status hold();

  int file_ = -1;
  std::string name_;
};

}  // namespace dtruntime
