#include "engine/executor.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "engine/float_control.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace rbln_vae {
namespace {

using Clock = std::chrono::steady_clock;

// Scratch areas begin in different sets of the caches, and on different pages.
std::size_t scratch_stride(const Plan& plan) {
  constexpr std::size_t page = 4096;
  const auto bytes = static_cast<std::size_t>(plan.scratch_bytes());
  return (bytes + page - 1) / page * page + page;
}

// Returns the arena to the pool when it goes out of scope.
class Borrowed {
 public:
  Borrowed(ArenaPool& pool, std::size_t bytes) : pool_(pool), arena_(pool.take(bytes)) {}
  ~Borrowed() { pool_.give(std::move(arena_)); }
  std::byte* data() const { return arena_->data(); }

 private:
  ArenaPool& pool_;
  std::unique_ptr<Arena> arena_;
};

// Under AddressSanitizer, a step may touch only the ranges in the plan, and a thread only its
// scratch: the rest of the arena is poisoned. Otherwise this class does nothing.
class Fence {
 public:
#if defined(__SANITIZE_ADDRESS__)
  Fence(const Plan& plan, std::byte* arena, std::size_t total, std::size_t stride)
      : plan_(plan), arena_(arena), total_(total) {
    const auto scratch = static_cast<std::size_t>(plan.scratch_bytes());
    for (std::size_t end = total; end >= stride + bytes(plan); end -= stride) {
      ASAN_POISON_MEMORY_REGION(arena + (end - stride) + scratch, stride - scratch);
    }
  }
  ~Fence() { ASAN_UNPOISON_MEMORY_REGION(arena_, total_); }
  void open(std::size_t step) const {
    ASAN_POISON_MEMORY_REGION(arena_, bytes(plan_));
    for (const Range& range : plan_.ranges(step)) {
      if (range.offset >= plan_.arena_bytes()) continue;  // of the state
      ASAN_UNPOISON_MEMORY_REGION(arena_ + range.offset, static_cast<std::size_t>(range.bytes));
    }
  }

 private:
  static std::size_t bytes(const Plan& plan) {
    return static_cast<std::size_t>(plan.arena_bytes());
  }

  const Plan& plan_;
  std::byte* const arena_;
  const std::size_t total_;
#else
  Fence(const Plan&, std::byte*, std::size_t, std::size_t) {}
  void open(std::size_t) const {}
#endif
};

}  // namespace

std::size_t Executor::bytes(const Plan& plan) const {
  constexpr std::size_t page = 4096;
  const auto arena = (static_cast<std::size_t>(plan.arena_bytes()) + page - 1) / page * page;
  std::size_t scratches = 0, total = 0;
  if (__builtin_mul_overflow(scratch_stride(plan), static_cast<std::size_t>(threads()),
                             &scratches) ||
      __builtin_add_overflow(arena, scratches, &total)) {
    throw OutOfMemory("the memory that this run needs can't be addressed");
  }
  return total;
}

std::vector<Index> Executor::run(const Plan& plan, const std::vector<Tensor>& inputs,
                                 const std::vector<Tensor>& outputs, std::byte* state,
                                 double timeout, const std::function<void(Index)>& ask,
                                 const std::function<void(Index, Index)>& on_rows,
                                 std::vector<StepTime>* times) {
  const Clock::time_point begin = Clock::now();
  const std::shared_ptr<ThreadPool> pool = ThreadPool::present(pool_);
  const std::size_t total = bytes(plan);
  const Borrowed arena(arenas_, total);
  const std::size_t stride = scratch_stride(plan);
  std::byte* const scratches =
      arena.data() + (total - stride * static_cast<std::size_t>(threads()));

  const Fence fence(plan, arena.data(), total, stride);
  const FloatControl control;
  ThreadPool::Run* running = nullptr;  // before the run has its turn
  const auto ask_caller = [&] {
    const FloatControl::Suspended callers(control);
    if (running == nullptr) return ask(0);
    running->aside([&] { ask(running->done()); });
  };
  std::vector<std::atomic<bool>> overflowed(static_cast<std::size_t>(plan.input_shape()[0]));
  Watch watch(timeout, ask ? std::function<void()>(ask_caller) : nullptr);
  ThreadPool::Run run(*pool, watch, [&](std::size_t step, std::int64_t item, int slot) {
    const Context context{arena.data(),
                          plan.arena_bytes(),
                          state,
                          scratches + static_cast<std::size_t>(slot) * stride,
                          inputs.data(),
                          outputs.data(),
                          overflowed.data(),
                          plan.input_shape()[0],
                          &watch,
                          slot == 0};
    plan.run_item(step, context, item);
  });
  running = &run;
  const auto elapsed = [begin] {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  if (times != nullptr) times->reserve(plan.steps().size());
  double last = times != nullptr ? elapsed() : 0;
  for (std::size_t step = 0; step < plan.steps().size(); ++step) {
    fence.open(step);
    if (!run.phase(plan.items(step))) watch.raise();
    if (times != nullptr) {
      const double now = elapsed();
      times->push_back({last, now});
      last = now;
    }
    const ExportStep* exported = std::get_if<ExportStep>(&plan.steps()[step]);
    if (exported != nullptr && on_rows) {
      watch.call([&] {
        const FloatControl::Suspended callers(control);
        run.aside([&] { on_rows(exported->first_row, exported->image.height); });
      });
      if (watch.stopped()) watch.raise();
    }
    if (!overflowed.empty() &&
        std::all_of(overflowed.begin(), overflowed.end(),
                    [](const std::atomic<bool>& each) { return each.load(); })) {
      break;
    }
  }
  std::vector<Index> result;
  for (std::size_t n = 0; n < overflowed.size(); ++n) {
    if (overflowed[n]) result.push_back(static_cast<Index>(n));
  }
  return result;
}

}  // namespace rbln_vae
