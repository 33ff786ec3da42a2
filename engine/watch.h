// Decides when a run must stop: at its timeout, or when its caller wants it to.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <stdexcept>

namespace rbln_vae {

class TimedOut : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The leader of a run checks the clock and asks the caller; the other threads see the result.
// Both happen between items of work, and within long ones.
class Watch {
 public:
  using Clock = std::chrono::steady_clock;

  // The least time between two calls of `ask`.
  static constexpr std::chrono::milliseconds kPatience{50};

  // An exception from `ask`, which may be empty, ends the run.
  Watch(double timeout, std::function<void()> ask);

  // Whether the run must end. Only for the leader; may call `ask`.
  bool check() noexcept;
  // Calls a function of the run's caller. Only for the leader; an exception from it ends the run.
  void call(const std::function<void()>& callers) noexcept;
  // Whether the run must end. For all other threads.
  bool stopped() const noexcept { return stopped_.load(std::memory_order_relaxed); }
  // Throws the exception that ended the run.
  [[noreturn]] void raise() const { std::rethrow_exception(reason_); }

 private:
  void stop(std::exception_ptr reason) noexcept;

  const Clock::time_point deadline_;
  const std::function<void()> ask_;
  const int forks_;
  Clock::time_point next_;
  std::atomic<bool> stopped_{false};
  std::exception_ptr reason_;
};

}  // namespace rbln_vae
