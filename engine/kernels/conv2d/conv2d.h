// A convolution for one instruction set: an item of the step is one tile of the image,
// for some of the output channels.
//
// The tile's input is copied into the thread's scratch, with its halo and the zeros
// around the image, while the norm and the activation are applied: so each is computed
// once for a tile, and the product reads aligned memory that stays in the L2 cache.
// Sums are finished in registers; bias, residual and statistics follow at once.
#pragma once

#include <cstring>

#include "engine/kernels/activation.h"
#include "engine/kernels/sets.h"
#include "engine/kernels/simd/gemm.h"
#include "engine/steps.h"

namespace rbln_vae {

// Where an instruction set keeps the sums of one product, and the running statistics.
template <class Simd>
struct ConvSums {
  alignas(64) float c[Simd::kMaxPanels * Simd::kMaxRows * Simd::kMaxPixels * kPanel];
};

// Statistics of one panel of channels over a tile. Values are taken relative to the
// tile's first pixel, so that a mean far from zero costs no precision.
template <class Simd>
class PanelStatistics {
 public:
  using Vector = typename Simd::Vector;

  void begin() { empty_ = true; }

  void add_row(const Vector* values, Index count) {
    if (empty_) {
      Simd::store(shift_, values[0]);
      for (Index i = 0; i < kPanel; ++i) sum_[i] = square_[i] = 0.0;
      empty_ = false;
    }
    const Vector shift = Simd::load(shift_);
    Vector sum = Simd::set(0.0f);
    Vector square = Simd::set(0.0f);
    for (Index i = 0; i < count; ++i) {
      const Vector d = Simd::subtract(values[i], shift);
      sum = Simd::add(sum, d);
      square = Simd::multiply_add(d, d, square);
    }
    alignas(64) float sums[kPanel], squares[kPanel];
    Simd::store(sums, sum);
    Simd::store(squares, square);
    for (Index i = 0; i < kPanel; ++i) {
      sum_[i] += sums[i];
      square_[i] += squares[i];
    }
  }

  // The mean of each channel, and the sum of squared distances from it.
  void finish(Index count, float* means, float* squares) const {
    for (Index i = 0; i < kPanel; ++i) {
      const double mean = sum_[i] / static_cast<double>(count);
      const double rest = square_[i] - sum_[i] * mean;
      means[i] = static_cast<float>(shift_[i] + mean);
      squares[i] = static_cast<float>(rest < 0 ? 0 : rest);
    }
  }

 private:
  bool empty_ = true;
  alignas(64) float shift_[kPanel];
  alignas(64) double sum_[kPanel];
  alignas(64) double square_[kPanel];
};

template <class Simd>
class Conv2d {
  using T = typename Simd::T;
  using Vector = typename Simd::Vector;

 public:
  static Index scratch_bytes(const ConvStep& s) {
    // Kernels may read, and throw away, a row of pixels beyond the last.
    const Index slack = (Simd::kMaxPixels + 1) * s.stride;
    return (s.input.blocks() * s.rows_read() * s.columns_read() + slack) * kBlock *
           static_cast<Index>(sizeof(T));
  }

  static void run(const ConvStep& s, const Context& context, Index item) {
    Conv2d(s, context, item).run();
  }

 private:
  Conv2d(const ConvStep& s, const Context& context, Index item) : s_(s), context_(context) {
    split_ = item % s.splits;
    item /= s.splits;
    image_tile_ = item;
    const Index column = item % s.tiles_across();
    item /= s.tiles_across();
    const Index row = item % s.tiles_down();
    n_ = item / s.tiles_down();
    y_ = row * s.tile_height;
    x_ = column * s.tile_width;
    height_ = smaller(s.tile_height, s.grid_height() - y_);
    width_ = smaller(s.tile_width, s.grid_width() - x_);
    pitch_ = s.columns_read();
    plane_ = s.rows_read() * pitch_ * kBlock;
    scratch_ = reinterpret_cast<T*>(context.scratch);
  }

  T* image(Index offset) const { return reinterpret_cast<T*>(context_.arena + offset); }

  void run() {
    Simd::enter();
    load();
    const Index panels = s_.panels();
    // Whole groups of panels, divided evenly.
    const Index groups = ceil_div(panels, Simd::kMaxPanels);
    const Index first = groups * split_ / s_.splits;
    const Index last = groups * (split_ + 1) / s_.splits;
    for (Index group = first; group < last; ++group) {
      const Index panel = group * Simd::kMaxPanels;
      convolve(panel, smaller(Simd::kMaxPanels, panels - panel));
    }
    Simd::leave();
  }

