// The kernels of one instruction set for one element type, and the list of them all.
#pragma once

#include <span>

#include "engine/steps.h"

namespace rbln_vae {

// In the order of preference: a machine that has one has all those before it, as far as
// they are built.
enum class Isa : int { kGeneric = 0, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

// Kernels run one item of a step. Scratch sizes are those of one thread.
struct Kernels {
  Isa isa;
  DType dtype;
  Index pixels;  // output pixels that a product makes side by side
  Index rows;    // and below each other
  Index panels;  // and panels of 16 channels
  Index (*conv2d_scratch)(const ConvStep&);
  void (*conv2d)(const ConvStep&, const Context&, Index item);
  // Null where products are too fast for fewer of them to matter.
  void (*winograd_kernels)(const WinogradStep&, const Context&, Index item);
  void (*attention_pack)(const AttentionPackStep&, const Context&, Index item);
  Index (*attention_scratch)(const AttentionStep&);
  void (*attention)(const AttentionStep&, const Context&, Index item);
  // Floating-point operations per second that one thread can do at most in the type in which
  // products are made, measured for so many seconds; null where nobody has said what the
  // machine's best would be.
  double (*limit)(double seconds);
};

const char* name(Isa isa);

// Whether this machine runs it, and this build has it.
bool available(Isa isa);

// Asks the operating system for what an instruction set needs, once in a process and before
// any of it is run; false if it refuses.
bool prepare(Isa isa);

// The best kernels for an element type that use no instruction set above `most`.
const Kernels& kernels(DType dtype, Isa most);

// All that this machine can run.
std::span<const Kernels* const> all_kernels();

// The steps that are bound by memory need no instruction set of their own.
void statistics(DType dtype, const StatisticsStep&, const Context&, Index item);
void norm(const NormStep&, const Context&, Index item);
void pointwise(DType dtype, const PointwiseStep&, const Context&, Index item);
void move_rows(DType dtype, const MoveRowsStep&, const Context&, Index item);
void import_image(DType dtype, const ImportStep&, const Context&, Index item);
void export_image(DType dtype, const ExportStep&, const Context&, Index item);

}  // namespace rbln_vae
