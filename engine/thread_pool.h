// Threads that help with runs.
//
// A run is led by the thread that asked for it: it opens one phase after another, works
// on items of the phase itself, and waits until the last is done. Idle threads of the
// pool join any run that has room. So a run never waits for a thread to become free, and
// several runs share the threads without knowing of each other.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace rbln_vae {

class ThreadPool {
 public:
  // `threads` is how many work on runs at once, those that lead them included.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // One run: phases with items, each item given to `work` once. `slot` is different for
  // each thread that works at the same time, below threads(), and 0 for the leader.
  class Run {
   public:
    using Work = std::function<void(std::size_t phase, std::int64_t item, int slot)>;

    Run(ThreadPool& pool, Work work);
    ~Run();
    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;

    // Does all items of the next phase; false if `deadline` came before they were begun.
    // Items that were begun are always finished.
    bool phase(std::int64_t items, std::chrono::steady_clock::time_point deadline);

   private:
    friend class ThreadPool;

    // The phase in the upper half, the next item in the lower: taken together, so that a
    // late thread never takes an item of a phase that it hasn't seen begin.
    std::atomic<std::uint64_t> next_{0};
    std::atomic<std::int64_t> items_{0};  // of the current phase
    std::atomic<std::int64_t> done_{0};
    std::atomic<bool> finished_{false};
    int helpers_ = 0;           // guarded by the pool's mutex
    std::vector<bool> in_use_;  // slots, guarded likewise
    std::uint32_t phase_ = 0;   // of the leader alone

    bool take(std::uint32_t& phase, std::int64_t& item);
    void do_item(std::uint32_t phase, std::int64_t item, int slot);
    void help(int slot);

    ThreadPool& pool_;
    Work work_;
  };

 private:
  void work();
  Run* joinable();
  // More threads at work than there should be: helpers leave.
  bool crowded() const { return active_.load(std::memory_order_relaxed) > threads_; }

  const int threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
  std::vector<Run*> runs_;
  std::atomic<int> active_{0};  // leaders and helpers
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

// How many processors this process may use: its affinity mask, and the share of time
// that its control group has.
int usable_processors();

}  // namespace rbln_vae
