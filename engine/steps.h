// What a plan consists of: plain structs, one for each kind of step.
//
// Offsets count bytes from the start of the arena; kNone stands for "not there". Factors are
// rounded to float32 in the run, under its own control of floating point.
#pragma once

#include <cstddef>

#include "engine/kernels/element.h"

namespace rbln_vae {

constexpr Index kNone = -1;
// The largest kernel that is taken has this many taps.
constexpr Index kMaxTaps = 64;
// Rows and columns of outputs that Winograd's algorithm makes at once.
constexpr Index kWinogradTile = 4;

enum class Activation : int { kNone = 0, kSilu, kGelu, kMish, kRelu, kTanh };
constexpr Activation kLastActivation = Activation::kTanh;

// An image in the arena, or some rows of one.
struct Image {
  Index offset = 0;  // of the first pixel
  Index channels = 0;
  Index height = 0;
  Index width = 0;
  Index plane = 0;   // pixels from one block of channels to the next
  Index sample = 0;  // and from one image of the batch to the next

  Index blocks() const { return (channels + kBlock - 1) / kBlock; }
  Index pixels() const { return height * width; }
  // Elements from the first pixel to a row of a block.
  Index at(Index n, Index block, Index y) const {
    return (n * sample + block * plane + y * width) * kBlock;
  }
};

// What is done on reading: for a group norm x * scale + shift by channel, then an activation.
// The coefficients are floats [N][2][blocks * 32], written by a NormStep.
struct Reading {
  Index coefficients = kNone;
  Activation activation = Activation::kNone;
};

// A convolution over tiles of an image. With `upsample` each point of the grid makes 2x2
// outputs with a kernel each; else the grid is the output. The input may have more rows
// than the outputs read. Kernels of 2x2 begin a row above and a column to the left of the
// point, or at it, by their phase; those of 3x3 are all centred, and have a bias each.
struct ConvStep {
  Index batch = 1;
  Image input;
  Image output;
  Reading reading;
  const float* gamma = nullptr;  // [input blocks * 32], where an RMS norm comes first
  double eps = 0;                // of that norm, added to the mean square of a pixel
  Image residual;                // without channels where there is none
  Activation output_activation = Activation::kNone;  // after the residual is added
  Index kernel_height = 1;
  Index kernel_width = 1;
  Index stride = 1;
  Index above = 0;  // rows of zeros
  Index left = 0;   // columns of zeros
  bool upsample = false;
  const void* weights = nullptr;  // [panels][phases][input blocks][taps][512]
  Index kernels = kNone;          // made of them by a WinogradStep, where one did
  const float* kept = nullptr;    // instead of those in the arena: made in an earlier run
  const float* bias = nullptr;    // [panels * 16], or [phases][panels * 16]
  Index tile_height = 1;          // of the grid
  Index tile_width = 1;
  Index cell_height = 1;  // of the grid; tiles consist of whole cells, whose statistics are summed
  Index cell_width = 1;
  Index splits = 1;        // parts that the output panels are divided into
  Index together = 1;      // tiles of one item; the next is loaded during one
  Index partials = kNone;  // floats [N][cells][2][panels * 16]: means, sums of squares

  Index phases() const { return upsample ? 4 : 1; }
  // Whether the input of a phase's kernel depends on the phase.
  bool doubles() const { return upsample && kernel_height == 2; }
  Index bias_step() const { return upsample && !doubles() ? panels() * kPanel : 0; }
  Index grid_height() const { return output.height / (upsample ? 2 : 1); }
  Index grid_width() const { return output.width / (upsample ? 2 : 1); }
  Index tiles_down() const { return ceil_div(grid_height(), tile_height); }
  Index tiles_across() const { return ceil_div(grid_width(), tile_width); }
  Index cells_down() const { return ceil_div(grid_height(), cell_height); }
  Index cells_across() const { return ceil_div(grid_width(), cell_width); }
  Index panels() const { return ceil_div(output.channels, kPanel); }
  Index taps() const { return kernel_height * kernel_width; }
  bool winograd() const { return kernels != kNone; }
  // Rows and columns of the input that a tile reads.
  Index rows_read() const { return read(tile_height, kernel_height); }
  Index columns_read() const { return read(tile_width, kernel_width); }
  Index read(Index size, Index kernel) const {
    if (winograd()) return ceil_div(size, kWinogradTile) * kWinogradTile + 2;
    return upsample ? size + 2 : (size - 1) * stride + kernel;
  }
  Index tiles() const { return batch * tiles_down() * tiles_across(); }
  Index items() const { return ceil_div(tiles(), together) * splits; }
  // Items of the same channels follow each other, so that neighbouring threads read the same
  // weights.
  Index split(Index item) const { return item / ceil_div(tiles(), together); }
  Index first_tile(Index item) const { return item % ceil_div(tiles(), together) * together; }
  // Bytes of scratch for the factors of an RMS norm: a float for each pixel that a tile reads.
  Index norm_bytes() const {
    return gamma == nullptr ? 0 : ceil_div(rows_read() * columns_read() * 4, 64) * 64;
  }
};

// Transforms the packed kernels of a convolution for Winograd's algorithm.
struct WinogradStep {
  const void* weights = nullptr;  // [panels][phases][input blocks][taps][512]
  Index panels = 1;
  Index blocks = 1;
  bool upsample = false;
  Index side = 3;     // of a kernel: 3, or 2 with `upsample`
  Index kernels = 0;  // floats [panels][phases][positions][input blocks][512]
  float* kept = nullptr;  // where they are written instead, to be kept for later runs

