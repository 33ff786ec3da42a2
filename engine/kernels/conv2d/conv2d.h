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

// What is done with the sums of a product: bias and residual are added, the result is
// stored, and the statistics of its channels are kept. It can be done a few pixels at a
// time, so that an instruction set whose products run beside its vectors overlaps them.
template <class Simd>
class Epilogue {
  using T = typename Simd::T;
  using Vector = typename Simd::Vector;

 public:
  // Sums of `rows` x `pixels` outputs whose first is (y, x), for `panels` panels.
  struct Job {
    const float* sums;  // [panels][rows][pitch][16]
    Index pitch;
    Index panel;
    Index panels;
    Index rows;
    Index pixels;
    T* output;          // of the first pixel, in the block of the first panel
    const T* residual;  // likewise, or null
    Index pixel_step;   // elements from one output pixel to the next
    Index row_step;
    Index block_step;
    bool first;  // of the tile, for these panels
    bool last;
  };

  Epilogue(const ConvStep& s, float* partials, Index points)
      : s_(s), partials_(partials), points_(points) {}

  // The job before must be finished.
  void start(const Job& job) {
    job_ = job;
    p_ = row_ = pixel_ = 0;
    left_ = job.panels * job.rows * job.pixels;
  }

  Index left() const { return left_; }

  void advance(Index count) {
    while (count > 0 && left_ > 0) {
      const Index now = smaller(count, job_.pixels - pixel_);
      do_pixels(now);
      count -= now;
      left_ -= now;
      pixel_ += now;
      if (pixel_ < job_.pixels) continue;
      end_row();
      pixel_ = 0;
      if (++row_ < job_.rows) continue;
      if (job_.last && partials_ != nullptr) end_panel();
      row_ = 0;
      ++p_;
    }
  }

  void finish() { advance(left_); }

 private:
  // Statistics of a panel. Values are taken relative to the tile's first pixel, so that a
  // mean far from zero costs no precision.
  struct Statistics {
    alignas(64) float shift[kPanel];
    alignas(64) float row_sum[kPanel];
    alignas(64) float row_square[kPanel];
    alignas(64) double sum[kPanel];
    alignas(64) double square[kPanel];
  };

  void do_pixels(Index count) {
    const Index panel = job_.panel + p_;
    const Index at = panel / 2 * job_.block_step - job_.panel / 2 * job_.block_step +
                     row_ * job_.row_step + pixel_ * job_.pixel_step + panel % 2 * kPanel;
    const float* sums =
        job_.sums + ((p_ * job_.rows + row_) * job_.pitch + pixel_) * kPanel;
    T* to = job_.output + at;
    const T* residual = job_.residual == nullptr ? nullptr : job_.residual + at;
    const Vector bias = Simd::load(s_.bias + panel * kPanel);
    // The rest of a block that has no channels must read as zero.
    const bool pad = panel % 2 == 0 && panel + 1 == s_.panels();
    const bool count_in = partials_ != nullptr;
    Statistics& statistics = statistics_[p_];
    Vector shift = bias, sum = bias, square = bias;
    if (count_in) {
      if (job_.first && row_ == 0 && pixel_ == 0) {
        Vector v = Simd::add(Simd::load(sums), bias);
        if (residual != nullptr) v = Simd::add(v, Simd::load_elements(residual));
        Simd::store(statistics.shift, v);
        for (Index i = 0; i < kPanel; ++i) statistics.sum[i] = statistics.square[i] = 0.0;
      }
      if (pixel_ == 0) {
        Simd::store(statistics.row_sum, Simd::set(0.0f));
        Simd::store(statistics.row_square, Simd::set(0.0f));
      }
      shift = Simd::load(statistics.shift);
      sum = Simd::load(statistics.row_sum);
      square = Simd::load(statistics.row_square);
    }
    for (Index i = 0; i < count; ++i) {
      Vector v = Simd::add(Simd::load(sums + i * kPanel), bias);
      if (residual != nullptr) {
        v = Simd::add(v, Simd::load_elements(residual + i * job_.pixel_step));
      }
      Simd::store_elements(to + i * job_.pixel_step, v);
      if (pad) Simd::store_elements(to + i * job_.pixel_step + kPanel, Simd::set(0.0f));
      if (count_in) {
        const Vector distance = Simd::subtract(v, shift);
        sum = Simd::add(sum, distance);
        square = Simd::multiply_add(distance, distance, square);
      }
    }
    if (count_in) {
      Simd::store(statistics.row_sum, sum);
      Simd::store(statistics.row_square, square);
    }
  }

  // Sums of a row are added up in double precision.
  void end_row() {
    if (partials_ == nullptr) return;
    Statistics& statistics = statistics_[p_];
    for (Index i = 0; i < kPanel; ++i) {
      statistics.sum[i] += static_cast<double>(statistics.row_sum[i]);
      statistics.square[i] += static_cast<double>(statistics.row_square[i]);
    }
  }

  // The mean of each channel over the tile, and the sum of squared distances from it.
  void end_panel() {
    const Statistics& statistics = statistics_[p_];
    float* means = partials_ + (job_.panel + p_) * kPanel;
    float* squares = means + s_.panels() * kPanel;
    for (Index i = 0; i < kPanel; ++i) {
      const double mean = statistics.sum[i] / static_cast<double>(points_);
      const double rest = statistics.square[i] - statistics.sum[i] * mean;
      means[i] = static_cast<float>(static_cast<double>(statistics.shift[i]) + mean);
      squares[i] = static_cast<float>(rest < 0 ? 0 : rest);
    }
  }

