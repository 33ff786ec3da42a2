// A pool of threads that help with runs.
//
// The thread that asks for a run leads it: it opens one phase after another, works on items
// of the phase, and waits until the last item is done. Idle threads of the pool join any run
// that has room. So a run never waits for a free thread, and several runs share the threads
// without knowing of each other.
//
// The items of a phase are divided into a range for each thread. A thread takes the items of its
// own range one by one, then those that are left in the ranges of others. So threads write to
// the same cache line only where one helps another out.
//
// The pool limits how many threads work at the same time, including leaders. If there are
// more runs than that, their leaders take turns, one item at a time. While a leader is in a function
// of its caller, others have its turn: that function may itself ask for a run.
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

// The system could not start enough threads; the message says how many it started.
class ThreadsUnavailable : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Variables that different threads write are so many bytes apart: processors fetch cache lines
// in pairs.
constexpr std::size_t kApart = 128;

// Starts threads that do the same work. If the system can't start all of them, it calls `stop`
// to end the started ones, joins them, and throws ThreadsUnavailable.
std::vector<std::thread> start_threads(int count, const std::function<void()>& work,
                                       const std::function<void()>& stop);

class ThreadPool {
 public:
  // The process's pool for a number of threads. All callers with the same number share it, and
  // it ends with the last of them.
  static std::shared_ptr<ThreadPool> shared(int threads);

  // Returns the pool in `kept`. In a forked child, where the threads of that pool do not exist,
  // first replaces it by a new pool.
  static std::shared_ptr<ThreadPool> present(std::shared_ptr<ThreadPool>& kept);

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // One run: a sequence of phases with items. `work` is called once for each item. `slot` is
  // less than threads(), different for threads that work at the same time, and 0 for the leader.
  class Run {
   public:
    using Work = std::function<void(std::size_t phase, std::int64_t item, int slot)>;

    Run(ThreadPool& pool, Watch& watch, Work work);
    ~Run();
    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;

    // Does all items of the next phase. Returns false if the watch stopped the run; no thread
    // works on an item any more then.
    bool phase(std::int64_t items);

    // The number of items that are done, of all phases.
    std::int64_t done() const;

    // Calls a function of the run's caller. Only for the leader, which has no turn meanwhile.
    void aside(const std::function<void()>& callers);

   private:
    friend class ThreadPool;

    // A phase in the upper half and a number of items in the lower half, in one atomic, so that
    // a late thread never takes an item of a phase whose start it has not seen.
    using Count = std::uint64_t;

    struct Share {
      alignas(kApart) std::atomic<Count> taken{0};       // items of the slot's range
      alignas(kApart) std::atomic<std::int64_t> done{0};  // items by the slot, of all phases
    };

    alignas(kApart) std::atomic<Count> open_{0};  // the items of the phase; 0 between phases
    std::atomic<bool> finished_{false};
    std::atomic<bool> asleep_{false};  // whether the leader sleeps until the last item is done
    alignas(kApart) std::atomic<Count> empty_{0};  // what was open when no item was left of it
    std::vector<Share> shares_;                    // one for each slot
    alignas(kApart) std::mutex mutex_;  // for the leader's sleep
    std::condition_variable done_all_;
    int helpers_ = 0;            // guarded by the pool's mutex
    std::vector<bool> in_use_;   // for each slot; guarded by the pool's mutex
    std::uint32_t phase_ = 0;    // these are used only by the leader
    std::int64_t expected_ = 0;  // items that must be done, of all phases
    bool leading_ = false;       // whether the leader has its turn

    std::int64_t begin(std::size_t slot, Count open) const;
    bool take(Count open, int slot, std::int64_t& item);
    bool take_from(std::size_t slot, Count open, std::int64_t& item);
    void do_item(Count open, std::int64_t item, int slot);
    bool goes_on();
    std::int64_t close();
    void wait();
    bool has_items() const;
    void help(int slot);

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

  // Whether the process was forked since: then the threads and the holder of the mutex exist
  // only in the parent.
  bool lost() const;

  void work();
  Run* joinable();

  bool wanted() const { return waiters_.load(std::memory_order_relaxed) > 0; }
  void wake_idle();
  bool wait_turn(std::unique_lock<std::mutex>& lock, Watch& watch);
  void give_turn();

  const int threads_;
  const int forks_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
  std::vector<Run*> runs_;
  int turns_;                 // free turns
  std::atomic<int> idle_{0};  // threads that have no run
  std::deque<Waiting*> queue_;
  alignas(kApart) std::atomic<int> waiters_{0};  // the length of the queue
  alignas(kApart) bool stopping_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace rbln_vae
