#include "engine/thread_pool.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>
#include <utility>

#include "engine/denormals.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace rbln_vae {
namespace {

// In place of an item's number while the leader prepares a phase.
constexpr std::uint32_t kClosed = 0xffffffffu;

// How often a thread looks before it sleeps: some tens of microseconds, longer than most
// phases take to follow each other.
constexpr int kLooks = 2000;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

std::uint64_t packed(std::uint32_t phase, std::uint32_t item) {
  return (std::uint64_t{phase} << 32) | item;
}

}  // namespace

ThreadPool::Run::Run(ThreadPool& pool, Work work)
    : in_use_(static_cast<std::size_t>(pool.threads()), false), pool_(pool),
      work_(std::move(work)) {
  next_ = packed(0, kClosed);
  in_use_[0] = true;
  {
    const std::lock_guard lock(pool_.mutex_);
    pool_.runs_.push_back(this);
    ++pool_.active_;
  }
  pool_.wake_.notify_all();
}

ThreadPool::Run::~Run() {
  finished_ = true;
  next_ = packed(phase_ + 1, kClosed);
  next_.notify_all();
  std::unique_lock lock(pool_.mutex_);
  std::erase(pool_.runs_, this);
  --pool_.active_;
  if (!pool_.runs_.empty()) pool_.wake_.notify_all();
  pool_.left_.wait(lock, [this] { return helpers_ == 0; });
}

bool ThreadPool::Run::take(std::uint32_t& phase, std::int64_t& item) {
  std::uint64_t seen = next_.load();
  for (;;) {
    const auto number = static_cast<std::uint32_t>(seen);
    if (number == kClosed || number >= items_.load()) return false;
    if (next_.compare_exchange_weak(seen, seen + 1)) {
      phase = static_cast<std::uint32_t>(seen >> 32);
      item = number;
      return true;
    }
  }
}

void ThreadPool::Run::do_item(std::uint32_t phase, std::int64_t item, int slot) {
  // Phases count from one; zero is the time before the first.
  work_(phase - 1, item, slot);
  // items_ can't change before the last item of the phase is counted.
  const std::int64_t items = items_.load();
  if (done_.fetch_add(1) + 1 == items) done_.notify_all();
}

bool ThreadPool::Run::phase(std::int64_t items,
                            std::chrono::steady_clock::time_point deadline) {
  ++phase_;
  next_ = packed(phase_, kClosed);
  items_ = items;
  done_ = 0;
  next_ = packed(phase_, 0);
  if (items > 1) next_.notify_all();
  std::uint32_t phase;
  std::int64_t item;
  bool late = false;
  while (!late && take(phase, item)) {
    do_item(phase, item, 0);
    late = std::chrono::steady_clock::now() >= deadline;
  }
  if (late) {
    // Nobody takes another item; those that were taken are waited for.
    const std::uint64_t seen = next_.exchange(packed(phase_, kClosed));
    items = std::min<std::int64_t>(items, static_cast<std::uint32_t>(seen));
  }
  for (int look = 0;; ++look) {
    const std::int64_t done = done_.load();
    if (done >= items) break;
    if (look < kLooks || late) {
      pause();
      if (look >= kLooks) std::this_thread::yield();
    } else {
      done_.wait(done);
    }
  }
  return !late || items == items_.load();
}

void ThreadPool::Run::help(int slot) {
  int looks = 0;
  while (!finished_.load()) {
    const std::uint64_t seen = next_.load();
    std::uint32_t phase;
    std::int64_t item;
    if (take(phase, item)) {
      do_item(phase, item, slot);
      looks = 0;
      continue;
    }
    if (pool_.crowded()) return;
    if (++looks < kLooks) {
      pause();
    } else if (!finished_.load()) {
      next_.wait(seen);
      looks = 0;
    }
  }
}

ThreadPool::ThreadPool(int threads) : threads_(std::max(1, threads)) {
  for (int i = 1; i < threads_; ++i) workers_.emplace_back([this] { work(); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

ThreadPool::Run* ThreadPool::joinable() {
  if (active_.load() >= threads_) return nullptr;
  Run* best = nullptr;
  for (Run* run : runs_) {
    if (run->helpers_ + 1 >= threads_ || run->finished_.load()) continue;
    if (best == nullptr || run->helpers_ < best->helpers_) best = run;
  }
  return best;
}

void ThreadPool::work() {
  const FlushDenormals flush;
  std::unique_lock lock(mutex_);
  for (;;) {
    Run* run = nullptr;
    wake_.wait(lock, [&] { return stopping_ || (run = joinable()) != nullptr; });
    if (stopping_) return;
    const auto free = std::find(run->in_use_.begin(), run->in_use_.end(), false);
    const auto slot = static_cast<std::size_t>(free - run->in_use_.begin());
    run->in_use_[slot] = true;
    ++run->helpers_;
    ++active_;
    lock.unlock();
    run->help(static_cast<int>(slot));
    lock.lock();
    run->in_use_[slot] = false;
    --active_;
    if (--run->helpers_ == 0) left_.notify_all();
  }
}

int usable_processors() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) count = CPU_COUNT(&mask);
  // "quota period" in microseconds; "max" where there is no quota.
  std::string quota;
  double period = 0;
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  if (file >> quota >> period && quota != "max" && period > 0) {
    const int share = static_cast<int>(std::ceil(std::stod(quota) / period));
    count = std::min(count, std::max(1, share));
  }
#endif
  return std::max(1, count);
}

}  // namespace rbln_vae
