// Runs a plan.
#pragma once

#include <stdexcept>
#include <vector>

#include "engine/arena.h"
#include "engine/plan.h"
#include "engine/thread_pool.h"

namespace rbln_vae {

class TimedOut : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Seconds since the run began.
struct StepTime {
  double begin;
  double end;
};

// Threads and memory that all runs of a model share. Thread-safe.
class Executor {
 public:
  explicit Executor(int threads) : threads_(threads) {}

  // The caller's thread works along. `times`, if given, gets one entry for each step.
  // Throws TimedOut after `timeout` seconds, and OutOfMemory.
  void run(const Plan& plan, const Tensor& input, const Tensor& output, double timeout,
           std::vector<StepTime>* times);

  int threads() const { return threads_.threads(); }
  // What a run of the plan takes.
  std::size_t bytes(const Plan& plan) const;
  std::size_t idle_bytes() const { return arenas_.idle_bytes(); }
  void release() { arenas_.clear(); }

 private:
  ThreadPool threads_;
  ArenaPool arenas_;
};

}  // namespace rbln_vae
