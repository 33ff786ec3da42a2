// The kernels of one instruction set for one element type, and the list of them all.
#pragma once

#include <span>

#include "engine/steps.h"

namespace rbln_vae {

// In the order of preference: a machine that has one has all those before it, as far as
// they are built.
enum class Isa : int { kGeneric = 0, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

// What parts of a convolution cost, in products of its own type that take as long, but for
// `product`: that is one of its own type, in products of float32.
struct Costs {
  double product;
  double norm;     // norm and activation of an element
  double copy;     // copying one
  double weights;  // fetching a weight that isn't in the L2 cache
};

// What parts of Winograd's algorithm cost, in products of float32 that take as long.
struct WinogradCosts {
  double input;    // transforming an input value
  double output;   // and an output value
  double product;  // a product: rows of pixels are short, and kernels larger than the cache
  double kernel;   // a value of a transformed kernel
  Costs others;    // all else, which goes with products of float32
};

// The kernels of one instruction set for one element type: a row of the table, which says
// what they can do and cost too. All are constants of the instruction set and not of the
// processor, so that results are the same on all machines that have it.
//
// Kernels run one item of a step. Scratch sizes are those of one thread.
struct Kernels {
  Isa isa;
  DType dtype;         // in which images are stored
  DType products;      // in which products are made
  Index rows;          // of output pixels that a product makes
  Index pixels;        // of each of these rows
  Index panels;        // of 16 channels
  bool overlaps;       // whether a tile is loaded during the products of another
  Index tile_bytes;    // the most that a tile's input may take: a good part of the L2 cache
  Index most_queries;  // of one item of attention
  Costs costs;
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

constexpr Costs kFloat32Costs = {.product = 1.0, .norm = 24, .copy = 6, .weights = 8};
constexpr WinogradCosts kWinogradCosts = {
    .input = 16,
    .output = 14,
    .product = 1.2,
    .kernel = 48,
    .others = kFloat32Costs};

// All that there are, also those that aren't in this build.
std::span<const Isa> isas();

const char* name(Isa isa);

// Whether this machine runs it, and this build has it.
bool available(Isa isa);

// Asks the operating system for what an instruction set needs, once in a process and before
// any of it is run; false if it refuses, or the machine hasn't got it.
bool prepare(Isa isa);

// The best kernels for an element type that use no instruction set above `most`.
const Kernels& kernels(DType dtype, Isa most);

// All in this build, the best last.
std::span<const Kernels> built_kernels();

// Those of them that this machine can run.
std::span<const Kernels* const> all_kernels();

// The steps that are bound by memory need no instruction set of their own.
void statistics(DType dtype, const StatisticsStep&, const Context&, Index item);
void norm(const NormStep&, const Context&, Index item);
void pointwise(DType dtype, const PointwiseStep&, const Context&, Index item);
void move_rows(DType dtype, const MoveRowsStep&, const Context&, Index item);
void import_image(DType dtype, const ImportStep&, const Context&, Index item);
void export_image(DType dtype, const ExportStep&, const Context&, Index item);

}  // namespace rbln_vae
