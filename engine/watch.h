// Decides whether a run goes on: its time may be over, or its caller may not want it any more.
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

// One thread leads a run: it looks at the clock and asks the caller. The others see what it
// found. Both do so between items of work, and within long ones.
class Watch {
 public:
  using Clock = std::chrono::steady_clock;

  // How long the caller isn't asked again.
  static constexpr std::chrono::milliseconds kPatience{50};

  // `ask`, which may be empty, ends the run by an exception.
  Watch(double timeout, std::function<void()> ask);

  // Whether the run must end. The leader's question, who may call `ask` for it.
  bool check() noexcept;
  // The question of all others.
  bool stopped() const noexcept { return stopped_.load(std::memory_order_relaxed); }
  // Throws what ended the run.
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