  Index phases() const { return upsample ? 4 : 1; }
  Index taps() const { return side * side; }
  // A row and a column of zeros in a 3x3 kernel leave 5x5 products of 6x6.
  Index positions() const { return side == 2 ? 25 : 36; }
  Index items() const { return panels * blocks; }
};

// Rearranges keys and values so that attention reads them as a convolution its weights.
struct AttentionPackStep {
  Index batch = 1;
  Image key;
  Image value;
  Index heads = 1;
  Index packed_keys = 0;    // [N][heads][key panels][channel blocks][512]
  Index packed_values = 0;  // [N][heads][channel panels][key blocks][512]

  Index key_channels() const { return key.channels / heads; }
  Index value_channels() const { return value.channels / heads; }
  Index key_blocks() const { return ceil_div(key.pixels(), kBlock); }
  Index items() const { return batch * heads * key_blocks(); }
};

struct AttentionStep {
  Index batch = 1;
  Image query;
  Image output;
  Index heads = 1;
  double scale = 1;
  Index packed_keys = 0;
  Index packed_values = 0;
  Image residual;
  Index queries = 1;  // of one item
  Index keys = 32;    // worked on at once; a multiple of 32

  Index key_channels() const { return query.channels / heads; }
  Index value_channels() const { return output.channels / heads; }
  Index key_blocks() const { return ceil_div(query.pixels(), kBlock); }
  Index query_parts() const { return ceil_div(query.pixels(), queries); }
  Index items() const { return batch * heads * query_parts(); }
};

// Statistics of an image that no convolution summed while writing it.
struct StatisticsStep {
  Index batch = 1;
  Image input;
  Index cell_height = 1;
  Index cell_width = 1;
  Index partials = 0;  // as a convolution's, with blocks * 32 channels

  Index cells_down() const { return ceil_div(input.height, cell_height); }
  Index cells_across() const { return ceil_div(input.width, cell_width); }
  Index items() const { return batch * cells_down() * cells_across(); }
};

// From the statistics of cells to the coefficients of a group norm.
struct NormStep {
  Index batch = 1;
  Index channels = 0;
  Index groups = 1;
  double eps = 0;
  const float* weight = nullptr;
  const float* bias = nullptr;
  Index partials = 0;
  Index partial_channels = 0;  // stride of a row of partials
  Index grid_height = 1;
  Index grid_width = 1;
  Index cell_height = 1;
  Index cell_width = 1;
  Index points = 1;  // outputs of one grid point: 4 after upsampling
  Index coefficients = 0;

  Index cells_down() const { return ceil_div(grid_height, cell_height); }
  Index cells_across() const { return ceil_div(grid_width, cell_width); }
  // Groups are divided among threads only where there is work for several.
  Index parts() const {
    const Index work = cells_down() * cells_across() * channels;
    return smaller(groups, larger(1, work / 1024));
  }
  Index items() const { return batch * parts(); }
};

// The product with one image plus another: `norm(input) * scale + shift`. Each pixel of scale
// and shift belongs to a square of pixels of the input.
struct ModulateStep {
  Index batch = 1;
  Image input;
  Image output;
  Index coefficients = kNone;  // of the norm, as in a Reading
  Image scale;
  Image shift;  // without channels where there is none
  Index factor = 1;  // the side of the square

  Index items() const { return batch * output.blocks() * output.height; }
};

// The rare operations that no convolution took in: norm, activation, a factor and an offset,
// doubling, zeros around, and a sum, in this order.
struct PointwiseStep {
  Index batch = 1;
  Image input;
  Image output;
  Reading reading;
  double factor = 1;
  double offset = 0;
  bool upsample = false;
  Index above = 0;
  Index left = 0;
  Image residual;

  Index items() const { return batch * output.blocks() * output.height; }
};

// Moves channels to others, or between channels and the pixels of cells of 2x2.
struct ShuffleStep {
  Index batch = 1;
  Image input;
  Image output;
  // Where each channel of the output (of a cell of the output, when the image doubles) comes
  // from: a channel of the input, or when the image halves of a cell of the input. The elements
  // of a cell are in the order channel, row, column.
  const std::int32_t* order = nullptr;

  // Rows and columns of a cell of the output, and of the input.
  Index up() const { return output.width > input.width ? 2 : 1; }
  Index down() const { return output.width < input.width ? 2 : 1; }
  Index elements() const { return output.channels * up() * up(); }
  Index items() const { return batch * output.blocks() * output.height; }
};

// Moves rows of an image to its first: what a strip leaves for the next one.
struct MoveRowsStep {
  Index batch = 1;
  Image image;
  Index from_row = 0;
  Index rows = 0;

  Index items() const { return batch * image.blocks(); }
};

// Between a caller's tensor of any strides and an image in the arena.
struct ImportStep {
  Index batch = 1;
  Image image;
  Index first_row = 0;  // of the tensor

  Index items() const { return batch * image.blocks() * image.height; }
};
struct ExportStep {
  Index batch = 1;
  Image image;
  Index first_row = 0;

  Index items() const { return batch * image.blocks() * image.height; }
};

// A caller's tensor (N, C, H, W); strides count elements.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Index shape[4] = {};
  Index strides[4] = {};
};

class Watch;

// What a kernel sees of a run.
struct Context {
  std::byte* arena = nullptr;
  std::byte* scratch = nullptr;  // of the thread
  const Tensor* input = nullptr;
  const Tensor* output = nullptr;
  Watch* watch = nullptr;
  bool leads = false;  // whether the thread asks the watch, or sees what it found
};

// Whether the run ends: an item that takes long looks now and then, and may be left half done.
bool stopped(const Context& context);

}  // namespace rbln_vae
