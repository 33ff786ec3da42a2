#include "engine/watch.h"

#include <utility>

#include "engine/fork.h"
#include "engine/steps.h"

namespace rbln_vae {
namespace {

Watch::Clock::time_point after(double seconds) {
  // Thirty years mean no limit, because the clock's type has no infinity.
  const double bounded = seconds >= 0 && seconds < 1e9 ? seconds : 1e9;
  return Watch::Clock::now() + std::chrono::duration_cast<Watch::Clock::duration>(
                                   std::chrono::duration<double>(bounded));
}

}  // namespace

Watch::Watch(double timeout, std::function<void()> ask)
    : deadline_(after(timeout)), ask_(std::move(ask)), forks_(forks()),
      next_(Clock::now() + kPatience) {}

bool Watch::check() noexcept {
  if (stopped()) return true;
  const Clock::time_point now = Clock::now();
  if (now >= deadline_) {
    stop(std::make_exception_ptr(TimedOut("the time of the run is over")));
  } else if (ask_ && now >= next_) {
    next_ = Clock::time_point::max();  // it isn't asked again before it has answered
    call(ask_);
    next_ = Clock::now() + kPatience;
  }
  return stopped();
}

void Watch::call(const std::function<void()>& callers) noexcept {
  try {
    callers();
  } catch (...) {
    stop(std::current_exception());
  }
  if (forks() != forks_ && !stopped()) {
    stop(std::make_exception_ptr(std::runtime_error(
        "the process was forked by what a run called, and the child can't finish that run")));
  }
}

void Watch::stop(std::exception_ptr reason) noexcept {
  reason_ = std::move(reason);
  stopped_ = true;
}

bool stopped(const Context& context) {
  return context.leads ? context.watch->check() : context.watch->stopped();
}

}  // namespace rbln_vae
