#include "engine/arena.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "engine/fork.h"

// AddressSanitizer checks the exact bounds of memory from the allocator.
#if (defined(__unix__) || defined(__APPLE__)) && !defined(__SANITIZE_ADDRESS__)
#define RBLN_VAE_MAPS_ARENAS
#include <sys/mman.h>
#endif

namespace rbln_vae {
namespace {

constexpr std::size_t kPage = std::size_t{2} << 20;

[[noreturn]] void refuse(std::size_t bytes) {
  throw OutOfMemory("the system has no " + std::to_string((bytes >> 20) + 1) +
                    " MiB for this run: free memory, set memory_limit, or run a smaller image");
}

}  // namespace

#if defined(RBLN_VAE_MAPS_ARENAS)

Arena::Arena(std::size_t bytes) {
  if (bytes > SIZE_MAX - 2 * kPage) refuse(bytes);
  // Whole huge pages, plus one to align them: far fewer TLB misses and page faults.
  capacity_ = std::max(kPage, (bytes + kPage - 1) / kPage * kPage);
  void* mapped = mmap(nullptr, capacity_ + kPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) refuse(bytes);
  const auto begin = reinterpret_cast<std::uintptr_t>(mapped);
  const std::uintptr_t aligned = (begin + kPage - 1) / kPage * kPage;
  if (aligned != begin) munmap(mapped, aligned - begin);
  if (begin + kPage != aligned) {
    munmap(reinterpret_cast<void*>(aligned + capacity_), begin + kPage - aligned);
  }
  data_ = reinterpret_cast<std::byte*>(aligned);
#if defined(MADV_HUGEPAGE)
  madvise(data_, capacity_, MADV_HUGEPAGE);
#endif
}

Arena::~Arena() { munmap(data_, capacity_); }

#else

Arena::Arena(std::size_t bytes) : capacity_(bytes) {
  data_ = static_cast<std::byte*>(
      ::operator new(capacity_, std::align_val_t{64}, std::nothrow));
  if (data_ == nullptr) refuse(bytes);
  std::memset(data_, 0, capacity_);
}

Arena::~Arena() { ::operator delete(data_, std::align_val_t{64}); }

#endif

std::unique_ptr<Arena> ArenaPool::take(std::size_t bytes) {
  std::unique_ptr<Arena> too_small;  // freed after the lock
  {
    const std::lock_guard lock(fork_guard());
    // The smallest arena that is large enough.
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      if ((*it)->capacity() < bytes) continue;
      if (best == idle_.end() || (*it)->capacity() < (*best)->capacity()) best = it;
    }
    if (best == idle_.end() && !idle_.empty()) {
      too_small = std::move(idle_.back());
      idle_.pop_back();
    } else if (best != idle_.end()) {
      std::unique_ptr<Arena> arena = std::move(*best);
      idle_.erase(best);
      return arena;
    }
  }
  too_small.reset();
  return std::make_unique<Arena>(bytes);
}

void ArenaPool::give(std::unique_ptr<Arena> arena) noexcept {
  const std::lock_guard lock(fork_guard());
  try {
    idle_.push_back(std::move(arena));
  } catch (const std::bad_alloc&) {
    // No memory for the list: the arena is freed instead of kept.
  }
}

void ArenaPool::clear() {
  std::vector<std::unique_ptr<Arena>> freed;
  const std::lock_guard lock(fork_guard());
  freed.swap(idle_);
}

std::size_t ArenaPool::idle_bytes() const {
  const std::lock_guard lock(fork_guard());
  std::size_t total = 0;
  for (const auto& arena : idle_) total += arena->capacity();
  return total;
}

}  // namespace rbln_vae
