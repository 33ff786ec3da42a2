// Runs plans.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "engine/arena.h"
#include "engine/plan.h"
#include "engine/thread_pool.h"

namespace rbln_vae {

// The start and the end of a step, in seconds since the start of the run.
struct StepTime {
  double begin;
  double end;
};

// Runs plans on the threads that all models share, with arenas that the runs of one model share.
// Thread-safe, and usable in a forked child.
class Executor {
 public:
  // Throws ThreadsUnavailable.
  explicit Executor(int threads) : threads_(threads), pool_(ThreadPool::shared(threads)) {}

  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // The calling thread works, too, and regularly calls `ask`, which may be empty, with the number
  // of items that are done, of all steps; an exception from it ends the run. So does one from
  // `on_rows`, which is called with the first row and the number of rows when these are finished
  // in all images of the output; it may be empty, too.
  // `times`, if not null, gets one entry per step that was run.
  // Returns the numbers of the images with values beyond the range of the type in which images are
  // stored, whose outputs are not valid; the run ends early if all images have such values.
  // Throws TimedOut after `timeout` seconds, exceptions of `ask` and `on_rows`, OutOfMemory and, in
  // a forked child, ThreadsUnavailable.
  // `state` is that of a video, of as many bytes as the plan says; null if it has none.
  std::vector<Index> run(const Plan& plan, const std::vector<Tensor>& inputs,
                         const std::vector<Tensor>& outputs, std::byte* state, double timeout,
                         const std::function<void(Index)>& ask,
                         const std::function<void(Index, Index)>& on_rows,
                         std::vector<StepTime>* times);

  int threads() const { return threads_; }
  // The bytes of a run of the plan.
  std::size_t bytes(const Plan& plan) const;
  std::size_t idle_bytes() const { return arenas_.idle_bytes(); }
  void release() { arenas_.clear(); }

 private:
  const int threads_;
  std::shared_ptr<ThreadPool> pool_;
  ArenaPool arenas_;
};

}  // namespace rbln_vae
