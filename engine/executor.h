// Runs a plan.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "engine/arena.h"
#include "engine/plan.h"
#include "engine/thread_pool.h"

namespace rbln_vae {

// Seconds since the run began.
struct StepTime {
  double begin;
  double end;
};

// Runs plans on the threads that all models share, in memory that the runs of one model share.
// Thread-safe, and whole in a forked child.
class Executor {
 public:
  // Throws ThreadsUnavailable.
  explicit Executor(int threads) : threads_(threads), pool_(ThreadPool::shared(threads)) {}

  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // The caller's thread works along, and calls `ask` now and then, which may be empty and ends
  // the run by an exception. `times`, if given, gets one entry for each step.
  // Throws TimedOut after `timeout` seconds, what `ask` throws, OutOfMemory, and
  // ThreadsUnavailable in a child that was forked.
  void run(const Plan& plan, const Tensor& input, const Tensor& output, double timeout,
           const std::function<void()>& ask, std::vector<StepTime>* times);

  int threads() const { return threads_; }
  // What a run of the plan takes.
  std::size_t bytes(const Plan& plan) const;
  std::size_t idle_bytes() const { return arenas_.idle_bytes(); }
  void release() { arenas_.clear(); }

 private:
  const int threads_;
  std::shared_ptr<ThreadPool> pool_;
  ArenaPool arenas_;
};

}  // namespace rbln_vae
