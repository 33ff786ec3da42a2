// Blocks of memory for runs, which are kept for later runs.
#pragma once

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace rbln_vae {

// The system has not enough memory; the message says how much was requested.
class OutOfMemory : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// It begins as zeros.
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

// Gives each run its own arena. Reuses the smallest kept arena that is large enough; if there is
// none, frees a kept arena and makes a new one. Thread-safe, also in a forked child.
class ArenaPool {
 public:
  ArenaPool() = default;
  ArenaPool(const ArenaPool&) = delete;
  ArenaPool& operator=(const ArenaPool&) = delete;

  std::unique_ptr<Arena> take(std::size_t bytes);
  void give(std::unique_ptr<Arena> arena) noexcept;
  // Frees all arenas that are not in use.
  void clear();
  // The bytes of arenas that are not in use.
  std::size_t idle_bytes() const;

 private:
  std::vector<std::unique_ptr<Arena>> idle_;  // guarded by fork_guard()
};

}  // namespace rbln_vae
