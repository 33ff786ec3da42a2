#include "engine/plan.h"

#include <initializer_list>
#include <limits>
#include <stdexcept>

namespace rbln_vae {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void require(bool condition, const char* message) {
  if (!condition) refuse(message);
}

// The product of sizes, none of them negative.
Index product(const char* what, std::initializer_list<Index> sizes) {
  Index result = 1;
  for (const Index size : sizes) {
    if (size < 0 || __builtin_mul_overflow(result, size, &result)) {
      refuse(std::string(what) + ": a size overflows");
    }
  }
  return result;
}

void check_tiles(Index height, Index width, Index grid_height, Index grid_width) {
  require(height > 0 && width > 0 && height <= grid_height && width <= grid_width,
          "tiles or cells larger than the image, or empty");
}

// Whether parts of a side consist of whole smaller parts.
bool consists(Index large, Index small, Index side) {
  return large % small == 0 || large >= side;
}

// Whether so many frames can be made at once, by filtering over time.
bool filters(Index frames) { return frames == 2 || frames == 4; }

// Whether the rows of an image are rows of a tensor, from the first one given.
void check_rows(const char* what, const Shape& tensor, Index batch, const Image& image,
                Index first_row) {
  if (tensor[0] != batch || tensor[1] != image.channels || tensor[3] != image.width ||
      first_row < 0 || image.height > tensor[2] - first_row) {
    refuse(std::string(what) + " hasn't the shape of the plan");
  }
}

}  // namespace

Plan::Plan(const Kernels& kernels, Index arena_bytes, const Shape& input, const Shape& output,
           Index inputs, Index outputs, Index state_bytes)
    : kernels_(kernels),
      arena_bytes_(arena_bytes),
      input_shape_(input),
      output_shape_(output),
      inputs_(inputs),
      outputs_(outputs),
      state_bytes_(state_bytes) {
  require(arena_bytes >= 0 && arena_bytes < std::numeric_limits<Index>::max() / 2 &&
              state_bytes >= 0 && state_bytes < std::numeric_limits<Index>::max() / 2,
          "the size of the arena overflows");
  require(inputs > 0 && outputs > 0, "a run without inputs or outputs");
}

void Plan::append(Step step, Index items, Index scratch) {
  constexpr Index most = std::numeric_limits<std::int32_t>::max();
  require(items > 0 && items < most, "a step has too many items");
  require(scratch >= 0 && scratch < std::numeric_limits<Index>::max() / 4096,
          "the scratch of a step overflows");
  steps_.push_back(std::move(step));
  items_.push_back(items);
  ranges_.push_back(std::move(checked_));
  checked_.clear();
  if (scratch > scratch_bytes_) scratch_bytes_ = scratch;
}

void Plan::check_range(const char* what, Index offset, Index bytes) const {
  const Index end = offset < arena_bytes_ ? arena_bytes_ : arena_bytes_ + state_bytes_;
  if (offset < 0 || offset % 64 != 0 || bytes < 0 || offset > end - bytes) {
    refuse(std::string(what) + ": " + std::to_string(bytes) + " bytes at " +
           std::to_string(offset) + " don't lie in an arena of " + std::to_string(arena_bytes_) +
           " or a state of " + std::to_string(state_bytes_));
  }
  checked_.push_back({offset, bytes});
}

void Plan::check_kernels(Index offset, const float* kept, Index kept_bytes, Index bytes) const {
  if (kept == nullptr) {
    check_range("kernels", offset, bytes);
  } else {
    require(kept_bytes >= bytes, "kept kernels of another size");
  }
}

void Plan::check_image(const char* what, Index batch, const Image& image) const {
  require(batch > 0 && image.channels > 0 && image.height > 0 && image.width > 0,
          "an image without pixels");
  require(image.channels < (Index{1} << 31), "an image with too many channels");
  // Before any sum: neither of the steps can overflow it.
  product(what, {batch, image.sample, kBlock, element_bytes()});
  const Index row = product(what, {image.blocks(), image.width});
  require(image.row >= row && image.sample >= product(what, {image.height, image.row}),
          "rows of an image overlap");
  const Index last = (batch - 1) * image.sample + (image.height - 1) * image.row;
  check_range(what, image.offset, product(what, {last + row, kBlock, element_bytes()}));
}

