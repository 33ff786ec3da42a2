// What a plan consists of: plain structs, one for each kind of step.
//
// Offsets count bytes from the start of the arena, which the state of a video follows; kNone
// stands for "not there". Factors are rounded to float32 in the run, under its own control of
// floating point.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>

#include "engine/kernels/element.h"

namespace rbln_vae {

constexpr Index kNone = -1;
// The largest kernel that is taken has this many taps.
constexpr Index kMaxTaps = 64;
// Rows and columns of outputs that algorithms with fewer products make at once.
constexpr Index kOutputSquare = 4;
// Products that the algorithm for doubling needs for them in one direction.
constexpr Index kDoublingSide = 5;

enum class Activation : int { kNone = 0, kSilu, kGelu, kMish, kRelu, kTanh };
constexpr Activation kLastActivation = Activation::kTanh;

// An image in the arena, or some rows of one: of each row, one block of channels after the other.
struct Image {
  Index offset = 0;  // of the first pixel
  Index channels = 0;
  Index height = 0;
  Index width = 0;
  Index row = 0;     // pixels of all blocks from one row to the next
  Index sample = 0;  // and from one image of the batch to the next

  Index blocks() const { return (channels + kBlock - 1) / kBlock; }
  Index pixels() const { return height * width; }
  // Elements from the first pixel to a row of a block.
  Index at(Index n, Index block, Index y) const {
    return (n * sample + y * row + block * width) * kBlock;
  }
};

// What is done on reading: for a group norm x * scale + shift by channel, then an activation.
// The coefficients are floats [N][2][blocks * 32], written by a NormStep.
struct Reading {
  Index coefficients = kNone;
  Activation activation = Activation::kNone;
};

// A convolution over tiles of an image. With `upsample` each point of the grid makes 2x2
// outputs: by a kernel and a bias for each of the four phases or, where it `doubles`, by one
// kernel that is convolved with the image doubled. Else the grid is the output. The input may
// have more rows than the outputs read. A convolution over frames reads those before the input,
// too, and takes their channels first. Several frames may be stacked: then those of the input stand
// one after the other in the batch, and some of them may be made at once, by filtering over time.
// One over a clip reads of each image of the batch the one before, itself and the one after, and
// zeros where there is none.
struct ConvStep {
  static constexpr Index kMostEarlier = 2;
  static constexpr Index kNeighbours = 3;

  Index batch = 1;
  Image input;
  std::array<Image, kMostEarlier> earlier;  // without channels where there are fewer frames
  Index left_out = 0;  // frames before these for which there are weights, and which are zeros
  Index stacked = 1;   // frames of the input; earlier ones are single
  Index at_once = 1;   // of these frames; more than one by `conv2d/over_time.h`
  bool over_clip = false;
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
  bool doubles = false;           // also true for `upsample` then
  const void* weights = nullptr;  // [panels][phases][blocks of all frames][taps][512], or of a
                                  // step that doubles [panels][25][input blocks][512]
  float factor = 1;               // of the sums: the weights are divided by it
  Index kernels = kNone;          // made of them by a WinogradStep, where one did
  const float* kept = nullptr;    // instead of those in the arena: made in an earlier run
  const float* bias = nullptr;    // [panels * 16], or [phases][panels * 16]
  Index tile_height = 1;          // of the grid
  Index tile_width = 1;
  Index cell_height = 1;  // of the grid; tiles consist of whole cells, whose statistics are summed
  Index cell_width = 1;
  Index image_cells = 0;   // of a whole image, where the step computes some of its rows
  Index splits = 1;        // parts that the output panels are divided into
  Index together = 1;      // tiles of one item; the next is loaded during one
  Index partials = kNone;  // floats [N][cells][2][panels * 16]: means, sums of squares