  const ConvStep& s_;
  float* partials_;  // of the tile, or null
  Index points_;     // outputs of the tile, by channel
  Job job_ = {};
  Index p_ = 0;
  Index row_ = 0;
  Index pixel_ = 0;
  Index left_ = 0;
  Statistics statistics_[Simd::kMaxPanels];
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
    float* partials = nullptr;
    if (s_.partials != kNone) {
      partials = reinterpret_cast<float*>(context_.arena + s_.partials) +
                 image_tile_ * 2 * panels * kPanel;
    }
    Epilogue<Simd> epilogue(s_, partials, height_ * width_ * s_.phases());
    for (Index group = first; group < last; ++group) {
      const Index panel = group * Simd::kMaxPanels;
      convolve(panel, smaller(Simd::kMaxPanels, panels - panel), epilogue);
    }
    epilogue.finish();
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
  void convolve(Index panel, Index panels, Epilogue<Simd>& epilogue) {
    const Index phases = s_.phases();
    const Index blocks = s_.input.blocks();
    const Index taps = s_.taps();
    const Index panel_step = phases * blocks * taps * kPanelBlock;
    // Strides that no kernel is made for are done pixel by pixel.
    const Index most = s_.stride <= 2 ? Simd::kMaxPixels : 1;
    const Index chunks = ceil_div(width_, most);
    const Index together = Simd::rows_at_once(smaller(width_, most));
    Index offsets[kMaxTaps];
    Gemm<T> g;
    g.row_step = s_.stride * pitch_ * kBlock;
    g.pixel_step = s_.stride * kBlock;
    g.taps = offsets;
    g.tap_count = taps;
    g.blocks = blocks;
    g.plane = plane_;
    g.last_channels = s_.input.channels - (blocks - 1) * kBlock;
    g.panel_step = panel_step;
    g.panels = panels;

    const Index scale = s_.upsample ? 2 : 1;
    typename Epilogue<Simd>::Job job;
    job.panel = panel;
    job.panels = panels;
    job.pixel_step = scale * kBlock;
    job.row_step = scale * s_.output.width * kBlock;
    job.block_step = s_.output.pixels() * kBlock;
    const Index first_block = n_ * s_.output.blocks() + panel / 2;

    for (Index phase = 0; phase < phases; ++phase) {
      const Index down = phase / 2;
      const Index right = phase % 2;
      for (Index tap = 0; tap < taps; ++tap) {
        const Index dy = tap / s_.kernel_width + down;
        const Index dx = tap % s_.kernel_width + right;
        offsets[tap] = (dy * pitch_ + dx) * kBlock;
      }
      g.b = static_cast<const T*>(s_.weights) + panel * panel_step +
            phase * blocks * taps * kPanelBlock;
      for (Index row = 0; row < height_; row += together) {
        g.rows = smaller(together, height_ - row);
        for (Index chunk = 0; chunk < chunks; ++chunk) {
          // Divided evenly, or into as many whole tiles as there are.
          const Index column = Simd::kWholeTiles ? chunk * most : width_ * chunk / chunks;
          const Index end = Simd::kWholeTiles ? smaller(column + most, width_)
                                              : width_ * (chunk + 1) / chunks;
          g.pixels = end - column;
          g.a = scratch_ + row * g.row_step + column * g.pixel_step;
          g.c = sums_[turn_];
          const Index y = (y_ + row) * scale + down;
          const Index x = (x_ + column) * scale + right;
          const Index at =
              (first_block * s_.output.pixels() + y * s_.output.width + x) * kBlock;
          job.sums = g.c;
          job.pitch = Simd::sums_pitch(g.pixels);
          job.rows = g.rows;
          job.pixels = g.pixels;
          job.output = image(s_.output.offset) + at;
          job.residual = s_.residual == kNone ? nullptr : image(s_.residual) + at;
          job.first = phase == 0 && row == 0 && chunk == 0;
          job.last = phase + 1 == phases && row + g.rows == height_ && chunk + 1 == chunks;
          if constexpr (Simd::kOverlaps) {
            // The sums of the product before are stored while this one runs.
            const Index share = ceil_div(epilogue.left(), blocks * taps);
            Simd::gemm(g, [&] { epilogue.advance(share); });
            epilogue.finish();
            epilogue.start(job);
            turn_ ^= 1;
          } else {
            Simd::gemm(g);
            epilogue.start(job);
            epilogue.finish();
          }
        }
      }
    }
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
  // Two where the sums of one product are stored during the next.
  Index turn_ = 0;
  alignas(64) float sums_[Simd::kOverlaps ? 2 : 1]
                         [Simd::kMaxPanels * Simd::kMaxRows * Simd::kMaxPixels * kPanel];
};

template <class Simd>
constexpr Conv2dKernels conv2d_kernels() {
  return {Simd::kMaxRows, Simd::kMaxPixels, Simd::kMaxPanels, Conv2d<Simd>::scratch_bytes,
          Conv2d<Simd>::run};
}

}  // namespace rbln_vae
