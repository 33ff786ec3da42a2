// Sets the floating-point mode of a thread during a run: round to nearest, no traps, and
// denormals as zero. Arithmetic on denormals is a hundred times slower, and irrelevant here. All
// threads of a run have the same mode, so bits depend neither on the thread nor on its caller.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace rbln_vae {

// Sets the control register of the thread during the lifetime of the object.
class FloatControl {
 public:
#if defined(__x86_64__)
  using Register = unsigned;
  // All exceptions masked, no flags set, denormal inputs and results flushed to zero.
  static constexpr Register kRun = 0x1f80 | 0x8040;
  static Register get() { return _mm_getcsr(); }
  static void set(Register value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
  using Register = std::uint64_t;
  static constexpr Register kRun = Register{1} << 24;
  static Register get() {
    Register value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set(Register value) { __asm__ volatile("msr fpcr, %0" : : "r"(value)); }
#else
  using Register = int;
  static constexpr Register kRun = 0;
  static Register get() { return 0; }
  static void set(Register) {}
#endif

  FloatControl() : callers_(get()) { set(kRun); }
  ~FloatControl() { set(callers_); }
  FloatControl(const FloatControl&) = delete;
  FloatControl& operator=(const FloatControl&) = delete;

  // Restores the caller's mode during the lifetime of the object.
  class Suspended {
   public:
    explicit Suspended(const FloatControl& control) { set(control.callers_); }
    ~Suspended() { set(kRun); }
    Suspended(const Suspended&) = delete;
    Suspended& operator=(const Suspended&) = delete;
  };

 private:
  const Register callers_;
};

}  // namespace rbln_vae
