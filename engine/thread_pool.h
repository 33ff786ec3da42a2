// Threads that help with runs.
//
// A run is led by the thread that asked for it: it opens one phase after another, works
// on items of the phase itself, and waits until the last is done. Idle threads of the
// pool join any run that has room. So a run never waits for a thread to become free, and
// several runs share the threads without knowing of each other.
//
// As many threads work at once as the pool has, those that lead runs included. Where more
// runs are led than that, they take turns, an item at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "engine/watch.h"

namespace rbln_vae {

// The system has fewer threads than were wanted; the message says how many.
class ThreadsUnavailable : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Starts threads that do the same work. Where the system has not so many, `stop` tells those
// that were started to end, they are waited for, and ThreadsUnavailable is thrown.
std::vector<std::thread> start_threads(int count, const std::function<void()>& work,
                                       const std::function<void()>& stop);

class ThreadPool {
 public:
  // The pool of this process for so many threads: all that ask for as many share it, and it
  // ends with the last of them.
  static std::shared_ptr<ThreadPool> shared(int threads);

  // The pool that `kept` holds. In a forked child, where its threads don't exist, it is
  // replaced by one of the child's own first.
  static std::shared_ptr<ThreadPool> present(std::shared_ptr<ThreadPool>& kept);

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // One run: phases with items, each item given to `work` once. `slot` is different for
  // each thread that works at the same time, below threads(), and 0 for the leader.
  class Run {
   public:
    using Work = std::function<void(std::size_t phase, std::int64_t item, int slot)>;

    Run(ThreadPool& pool, Watch& watch, Work work);
    ~Run();
    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;

    // Does all items of the next phase; false if the watch stopped the run before. Nobody
    // works on an item any more then.
    bool phase(std::int64_t items);

   private:
    friend class ThreadPool;

    // The phase in the upper half, the next item in the lower: taken together, so that a
    // late thread never takes an item of a phase that it hasn't seen begin.
    std::atomic<std::uint64_t> next_{0};
    std::atomic<std::int64_t> items_{0};  // of the current phase
    std::atomic<std::int64_t> done_{0};
    std::atomic<bool> finished_{false};
    std::atomic<bool> asleep_{false};  // the leader, until the last item is done
    std::mutex mutex_;                 // of its sleep
    std::condition_variable done_all_;
    int helpers_ = 0;           // guarded by the pool's mutex
    std::vector<bool> in_use_;  // slots, guarded likewise
    std::uint32_t phase_ = 0;   // of the leader alone
    bool leading_ = false;      // whether the leader has its turn; its alone

    bool take(std::uint32_t& phase, std::int64_t& item);
    void do_item(std::uint32_t phase, std::int64_t item, int slot);
    bool goes_on();
    void wait_for(std::int64_t items);
    bool help(int slot);

    ThreadPool& pool_;
    Watch& watch_;
    Work work_;
  };

 private:
  // A leader that waits for its turn.
  struct Waiting {
    std::condition_variable granted;
    bool has_turn = false;
  };

  explicit ThreadPool(int threads);
  ~ThreadPool();

  // Whether the process was forked since: the threads, and who holds the mutex, are elsewhere.
  bool lost() const;

  void work();
  Run* joinable();

  bool wanted() const { return waiters_.load(std::memory_order_relaxed) > 0; }
  bool try_turn();
  bool wait_turn(std::unique_lock<std::mutex>& lock, Watch& watch);
  void give_turn();

  const int threads_;
  const int forks_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
  std::vector<Run*> runs_;
  int turns_;  // that nobody has
  std::deque<Waiting*> queue_;
  std::atomic<int> waiters_{0};  // the length of the queue
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace rbln_vae
