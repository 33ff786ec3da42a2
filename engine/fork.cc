#include "engine/fork.h"

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace rbln_vae {
namespace {

std::mutex guard;
std::atomic<int> count{0};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(
    [] { guard.lock(); }, [] { guard.unlock(); },
    [] {
      ++count;
      guard.unlock();
    });
#endif

}  // namespace

std::mutex& fork_guard() { return guard; }

int forks() { return count.load(std::memory_order_relaxed); }

}  // namespace rbln_vae
