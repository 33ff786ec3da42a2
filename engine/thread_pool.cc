#include "engine/thread_pool.h"

#include <algorithm>
#include <map>
#include <string>
#include <system_error>
#include <utility>

#include "engine/float_control.h"
#include "engine/fork.h"

namespace rbln_vae {
namespace {

// How often a thread polls before it sleeps. That takes some tens of microseconds, longer than
// the time between most phases.
constexpr int kLooks = 2000;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

std::uint64_t packed(std::uint64_t phase, std::uint64_t items) { return (phase << 32) | items; }
std::uint32_t phase_of(std::uint64_t count) { return static_cast<std::uint32_t>(count >> 32); }
std::uint32_t items_of(std::uint64_t count) { return static_cast<std::uint32_t>(count); }

// The pools of this process by their number of threads; guarded by fork_guard().
std::map<int, std::weak_ptr<ThreadPool>>& pools() {
  static std::map<int, std::weak_ptr<ThreadPool>> list;
  return list;
}

}  // namespace

std::vector<std::thread> start_threads(int count, const std::function<void()>& work,
                                       const std::function<void()>& stop) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<std::size_t>(std::max(0, count)));
  try {
    for (int i = 0; i < count; ++i) threads.emplace_back(work);
  } catch (const std::system_error& error) {
    stop();
    for (std::thread& each : threads) each.join();
    throw ThreadsUnavailable(std::to_string(count) + " threads were wanted besides the caller's, "
                             "and the system gave " + std::to_string(threads.size()) + " (" +
                             error.code().message() + ")");
  }
  return threads;
}

ThreadPool::Run::Run(ThreadPool& pool, Watch& watch, Work work)
    : shares_(static_cast<std::size_t>(pool.threads())),
      in_use_(static_cast<std::size_t>(pool.threads()), false), pool_(pool), watch_(watch),
      work_(std::move(work)) {
  in_use_[0] = true;
  std::unique_lock lock(pool_.mutex_);
  pool_.runs_.push_back(this);
  leading_ = pool_.wait_turn(lock, watch_);
}

ThreadPool::Run::~Run() {
  finished_ = true;
  if (pool_.lost()) return;
  std::unique_lock lock(pool_.mutex_);
  std::erase(pool_.runs_, this);
  if (leading_) pool_.give_turn();
  pool_.left_.wait(lock, [this] { return helpers_ == 0; });
}

// The first item of a slot's range. The range ends where that of the next slot begins.
std::int64_t ThreadPool::Run::begin(std::size_t slot, Count open) const {
  return static_cast<std::int64_t>(items_of(open) * std::uint64_t{slot} / shares_.size());
}

// Takes an item of the slot's own range, or else of another, the next ones first.
bool ThreadPool::Run::take(Count open, int slot, std::int64_t& item) {
  if (items_of(open) == 0) return false;
  const auto own = static_cast<std::size_t>(slot);
  for (std::size_t other = own; other < shares_.size(); ++other) {
    if (take_from(other, open, item)) return true;
  }
  for (std::size_t other = 0; other < own; ++other) {
    if (take_from(other, open, item)) return true;
  }
  return false;
}

bool ThreadPool::Run::take_from(std::size_t slot, Count open, std::int64_t& item) {
  const std::int64_t first = begin(slot, open);
  const std::int64_t count = begin(slot + 1, open) - first;
  if (count == 0) return false;
  std::atomic<Count>& taken = shares_[slot].taken;
  Count seen = taken.load();
  for (;;) {
    // All items of earlier phases are taken. In a later phase, this thread is late.
    if (phase_of(seen) > phase_of(open)) return false;
    const std::uint32_t next = phase_of(seen) == phase_of(open) ? items_of(seen) : 0;
    if (next >= count) return false;
    if (taken.compare_exchange_weak(seen, packed(phase_of(open), next + 1))) {
      item = first + next;
      return true;
    }
  }
}