void Plan::check_residual(Index batch, const Image& residual, const Image& output) const {
  if (residual.channels == 0) return;
  check_image("residual", batch, residual);
  require(residual.channels == output.channels && residual.height == output.height &&
              residual.width == output.width,
          "a residual of another size than the output");
}

void Plan::check_activation(Activation activation) {
  require(activation >= Activation::kNone && activation <= kLastActivation,
          "unknown activation");
}

void Plan::check_reading(Index batch, const Image& image, const Reading& reading) const {
  check_activation(reading.activation);
  if (reading.coefficients == kNone) return;
  check_range("coefficients", reading.coefficients,
              product("coefficients", {batch, 2, image.blocks(), kBlock, 4}));
}

void Plan::add(const ImportStep& s) {
  check_image("import", s.batch, s.image);
  check_rows("the input", input_shape_, s.batch, s.image, s.first_row);
  require(s.tensor >= 0 && s.tensor < inputs_, "an input that isn't there");
  append(s, product("import", {s.batch, s.image.blocks(), s.image.height}), 0);
}

void Plan::add(const ExportStep& s) {
  check_image("export", s.batch, s.image);
  check_rows("the output", output_shape_, s.batch, s.image, s.first_row);
  require(s.tensor >= 0 && s.tensor < outputs_, "an output that isn't there");
  append(s, product("export", {s.batch, s.image.blocks(), s.image.height}), 0);
}