  // Copies what the tile reads into the scratch.
  void load() {
    const Index top = s_.upsample ? y_ - 1 : y_ * s_.stride - s_.above;
    const Index left = s_.upsample ? x_ - 1 : x_ * s_.stride - s_.left;
    const Index rows = s_.upsample ? height_ + 2 : (height_ - 1) * s_.stride + s_.kernel_height;
    const Index columns = s_.upsample ? width_ + 2 : (width_ - 1) * s_.stride + s_.kernel_width;
    // The part of the columns that lies in the image.
    const Index begin = smaller(columns, larger(0, -left));
    const Index end = larger(begin, smaller(columns, s_.input.width - left));
    const Index blocks = s_.input.blocks();
    const T* source = image(s_.input.offset) + n_ * blocks * s_.input.pixels() * kBlock;
    const float* coefficients = nullptr;
    if (s_.reading.coefficients != kNone) {
      coefficients = reinterpret_cast<const float*>(context_.arena + s_.reading.coefficients) +
                     n_ * 2 * blocks * kBlock;
    }
    for (Index block = 0; block < blocks; ++block) {
      for (Index row = 0; row < rows; ++row) {
        T* to = scratch_ + block * plane_ + row * pitch_ * kBlock;
        const Index y = top + row;
        if (y < 0 || y >= s_.input.height) {
          zero(to, columns);
          continue;
        }
        zero(to, begin);
        zero(to + end * kBlock, columns - end);
        const T* from =
            source + ((block * s_.input.height + y) * s_.input.width + left + begin) * kBlock;
        read(from, to + begin * kBlock, end - begin, coefficients, block, blocks);
      }
    }
  }

  static void zero(T* to, Index pixels) {
    std::memset(static_cast<void*>(to), 0, static_cast<std::size_t>(pixels * kBlock) * sizeof(T));
  }

  void read(const T* from, T* to, Index pixels, const float* coefficients, Index block,
            Index blocks) const {
    if (coefficients == nullptr && s_.reading.activation == Activation::kNone) {
      std::memcpy(static_cast<void*>(to), from,
                  static_cast<std::size_t>(pixels * kBlock) * sizeof(T));
      return;
    }
    Vector scale[2] = {Simd::set(1.0f), Simd::set(1.0f)};
    Vector shift[2] = {Simd::set(0.0f), Simd::set(0.0f)};
    if (coefficients != nullptr) {
      for (Index half = 0; half < 2; ++half) {
        scale[half] = Simd::load(coefficients + block * kBlock + half * kPanel);
        shift[half] = Simd::load(coefficients + (blocks + block) * kBlock + half * kPanel);
      }
    }
    switch (s_.reading.activation) {
      case Activation::kSilu:
        for (Index i = 0; i < 2 * pixels; ++i) {
          const Vector x = Simd::load_elements(from + i * kPanel);
          const Vector y = Simd::multiply_add(x, scale[i % 2], shift[i % 2]);
          Simd::store_elements(to + i * kPanel, Simd::silu(y));
        }
        break;
      case Activation::kNone:
        for (Index i = 0; i < 2 * pixels; ++i) {
          const Vector x = Simd::load_elements(from + i * kPanel);
          Simd::store_elements(to + i * kPanel,
                               Simd::multiply_add(x, scale[i % 2], shift[i % 2]));
        }
        break;
      default:
        for (Index i = 0; i < 2 * pixels; ++i) {
          const Vector x = Simd::load_elements(from + i * kPanel);
          alignas(64) float lanes[kPanel];
          Simd::store(lanes, Simd::multiply_add(x, scale[i % 2], shift[i % 2]));
          for (float& lane : lanes) lane = activate(s_.reading.activation, lane);
          Simd::store_elements(to + i * kPanel, Simd::load(lanes));
        }
    }
  }