// Whether a thread that joins may find an item.
bool ThreadPool::Run::has_items() const {
  const Count open = open_.load();
  return items_of(open) > 1 && open != empty_.load();
}

void ThreadPool::Run::do_item(Count open, std::int64_t item, int slot) {
  // Phases count from one; zero is the time before the first.
  work_(phase_of(open) - 1, item, slot);
  std::atomic<std::int64_t>& done = shares_[static_cast<std::size_t>(slot)].done;
  done.store(done.load(std::memory_order_relaxed) + 1);
  // The leader does not leave while a helper holds its mutex.
  if (asleep_.load()) {
    const std::lock_guard lock(mutex_);
    done_all_.notify_one();
  }
}

// Checks the watch, and passes the turn to another leader if one waits for it.
bool ThreadPool::Run::goes_on() {
  if (watch_.check()) return false;
  if (pool_.wanted()) {
    std::unique_lock lock(pool_.mutex_);
    pool_.give_turn();
    leading_ = pool_.wait_turn(lock, watch_);
  }
  return leading_;
}

// Has no thread take an item of the phase any more, and returns how many were taken.
std::int64_t ThreadPool::Run::close() {
  const Count open = open_.exchange(packed(phase_, 0));
  std::int64_t items = 0;
  for (std::size_t slot = 0; slot < shares_.size(); ++slot) {
    const std::int64_t count = begin(slot + 1, open) - begin(slot, open);
    const Count taken = shares_[slot].taken.exchange(packed(phase_, items_of(open)));
    if (phase_of(taken) == phase_) items += std::min<std::int64_t>(count, items_of(taken));
  }
  return items;
}

std::int64_t ThreadPool::Run::done() const {
  std::int64_t sum = 0;
  for (const Share& share : shares_) sum += share.done.load();
  return sum;
}

void ThreadPool::Run::wait() {
  for (int look = 0; look < kLooks; ++look) {
    if (done() >= expected_) return;
    pause();
  }
  std::unique_lock lock(mutex_);
  asleep_ = true;
  while (!done_all_.wait_for(lock, Watch::kPatience, [&] { return done() >= expected_; })) {
    // An item may take long: meanwhile the run can be stopped, and other leaders get turns.
    lock.unlock();
    if (!goes_on() && pool_.lost()) break;
    lock.lock();
  }
  asleep_ = false;
}

bool ThreadPool::Run::phase(std::int64_t items) {
  if (!leading_) return false;
  const Count open = packed(++phase_, static_cast<std::uint64_t>(items));
  open_ = open;
  if (items > 1) pool_.wake_idle();
  std::int64_t item;
  bool on = true;
  while (on && take(open, 0, item)) {
    do_item(open, item, 0);
    on = goes_on();
  }
  expected_ += on ? items : close();
  wait();
  // If stopped, items may be unfinished.
  return !watch_.stopped();
}

// Works until the run is finished, gives too little to do, or other leaders want a turn.
void ThreadPool::Run::help(int slot) {
  int looks = 0;
  while (!finished_.load() && looks < kLooks) {
    const Count open = open_.load();
    std::int64_t item;
    if (open == empty_.load()) {
      ++looks;
      pause();
    } else if (take(open, slot, item)) {
      do_item(open, item, slot);
      looks = 0;
    } else {
      empty_ = open;
    }
    if (pool_.wanted()) return;
  }
}

void ThreadPool::Run::aside(const std::function<void()>& callers) {
  if (!leading_) return callers();
  struct Aside {
    explicit Aside(Run& run) : run(run) {
      const std::lock_guard lock(run.pool_.mutex_);
      run.leading_ = false;
      run.pool_.give_turn();
    }
    ~Aside() {
      if (run.pool_.lost()) return;
      std::unique_lock lock(run.pool_.mutex_);
      run.leading_ = run.pool_.wait_turn(lock, run.watch_);
      if (run.pool_.turns_ > 0) run.pool_.wake_.notify_all();
    }
    Run& run;
  };
  const Aside aside(*this);
  callers();
}