void Plan::add(const ConvStep& s, Index weight_bytes, Index bias_bytes, Index gamma_bytes,
               Index kept_bytes) {
  check_image("convolution input", s.batch, s.input);
  check_image("convolution output", s.batch, s.output);
  check_reading(s.batch, s.input, s.reading);
  check_activation(s.output_activation);
  check_residual(s.batch, s.residual, s.output);
  require(s.stacked > 0 && s.batch % s.stacked == 0 && s.at_once > 0 &&
              s.stacked % s.at_once == 0,
          "a batch that isn't made of whole stacks of frames");
  for (Index i = 0; i < ConvStep::kMostEarlier; ++i) {
    const Image& image = s.earlier[static_cast<std::size_t>(i)];
    if (image.channels == 0) {
      require(s.over_clip || i + 1 >= s.sources(), "a frame is missing among earlier ones");
      continue;
    }
    check_image("an earlier frame", s.videos(), image);
    require(image.channels == s.input.channels && image.height == s.input.height &&
                image.width == s.input.width,
            "an earlier frame of another size than the input");
  }
  require(s.left_out >= 0 && s.left_out <= ConvStep::kMostEarlier, "too many frames of zeros");
  require(!s.over_clip || (s.earlier[0].channels == 0 && s.left_out == 0 && !s.doubles &&
                           s.gamma == nullptr),
          "a convolution over a clip that takes other frames, doubles or has an RMS norm");
  require(s.stacked == 1 || (!s.over_clip && s.left_out == 0 && s.before() > 0),
          "a stack of frames without those before it");
  require(!s.over_time() ||
              (s.winograd() && filters(s.at_once) && s.phases() == 1 && s.stride == 1 &&
               s.sources() == WinogradStep::kFrames && s.partials == kNone),
          "frames that can't be made at once");
  require(s.over_clip || s.left_out + s.sources() == 1 ||
              (s.reading.coefficients == kNone && !s.doubles),
          "several frames before a convolution that takes one");
  if (s.gamma != nullptr) {
    require(s.reading.coefficients == kNone, "two norms before one convolution");
    require(gamma_bytes == s.input.blocks() * kBlock * 4, "norm weights of another size");
    require(static_cast<float>(s.eps) > 0, "an RMS norm needs an eps above zero");
  }
  constexpr Index far = 1 << 20;
  require(s.kernel_height > 0 && s.kernel_width > 0 && s.kernel_height < far &&
              s.kernel_width < far && s.taps() <= kMaxTaps,
          "a convolution kernel of this size isn't supported");
  require(s.stride > 0 && s.stride < far && s.above >= 0 && s.above < far && s.left >= 0 &&
              s.left < far,
          "stride or padding out of range");
  check_tiles(s.tile_height, s.tile_width, s.grid_height(), s.grid_width());
  check_tiles(s.cell_height, s.cell_width, s.grid_height(), s.grid_width());
  require(consists(s.tile_height, s.cell_height, s.grid_height()) &&
              consists(s.tile_width, s.cell_width, s.grid_width()),
          "tiles that don't consist of whole cells");
  require(s.splits > 0 && s.splits <= s.panels(), "more splits than panels");
  if (s.upsample) {
    require(s.kernel_height == 3 && s.kernel_width == 3 && s.stride == 1,
            "upsampling needs kernels of 3x3 and stride 1");
    require(s.output.height % 2 == 0 && s.output.height / 2 <= s.input.height &&
                s.output.width == 2 * s.input.width,
            "the output of upsampling isn't twice its input");
  }
  require(!s.doubles || (s.upsample && !s.winograd()),
          "doubling is a kind of upsampling, and has an algorithm of its own");
  if (s.unit() > 1) {
    require(s.together == 1, "one tile for each item");
    require(consists(s.cell_height, s.unit(), s.grid_height()) &&
                consists(s.cell_width, s.unit(), s.grid_width()),
            "cells that don't begin where squares of outputs do");
    require(s.phases() == 1 || (s.cell_height >= s.tile_height && s.cell_width >= s.tile_width),
            "several cells in a tile whose phases are computed one after the other");
    product("scratch",
            {s.blocks(), s.at_once, s.rows_read(), s.columns_read(), kBlock, 16});
    if (s.over_time()) {
      product("sums", {s.panels(), kPanel, s.frames_read(), s.rows_read(), s.columns_read(), 16});
    }
  }
  if (s.winograd()) {
    require(kernels_.winograd_kernels != nullptr && s.stride <= 2 && s.kernel_height == 3 &&
                s.kernel_width == 3,
            "Winograd's algorithm needs kernels of 3x3 with stride 1 or 2, and not AMX");
    check_kernels(s.kernels, s.kept, kept_bytes,
                  product("kernels", {s.panels(), s.phases(), WinogradStep::kMatrices,
                                      s.over_time() ? s.frames_read() * s.input.blocks() : s.blocks(),
                                      kBlock, kPanel, 4}));
  } else {
    const Index weights = product("weights", {s.panels(), s.phases(), s.packed_blocks(),
                                              s.matrices(), kBlock, kPanel, element_bytes()});
    require(s.weights != nullptr && weights == weight_bytes, "packed weights of another size");
    require(s.kept == nullptr, "kept kernels of a convolution without Winograd's algorithm");
  }
  const Index biases = s.bias_step() == 0 ? 1 : s.phases();
  require(s.bias != nullptr && bias_bytes == biases * s.panels() * kPanel * 4,
          "a bias of another size");
  if (s.partials != kNone) {
    const Index cells = product("cells", {s.cells_down(), s.cells_across()});
    require(s.cells_apart() >= cells, "statistics of images overlap");
    const Index before = product("cells", {s.batch - 1, s.cells_apart()});
    check_range("statistics", s.partials,
                product("statistics", {before + cells, 2, s.panels(), kPanel, 4}));
  }
  product("scratch", {s.blocks(), s.rows_read(), s.columns_read(), kBlock, 8});
  require(s.together > 0, "an item without tiles");
  product("items", {s.batch, s.tiles_down(), s.tiles_across(), s.splits});
  append(s, s.items(),
         kernels_.conv2d_scratch(s));
}

void Plan::add(const WinogradStep& s, Index weight_bytes, Index kept_bytes) {
  require(kernels_.winograd_kernels != nullptr, "AMX has no Winograd's algorithm");
  require(s.blocks > 0 && s.blocks < (Index{1} << 31) && s.skipped >= 0 &&
              s.skipped < (Index{1} << 31),
          "blocks that aren't there");
  require(s.stride == 1 || s.stride == 2, "kernels for a stride that isn't supported");
  require(s.at_once == 1 || (filters(s.at_once) && s.skipped == 0 && s.stride == 1),
          "kernels for frames that can't be made at once");
  const Index weights =
      product("weights", {s.panels, s.phases, s.packed_blocks(), s.kTaps, kBlock, kPanel,
                          element_bytes()});
  require(s.weights != nullptr && weights > 0 && weights == weight_bytes,
          "packed weights of another size");
  check_kernels(
      s.kernels, s.kept, kept_bytes,
      product("kernels",
              {s.panels, s.phases, s.times(), s.kMatrices, s.blocks, kBlock, kPanel, 4}));
  append(s, s.items(), 0);
}

