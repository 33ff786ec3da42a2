// Blocks of memory for runs, kept for the next one.
#pragma once

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace rbln_vae {

// Memory can't be had; the message says how much was wanted.
class OutOfMemory : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Arena {
 public:
  explicit Arena(std::size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* data() const { return data_; }
  std::size_t capacity() const { return capacity_; }

 private:
  std::byte* data_;
  std::size_t capacity_;
};

// Thread-safe, in a forked child too. Gives each run an arena of its own; an arena that is too
// large for what is asked is given too, one that is too small is freed before a larger one is
// made.
class ArenaPool {
 public:
  ArenaPool() = default;
  ArenaPool(const ArenaPool&) = delete;
  ArenaPool& operator=(const ArenaPool&) = delete;

  std::unique_ptr<Arena> take(std::size_t bytes);
  void give(std::unique_ptr<Arena> arena) noexcept;
  // Frees what isn't in use.
  void clear();
  // Bytes of arenas that wait for a run.
  std::size_t idle_bytes() const;

 private:
  std::vector<std::unique_ptr<Arena>> idle_;  // guarded by fork_guard()
};

}  // namespace rbln_vae
