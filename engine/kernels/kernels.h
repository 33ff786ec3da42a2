// The kernels of one instruction set for one element type, and the table of all kernels.
#pragma once

#include <span>

#include "engine/steps.h"

namespace rbln_vae {

// In order of preference. A machine that has an instruction set also has those before it for the
// same kind of processor, as far as they are built.
enum class Isa : int { kGeneric = 0, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16, kNeonBf16 };

// The costs of the parts of a convolution, as the number of products of its own type that take
// as long. `product` is the cost of one product of its own type in products of float32.
struct Costs {
  double product;
  double norm;     // norm and activation of an element
  double copy;     // copying an element
  double weights;  // fetching a weight that is not in the L2 cache
};

// The costs of the parts of Winograd's algorithm, as the number of products of float32 that take
// as long.
struct WinogradCosts {
  double input;    // transforming an input value
  double output;   // transforming an output value
  double product;  // a product: rows of pixels are short, and weights exceed the cache
  double kernel;   // computing a transformed weight
  double fetch;    // reading one that was kept, which no cache holds
  Costs others;    // everything else, in products of float32
};

// The costs of the parts of the algorithm for doubling (`conv2d/doubling.h`), as the number of
// products of its own type that take as long.
struct DoublingCosts {
  double input;    // transforming an input value
  double output;   // transforming an output value, and storing it
  double product;  // a product, as in Winograd's algorithm
};

// The kernels of one instruction set for one element type: a row of the table, with their
// abilities and costs. All constants belong to the instruction set, not to a processor, so
// results are the same on all machines that have it.
//
// A kernel runs one item of a step. Scratch sizes are per thread.
struct Kernels {
  Isa isa;
  DType dtype;         // of stored images
  DType products;      // of the operands of products
  Index rows;          // of output pixels of a product
  Index pixels;        // in each of these rows
  Index panels;        // of 16 channels of a product
  bool overlaps;       // whether a tile is loaded during the products of another tile
  Index tile_bytes;    // the most bytes of a tile's input: a good part of the L2 cache
  Index most_queries;  // of one item of attention
  Costs costs;
  DoublingCosts doubling;
  Index (*conv2d_scratch)(const ConvStep&);
  void (*conv2d)(const ConvStep&, const Context&, Index item);
  // Null if products are so fast that fewer of them are no gain.
  void (*winograd_kernels)(const WinogradStep&, const Context&, Index item);
  void (*attention_pack)(const AttentionPackStep&, const Context&, Index item);
  Index (*attention_scratch)(const AttentionStep&);
  void (*attention)(const AttentionStep&, const Context&, Index item);
  // Measures the peak of one thread in floating-point operations per second, in the type of
  // `products`, for a number of seconds.
  double (*limit)(double seconds);
};

constexpr Costs kFloat32Costs = {.product = 1.0, .norm = 24, .copy = 6, .weights = 8};
constexpr DoublingCosts kFloat32Doubling = {.input = 24, .output = 16, .product = 1.1};
constexpr WinogradCosts kWinogradCosts = {
    .input = 16,
    .output = 14,
    .product = 1.2,
    .kernel = 48,
    .fetch = 12,
    .others = kFloat32Costs};

// All instruction sets, including those that are not in this build.
std::span<const Isa> isas();

const char* name(Isa isa);

// Whether this machine supports an instruction set.
bool supported(Isa isa);

// Whether this machine supports an instruction set, and this build has its kernels.
bool available(Isa isa);

// Requests what an instruction set needs from the operating system. Must be called once in a
// process before its kernels run. Returns false if the system refuses or the machine lacks it.
bool prepare(Isa isa);

// The best kernels for an element type that use no instruction set above `most`.
const Kernels& kernels(DType dtype, Isa most);

// All kernels in this build, the best last.
std::span<const Kernels> built_kernels();

// The kernels in this build that this machine can run.
std::span<const Kernels* const> all_kernels();

// Steps that are bound by memory have no kernels for instruction sets.
void statistics(DType dtype, const StatisticsStep&, const Context&, Index item);
void norm(const NormStep&, const Context&, Index item);
void modulate(DType dtype, const ModulateStep&, const Context&, Index item);
void pointwise(DType dtype, const PointwiseStep&, const Context&, Index item);
void shuffle(DType dtype, const ShuffleStep&, const Context&, Index item);
void move_rows(DType dtype, const MoveRowsStep&, const Context&, Index item);
void import_image(DType dtype, const ImportStep&, const Context&, Index item);
void export_image(DType dtype, const ExportStep&, const Context&, Index item);

}  // namespace rbln_vae