void Plan::add(const StatisticsStep& s) {
  check_image("statistics input", s.batch, s.input);
  check_tiles(s.cell_height, s.cell_width, s.input.height, s.input.width);
  check_range("statistics", s.partials,
              product("statistics", {s.batch, s.cells_down(), s.cells_across(), 2,
                                     s.input.blocks(), kBlock, 4}));
  append(s, product("items", {s.batch, s.cells_down(), s.cells_across()}), 0);
}

void Plan::add(const NormStep& s, Index weight_bytes, Index bias_bytes) {
  require(s.batch > 0 && s.channels > 0 && s.groups > 0 && s.channels % s.groups == 0,
          "channels don't make groups");
  require(s.weight != nullptr && s.bias != nullptr && weight_bytes == 4 * s.channels &&
              bias_bytes == 4 * s.channels,
          "norm weights of another size");
  require(s.grid_height > 0 && s.grid_width > 0 && s.points > 0 &&
              s.partial_channels >= s.channels,
          "statistics without pixels");
  product("statistics", {s.batch, s.grid_height, s.grid_width, s.points, s.partial_channels});
  check_tiles(s.cell_height, s.cell_width, s.grid_height, s.grid_width);
  check_range("statistics", s.partials,
              product("statistics", {s.batch, s.cells_down(), s.cells_across(), 2,
                                     s.partial_channels, 4}));
  check_range("coefficients", s.coefficients,
              product("coefficients", {s.batch, 2, ceil_div(s.channels, kBlock), kBlock, 4}));
  append(s, s.items(), 0);
}

void Plan::add(const AttentionPackStep& s) {
  check_image("key", s.batch, s.key);
  check_image("value", s.batch, s.value);
  require(s.key.height == s.value.height && s.key.width == s.value.width,
          "keys and values of different sizes");
  require(s.heads > 0 && s.key.channels % s.heads == 0 && s.value.channels % s.heads == 0,
          "channels don't make heads");
  check_range("packed keys", s.packed_keys,
              product("packed keys",
                      {s.batch, s.heads, s.key_blocks(), 2, ceil_div(s.key_channels(), kBlock),
                       kBlock, kPanel, element_bytes()}));
  check_range("packed values", s.packed_values,
              product("packed values",
                      {s.batch, s.heads, ceil_div(s.value_channels(), kPanel), s.key_blocks(),
                       kBlock, kPanel, element_bytes()}));
  append(s, product("items", {s.batch, s.heads, s.key_blocks()}), 0);
}

void Plan::add(const AttentionStep& s) {
  check_image("query", s.batch, s.query);
  check_image("attention", s.batch, s.output);
  check_residual(s.batch, s.residual, s.output);
  require(s.query.height == s.output.height && s.query.width == s.output.width,
          "queries and results of different sizes");
  require(s.heads > 0 && s.query.channels % s.heads == 0 && s.output.channels % s.heads == 0,
          "channels don't make heads");
  require(static_cast<float>(s.scale) > 0, "attention needs a scale above zero");
  require(s.queries > 0 && s.keys > 0 && s.keys % kBlock == 0 && s.queries < (1 << 20) &&
              s.keys < (1 << 20),
          "blocks of queries or keys out of range");
  check_range("packed keys", s.packed_keys,
              product("packed keys",
                      {s.batch, s.heads, s.key_blocks(), 2, ceil_div(s.key_channels(), kBlock),
                       kBlock, kPanel, element_bytes()}));
  check_range("packed values", s.packed_values,
              product("packed values",
                      {s.batch, s.heads, ceil_div(s.value_channels(), kPanel), s.key_blocks(),
                       kBlock, kPanel, element_bytes()}));
  append(s, product("items", {s.batch, s.heads, s.query_parts()}), kernels_.attention_scratch(s));
}