std::shared_ptr<ThreadPool> ThreadPool::shared(int threads) {
  const std::lock_guard lock(fork_guard());
  std::weak_ptr<ThreadPool>& known = pools()[threads];
  std::shared_ptr<ThreadPool> pool = known.lock();
  if (pool == nullptr || pool->lost()) {
    // A pool of the parent is never destroyed: nothing in it may be touched.
    pool.reset(new ThreadPool(threads), [](ThreadPool* each) {
      if (!each->lost()) delete each;
    });
    known = pool;
  }
  return pool;
}

std::shared_ptr<ThreadPool> ThreadPool::present(std::shared_ptr<ThreadPool>& kept) {
  int threads = 0;
  {
    const std::lock_guard lock(fork_guard());
    if (!kept->lost()) return kept;
    threads = kept->threads();
  }
  std::shared_ptr<ThreadPool> pool = shared(threads);
  const std::lock_guard lock(fork_guard());
  kept = pool;
  return pool;
}

ThreadPool::ThreadPool(int threads)
    : threads_(std::max(1, threads)), forks_(forks()), turns_(threads_) {
  workers_ = start_threads(
      threads_ - 1, [this] { work(); },
      [this] {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
        wake_.notify_all();
      });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool ThreadPool::lost() const { return forks_ != forks(); }

ThreadPool::Run* ThreadPool::joinable() {
  if (turns_ == 0) return nullptr;
  Run* best = nullptr;
  for (Run* run : runs_) {
    if (!run->leading_ || run->helpers_ + 1 >= threads_ || !run->has_items()) continue;
    if (best == nullptr || run->helpers_ < best->helpers_) best = run;
  }
  return best;
}

void ThreadPool::work() {
  const FloatControl control;
  std::unique_lock lock(mutex_);
  for (;;) {
    Run* run = nullptr;
    ++idle_;
    wake_.wait(lock, [&] { return stopping_ || (run = joinable()) != nullptr; });
    --idle_;
    if (stopping_) return;
    const auto free = std::find(run->in_use_.begin(), run->in_use_.end(), false);
    const auto slot = static_cast<std::size_t>(free - run->in_use_.begin());
    run->in_use_[slot] = true;
    ++run->helpers_;
    --turns_;
    lock.unlock();
    run->help(static_cast<int>(slot));
    lock.lock();
    run->in_use_[slot] = false;
    give_turn();
    if (--run->helpers_ == 0) left_.notify_all();
  }
}

// Wakes the threads that have no run, after one got items.
void ThreadPool::wake_idle() {
  if (idle_.load() == 0) return;
  const std::lock_guard lock(mutex_);
  wake_.notify_all();
}

// Waits for a turn of this leader; false if the watch stops its run first.
bool ThreadPool::wait_turn(std::unique_lock<std::mutex>& lock, Watch& watch) {
  if (turns_ > 0) {
    --turns_;
    return true;
  }
  Waiting self;
  for (bool asked = false;; asked = true) {
    queue_.insert(asked ? queue_.begin() : queue_.end(), &self);
    ++waiters_;
    if (self.granted.wait_for(lock, Watch::kPatience, [&] { return self.has_turn; })) return true;
    // Out of the queue while the caller is asked: what it runs may need the turn.
    std::erase(queue_, &self);
    --waiters_;
    lock.unlock();
    const bool stopped = watch.check();
    if (lost()) return false;
    lock.lock();
    if (stopped) return false;
    if (turns_ > 0) {
      --turns_;
      return true;
    }
  }
}

// Passes the turn to the leader that has waited longest, or frees it.
void ThreadPool::give_turn() {
  if (queue_.empty()) {
    ++turns_;
    if (joinable() != nullptr) wake_.notify_one();
    return;
  }
  Waiting* first = queue_.front();
  queue_.pop_front();
  --waiters_;
  first->has_turn = true;
  first->granted.notify_one();
}

}  // namespace rbln_vae