  Index points() const { return upsample ? 4 : 1; }  // outputs of a point of the grid
  Index phases() const { return doubles ? 1 : points(); }
  Index bias_step() const { return phases() > 1 ? panels() * kPanel : 0; }
  Index grid_height() const { return output.height / (upsample ? 2 : 1); }
  Index grid_width() const { return output.width / (upsample ? 2 : 1); }
  Index tiles_down() const { return ceil_div(grid_height(), tile_height); }
  Index tiles_across() const { return ceil_div(grid_width(), tile_width); }
  Index cells_down() const { return ceil_div(grid_height(), cell_height); }
  Index cells_across() const { return ceil_div(grid_width(), cell_width); }
  // Cells from one image of the batch to the next.
  Index cells_apart() const {
    return image_cells != 0 ? image_cells : cells_down() * cells_across();
  }
  Index panels() const { return ceil_div(output.channels, kPanel); }
  [[gnu::always_inline]] Index sources() const {
    if (over_clip) return kNeighbours;
    return before() + 1;
  }
  [[gnu::always_inline]] Index before() const {
    Index count = 0;
    for (const Image& image : earlier) count += image.channels != 0;
    return count;
  }
  Index videos() const { return stacked == 1 ? batch : batch / stacked; }
  bool over_time() const { return at_once > 1; }
  // The parts of the batch whose frames are made at once, and the frames that one reads.
  [[gnu::always_inline]] Index parts() const { return batch / at_once; }
  [[gnu::always_inline]] Index frames_read() const { return sources() + at_once - 1; }
  // The number of a frame of a part, counted from the first earlier one. Rows are loaded so often
  // that nothing is divided where there is one frame.
  [[gnu::always_inline]] Index frame_of(Index index, Index part) const {
    return stacked == 1 ? index : part / videos() * at_once + index;
  }
  [[gnu::always_inline]] Index video_of(Index part) const {
    return stacked == 1 ? part : part % videos();
  }
  // The image of the output that is a frame of a part.
  [[gnu::always_inline]] Index made_image(Index index, Index part) const {
    return video_of(part) + frame_of(index, part) * videos();
  }
  // Where a frame that a part reads lies, the oldest first.
  [[gnu::always_inline]] const Image& source(Index index, Index part) const {
    const Index frame = frame_of(index, part);
    return !over_clip && frame < before() ? earlier[static_cast<std::size_t>(frame)] : input;
  }
  // Its number in the batch there; outside of the batch there are zeros.
  [[gnu::always_inline]] Index image_of(Index index, Index part) const {
    if (over_clip) return part + index - kNeighbours / 2;
    if (stacked == 1) return part;
    return video_of(part) + larger(0, frame_of(index, part) - before()) * videos();
  }
  // Blocks of all sources, and of all frames for which there are weights.
  Index blocks() const { return sources() * input.blocks(); }
  Index skipped_blocks() const { return left_out * input.blocks(); }
  Index packed_blocks() const { return skipped_blocks() + blocks(); }
  Index taps() const { return kernel_height * kernel_width; }
  // Matrices in which the weights are packed, for each phase.
  Index matrices() const { return doubles ? kDoublingSide * kDoublingSide : taps(); }
  bool winograd() const { return kernels != kNone; }
  // Rows and columns of the grid that are computed at once, and where they begin.
  Index unit() const { return doubles ? kOutputSquare / 2 : winograd() ? kOutputSquare : 1; }
  // Rows and columns of the input that a tile reads. Kernels of all instruction sets call these
  // often enough that a compiler would rather not inline them, and they may share no code.
  [[gnu::always_inline]] Index rows_read() const { return read(tile_height, kernel_height); }
  [[gnu::always_inline]] Index columns_read() const { return read(tile_width, kernel_width); }
  [[gnu::always_inline]] Index read(Index size, Index kernel) const {
    return (ceil_div(size, unit()) * unit() - 1) * stride + kernel;
  }
  Index tiles() const { return parts() * tiles_down() * tiles_across(); }
  Index items() const { return ceil_div(tiles(), together) * splits; }
  // Items of the same channels follow each other, so that neighbouring threads read the same
  // weights.
  Index split(Index item) const { return item / ceil_div(tiles(), together); }
  Index first_tile(Index item) const { return item % ceil_div(tiles(), together) * together; }
  // Bytes of scratch for the factors of an RMS norm: a float for each pixel that a tile reads.
  [[gnu::always_inline]] Index norm_bytes() const {
    const Index pixels = frames_read() * rows_read() * columns_read();
    return gamma == nullptr ? 0 : ceil_div(pixels * 4, 64) * 64;
  }
};

// Transforms the packed kernels of a convolution for Winograd's algorithm, or for that with stride 2
// (`conv2d/halving.h`).
struct WinogradStep {
  const void* weights = nullptr;  // [panels][phases][skipped and other blocks][taps][512]
  Index panels = 1;
  Index blocks = 1;
  Index skipped = 0;  // blocks before these, which are left out
  Index phases = 1;
  Index stride = 1;   // of the convolution
  Index at_once = 1;  // as of the convolution; the blocks are those of one frame if it is more
  Index kernels = 0;  // floats [panels][phases][times][matrices][blocks][512]
  float* kept = nullptr;  // where they are written instead, to be kept for later runs