void Plan::add(const ModulateStep& s) {
  check_image("input", s.batch, s.input);
  check_image("output", s.batch, s.output);
  check_reading(s.batch, s.input, {.coefficients = s.coefficients});
  check_image("scale", s.batch, s.scale);
  require(s.input.channels == s.output.channels && s.input.height == s.output.height &&
              s.input.width == s.output.width,
          "an output of another size than the input");
  require(s.factor > 0 && s.scale.channels == s.input.channels &&
              s.input.height % s.factor == 0 && s.scale.height == s.input.height / s.factor &&
              s.input.width % s.factor == 0 && s.scale.width == s.input.width / s.factor,
          "the input isn't larger than the scale by the factor");
  if (s.shift.channels != 0) {
    check_image("shift", s.batch, s.shift);
    require(s.shift.channels == s.scale.channels && s.shift.height == s.scale.height &&
                s.shift.width == s.scale.width,
            "a shift of another size than the scale");
  }
  append(s, product("items", {s.batch, s.output.blocks(), s.output.height}), 0);
}

void Plan::add(const PointwiseStep& s) {
  check_image("input", s.batch, s.input);
  check_image("output", s.batch, s.output);
  check_reading(s.batch, s.input, s.reading);
  require(s.input.channels == s.output.channels, "channels differ");
  require(s.above >= 0 && s.left >= 0, "negative padding");
  check_residual(s.batch, s.residual, s.output);
  append(s, product("items", {s.batch, s.output.blocks(), s.output.height}), 0);
}

void Plan::add(const ShuffleStep& s, Index order_bytes) {
  check_image("input", s.batch, s.input);
  check_image("output", s.batch, s.output);
  const Index up = s.up(), down = s.down();
  require(s.output.height * down == s.input.height * up &&
              s.output.width * down == s.input.width * up,
          "a shuffle that neither keeps, doubles nor halves an image");
  const Index elements = product("order", {s.output.channels, up, up});
  require(s.order != nullptr && order_bytes == product("order", {elements, 4}),
          "an order of another size");
  const Index most = product("cells", {s.input.channels, down, down});
  for (Index i = 0; i < elements; ++i) {
    require(s.order[i] >= 0 && s.order[i] < most, "an order of channels that aren't there");
  }
  append(s, product("items", {s.batch, s.output.blocks(), s.output.height}), 0);
}

void Plan::add(const MoveRowsStep& s) {
  check_image("rows", s.batch, s.image);
  require(s.from_row >= 0 && s.rows > 0 && s.rows <= s.image.height - s.from_row,
          "rows that the image doesn't have");
  append(s, product("items", {s.batch, s.image.blocks()}), 0);
}

void Plan::run_item(std::size_t step, const Context& context, Index item) const {
  struct Runner {
    const Kernels& kernels;
    const Context& context;
    Index item;

    void operator()(const ImportStep& s) { import_image(kernels.dtype, s, context, item); }
    void operator()(const ExportStep& s) { export_image(kernels.dtype, s, context, item); }
    void operator()(const ConvStep& s) { kernels.conv2d(s, context, item); }
    void operator()(const WinogradStep& s) { kernels.winograd_kernels(s, context, item); }
    void operator()(const StatisticsStep& s) { statistics(kernels.dtype, s, context, item); }
    void operator()(const NormStep& s) { norm(s, context, item); }
    void operator()(const AttentionPackStep& s) { kernels.attention_pack(s, context, item); }
    void operator()(const AttentionStep& s) { kernels.attention(s, context, item); }
    void operator()(const ModulateStep& s) { modulate(kernels.dtype, s, context, item); }
    void operator()(const PointwiseStep& s) { pointwise(kernels.dtype, s, context, item); }
    void operator()(const ShuffleStep& s) { shuffle(kernels.dtype, s, context, item); }
    void operator()(const MoveRowsStep& s) { move_rows(kernels.dtype, s, context, item); }
  };
  std::visit(Runner{kernels_, context, item}, steps_[step]);
}

}  // namespace rbln_vae