  // All pixels of the tile for a few panels.
  void convolve(Index panel, Index panels) {
    const Index phases = s_.phases();
    const Index blocks = s_.input.blocks();
    const Index taps = s_.taps();
    const Index panel_step = phases * blocks * taps * kPanelBlock;
    // Strides that no kernel is made for are done pixel by pixel.
    const Index most = s_.stride <= 2 ? Simd::kMaxPixels : 1;
    const Index chunks = ceil_div(width_, most);
    Index offsets[kMaxTaps];
    for (Index p = 0; p < panels; ++p) statistics_[p].begin();
    for (Index phase = 0; phase < phases; ++phase) {
      const Index down = phase / 2;
      const Index right = phase % 2;
      for (Index tap = 0; tap < taps; ++tap) {
        const Index dy = tap / s_.kernel_width + down;
        const Index dx = tap % s_.kernel_width + right;
        offsets[tap] = (dy * pitch_ + dx) * kBlock;
      }
      Gemm<T> g;
      g.row_step = s_.stride * pitch_ * kBlock;
      g.pixel_step = s_.stride * kBlock;
      g.taps = offsets;
      g.tap_count = taps;
      g.blocks = blocks;
      g.plane = plane_;
      g.last_channels = s_.input.channels - (blocks - 1) * kBlock;
      g.b = static_cast<const T*>(s_.weights) + panel * panel_step +
            phase * blocks * taps * kPanelBlock;
      g.panel_step = panel_step;
      g.panels = panels;
      g.c = sums_.c;
      for (Index row = 0; row < height_; row += Simd::kMaxRows) {
        g.rows = smaller(Simd::kMaxRows, height_ - row);
        for (Index chunk = 0; chunk < chunks; ++chunk) {
          const Index column = width_ * chunk / chunks;
          g.pixels = width_ * (chunk + 1) / chunks - column;
          g.a = scratch_ + row * g.row_step + column * g.pixel_step;
          Simd::gemm(g);
          for (Index p = 0; p < panels; ++p) {
            for (Index r = 0; r < g.rows; ++r) {
              store(panel, p, sums_.c + (p * Simd::kMaxRows + r) * Simd::kMaxPixels * kPanel,
                    y_ + row + r, x_ + column, g.pixels, phase);
            }
          }
        }
      }
    }
    if (s_.partials != kNone) {
      const Index width = s_.panels() * kPanel;
      float* partials = reinterpret_cast<float*>(context_.arena + s_.partials) +
                        image_tile_ * 2 * width;
      for (Index p = 0; p < panels; ++p) {
        float* means = partials + (panel + p) * kPanel;
        statistics_[p].finish(height_ * width_ * phases, means, means + width);
      }
    }
  }

  // Adds bias and residual to a row of sums, stores it and counts it in the statistics.
  void store(Index first_panel, Index p, const float* c, Index y, Index x, Index pixels,
             Index phase) {
    const Index panel = first_panel + p;
    const Index step = s_.upsample ? 2 : 1;
    if (s_.upsample) {
      y = 2 * y + phase / 2;
      x = 2 * x + phase % 2;
    }
    const Index plane = n_ * s_.output.blocks() + panel / 2;
    const Index at =
        ((plane * s_.output.height + y) * s_.output.width + x) * kBlock + panel % 2 * kPanel;
    T* to = image(s_.output.offset) + at;
    const T* residual = s_.residual == kNone ? nullptr : image(s_.residual) + at;
    const Vector bias = Simd::load(s_.bias + panel * kPanel);
    Vector values[Simd::kMaxPixels];
    for (Index i = 0; i < pixels; ++i) {
      Vector v = Simd::add(Simd::load(c + i * kPanel), bias);
      if (residual != nullptr) {
        v = Simd::add(v, Simd::load_elements(residual + i * step * kBlock));
      }
      Simd::store_elements(to + i * step * kBlock, v);
      values[i] = v;
    }
    if (panel % 2 == 0 && panel + 1 == s_.panels()) {
      // The rest of the block has no channels, and must read as zero.
      for (Index i = 0; i < pixels; ++i) {
        Simd::store_elements(to + i * step * kBlock + kPanel, Simd::set(0.0f));
      }
    }
    if (s_.partials != kNone) statistics_[p].add_row(values, pixels);
  }

  const ConvStep& s_;
  const Context& context_;
  Index split_;
  Index image_tile_;
  Index n_;
  Index y_;
  Index x_;
  Index height_;
  Index width_;
  Index pitch_;
  Index plane_;
  T* scratch_;
  ConvSums<Simd> sums_;
  PanelStatistics<Simd> statistics_[Simd::kMaxPanels];
};

template <class Simd>
constexpr Conv2dKernels conv2d_kernels() {
  return {Simd::kMaxRows, Simd::kMaxPixels, Simd::kMaxPanels, Conv2d<Simd>::scratch_bytes,
          Conv2d<Simd>::run};
}

}  // namespace rbln_vae