  static constexpr Index kTaps = 9;
  static constexpr Index kMatrices = (kOutputSquare + 2) * (kOutputSquare + 2);
  static constexpr Index kFrames = 3;  // of a kernel that is transformed over time
  Index packed_blocks() const { return skipped + (at_once > 1 ? kFrames : 1) * blocks; }
  Index times() const { return at_once > 1 ? at_once + kFrames - 1 : 1; }
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
  bool over_clip = false;  // whether all images of the batch have the same statistics
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
  // Images whose statistics are taken together.
  Index together() const { return over_clip ? batch : 1; }
  // Groups are divided among threads only where there is work for several.
  Index parts() const {
    const Index work = together() * cells_down() * cells_across() * channels;
    return smaller(groups, larger(1, work / 1024));
  }
  Index items() const { return batch / together() * parts(); }
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
  // Whether the output is the input as it is.
  bool copies() const {
    return reading.coefficients == kNone && reading.activation == Activation::kNone &&
           factor == 1 && offset == 0 && residual.channels == 0 && above == 0 && left == 0 &&
           output.height == input.height && output.width == input.width;
  }
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
  Index tensor = 0;     // the number of the input

  Index items() const { return batch * image.blocks() * image.height; }
};
struct ExportStep {
  Index batch = 1;
  Image image;
  Index first_row = 0;
  Index tensor = 0;  // the number of the output

  Index items() const { return batch * image.blocks() * image.height; }
};

// A caller's tensor (N, C, H, W); strides count elements.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  bool levels = false;     // whether elements are bytes that show values of `dtype`; see level.h
  bool* finite = nullptr;  // cleared for each image of levels that shows a value that isn't finite
  Index shape[4] = {};
  Index strides[4] = {};
};

class Watch;

// What a kernel sees of a run.
struct Context {
  std::byte* arena = nullptr;
  Index arena_bytes = 0;
  std::byte* state = nullptr;
  std::byte* scratch = nullptr;  // of the thread
  const Tensor* inputs = nullptr;
  const Tensor* outputs = nullptr;
  // By image: whether a value is beyond the range of the type in which it is stored.
  std::atomic<bool>* overflowed = nullptr;
  Index images = 1;
  Watch* watch = nullptr;
  bool leads = false;  // whether the thread asks the watch, or sees what it found

  // What lies at an offset. Kernels of several instruction sets may share no code.
  [[gnu::always_inline]] std::byte* at(Index offset) const {
    return offset < arena_bytes ? arena + offset : state + (offset - arena_bytes);
  }
  // Notes a value of an image beyond the range; frames of one video follow each other in a batch.
  [[gnu::always_inline]] void overflow(Index n) const {
    overflowed[n % images].store(true, std::memory_order_relaxed);
  }
};

// Whether the run ends: an item that takes long looks now and then, and may be left half done.
bool stopped(const Context& context);

}  // namespace rbln_vae
