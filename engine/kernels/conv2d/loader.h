// Copies the input of a tile into a thread's scratch: with its halo and the zeros around the
// image, with norm and activation applied, in the type of the scratch. It can load a few pixels
// at a time: an instruction set whose products run in parallel to its vector units loads one tile
// during the products of another.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "engine/kernels/activation.h"
#include "engine/kernels/simd/instruction_set.h"
#include "engine/steps.h"

namespace rbln_vae {

// A part of the grid of one image: a tile, or a cell of one.
struct ConvTile {
  Index n;
  Index y;
  Index x;
  Index height;
  Index width;

  // Inlined, since kernels of several instruction sets may share no code.
  [[gnu::always_inline]] ConvTile(const ConvStep& s, Index tile) {
    x = tile % s.tiles_across() * s.tile_width;
    y = tile / s.tiles_across() % s.tiles_down() * s.tile_height;
    n = tile / s.tiles_across() / s.tiles_down();
    height = smaller(s.tile_height, s.grid_height() - y);
    width = smaller(s.tile_width, s.grid_width() - x);
  }

  // Calls `use` for each cell of the tile.
  template <class Use>
  void each_cell(const ConvStep& s, Use&& use) const {
    for (Index down = 0; down < height; down += s.cell_height) {
      for (Index right = 0; right < width; right += s.cell_width) {
        ConvTile cell = *this;
        cell.y += down;
        cell.x += right;
        cell.height = smaller(s.cell_height, height - down);
        cell.width = smaller(s.cell_width, width - right);
        use(cell);
      }
    }
  }

  // The statistics of a cell, or null where none are wanted.
  [[gnu::always_inline]] float* partials(const ConvStep& s, const Context& context) const {
    if (s.partials == kNone) return nullptr;
    const Index cell =
        n * s.cells_apart() + y / s.cell_height * s.cells_across() + x / s.cell_width;
    return reinterpret_cast<float*>(context.at(s.partials)) + cell * 2 * s.panels() * kPanel;
  }
};

template <InstructionSet Simd, class Scratch = typename Simd::Scratch>
class Loader {
  using T = typename Simd::T;
  static constexpr bool kConverts = !std::is_same_v<T, Scratch>;
  using Vector = typename Simd::Vector;

 public:
  // `norms` is scratch for the step's `norm_bytes`.
  Loader(const ConvStep& s, const Context& context, float* norms)
      : s_(s), context_(context), norms_(norms) {}

  // The previous tile must be finished. Blocks are `plane` elements apart in the scratch. Where a
  // step filters over time, the same block of all frames comes before the next one.
  void start(const ConvTile& tile, Scratch* scratch, Index plane) {
    scratch_ = scratch;
    plane_ = plane;
    top_ = tile.y * s_.stride - s_.above;
    left_ = tile.x * s_.stride - s_.left;
    rows_ = (tile.height - 1) * s_.stride + s_.kernel_height;
    columns_ = (tile.width - 1) * s_.stride + s_.kernel_width;
    // The columns inside the image.
    begin_ = smaller(columns_, larger(0, -left_));
    end_ = larger(begin_, smaller(columns_, s_.input.width - left_));
    const Index blocks = s_.frames_read() * s_.input.blocks();
    n_ = tile.n;
    coefficients_ = nullptr;
    if (s_.reading.coefficients != kNone) {
      coefficients_ = reinterpret_cast<const float*>(context_.at(s_.reading.coefficients));
    }
    block_ = row_ = column_ = 0;
    left_over_ = blocks * rows_ * columns_;
    if (s_.gamma != nullptr) measure();
  }

  // The pixels that remain to be loaded, counted in each block.
  Index left() const { return left_over_; }

  void advance(Index pixels) {
    while (pixels > 0 && left_over_ > 0) {
      const Index now = smaller(pixels, columns_ - column_);
      load(now);
      pixels -= now;
      left_over_ -= now;
      column_ += now;
      if (column_ < columns_) continue;
      column_ = 0;
      if (++row_ < rows_) continue;
      row_ = 0;
      ++block_;
    }
  }

  void finish() { advance(left_over_); }

 private:
  // The factor of each pixel of the tile for an RMS norm: one over the root of its mean square.
  void measure() {
    for (Index source = 0; source < s_.frames_read(); ++source) {
      for (Index row = 0; row < rows_; ++row) {
        const Index y = top_ + row;
        if (y < 0 || y >= s_.input.height) continue;
        float* const norms = norms_ + (source * rows_ + row) * columns_;
        Index column = begin_;
        for (; column + kMeasured <= end_; column += kMeasured) {
          measure_pixels<kMeasured>(source, y, column, norms);
        }
        for (; column < end_; ++column) measure_pixels<1>(source, y, column, norms);
      }
    }
  }

  template <Index kPixels>
  void measure_pixels(Index source, Index y, Index column, float* norms) const {
    const Image& image = s_.source(source, n_);
    const Index n = s_.image_of(source, n_);
    const Index blocks = s_.input.blocks();
    Vector squares[kPixels];
    for (Index i = 0; i < kPixels; ++i) squares[i] = Simd::set(0.0f);
    for (Index block = 0; block < blocks; ++block) {
      const T* from = pixel(image, n, block, y, left_ + column);
      for (Index i = 0; i < kPixels; ++i, from += kBlock) {
        const Vector low = Simd::load_elements(from);
        const Vector high = Simd::load_elements(from + kPanel);
        squares[i] = Simd::multiply_add(high, high, Simd::multiply_add(low, low, squares[i]));
      }
    }
    const float share = 1.0f / static_cast<float>(s_.input.channels);
    const float eps = static_cast<float>(s_.eps);
    for (Index i = 0; i < kPixels; ++i) {
      norms[column + i] = 1.0f / std::sqrt(Simd::sum(squares[i]) * share + eps);
    }
  }

  // Some pixels of the current row.
  void load(Index pixels) {
    const Index pitch = s_.columns_read();
    const bool over_time = s_.over_time();
    const Index source = over_time ? block_ % s_.frames_read() : block_ / s_.input.blocks();
    const Index block = over_time ? block_ / s_.frames_read() : block_ % s_.input.blocks();
    Scratch* to = scratch_ + block_ * plane_ + (row_ * pitch + column_) * kBlock;
    const Index y = top_ + row_;
    const Index n = s_.image_of(source, n_);
    if (y < 0 || y >= s_.input.height || n < 0 || n >= s_.batch) {
      zero(to, pixels);
      return;
    }
    const Index last = column_ + pixels;
    const Index begin = smaller(larger(column_, begin_), last);
    const Index end = larger(begin, smaller(last, end_));
    zero(to, begin - column_);
    zero(to + (end - column_) * kBlock, last - end);
    if (begin == end) return;
    const Image& image = s_.source(source, n_);
    below_ = row_ + 1 < rows_ ? image.row * kBlock : 0;
    const T* from = pixel(image, n, block, y, left_ + begin);
    read(n, block, from, to + (begin - column_) * kBlock, end - begin,
         norms_ + (source * rows_ + row_) * columns_ + begin);
  }

  const T* pixel(const Image& image, Index n, Index block, Index y, Index x) const {
    return reinterpret_cast<const T*>(context_.at(image.offset)) + image.at(n, block, y) +
           x * kBlock;
  }

  static void zero(Scratch* to, Index pixels) {
    std::memset(static_cast<void*>(to), 0,
                static_cast<std::size_t>(pixels * kBlock) * sizeof(Scratch));
  }

  // Reads pixels of a block of an image of the batch, of which an RMS norm has the factors `norms`.
  void read(Index n, Index block, const T* from, Scratch* to, Index pixels,
            const float* norms) const {
    if (s_.gamma != nullptr) {
      const float* of_block = s_.gamma + block * kBlock;
      const Vector gamma[2] = {Simd::load(of_block), Simd::load(of_block + kPanel)};
      load_normed(from, to, pixels, [&](const Vector& x, Index half, Index i) {
        return Simd::multiply(Simd::multiply(x, Simd::set(norms[i])), gamma[half]);
      });
      return;
    }
    if (coefficients_ == nullptr && s_.reading.activation == Activation::kNone) {
      if constexpr (kConverts) {
        each_half(from, to, pixels, [](const Vector& x, Index, Index) { return x; });
      } else {
        std::memcpy(static_cast<void*>(to), from,
                    static_cast<std::size_t>(pixels * kBlock) * sizeof(T));
      }
      return;
    }
    Vector scale[2] = {Simd::set(1.0f), Simd::set(1.0f)};
    Vector shift[2] = {Simd::set(0.0f), Simd::set(0.0f)};
    if (coefficients_ != nullptr) {
      const Index blocks = s_.input.blocks();
      for (Index half = 0; half < 2; ++half) {
        const float* from = coefficients_ + (2 * n * blocks + block) * kBlock +
                            half * kPanel;
        scale[half] = Simd::load(from);
        shift[half] = Simd::load(from + blocks * kBlock);
      }
    }
    load_normed(from, to, pixels, [&](const Vector& x, Index half, Index) {
      return Simd::multiply_add(x, scale[half], shift[half]);
    });
  }

  // Applies a norm, and then the activation of the reading.
  template <class Norm>
  void load_normed(const T* from, Scratch* to, Index pixels, Norm&& norm) const {
    switch (s_.reading.activation) {
      case Activation::kSilu:
        each_half(from, to, pixels, [&](const Vector& x, Index half, Index i) {
          return Simd::silu(norm(x, half, i));
        });
        break;
      case Activation::kNone:
        each_half(from, to, pixels, norm);
        break;
      case Activation::kRelu:
        each_half(from, to, pixels, [&](const Vector& x, Index half, Index i) {
          return relu<Simd>(norm(x, half, i));
        });
        break;
      default:
        each_half(from, to, pixels, [&](const Vector& x, Index half, Index i) {
          return activated<Simd>(s_.reading.activation, norm(x, half, i));
        });
    }
  }

  // Applies a function of 16 channels, their half of the block and the pixel's number to all
  // pixels of a block, and prefetches the row below: the hardware only prefetches along a row, and
  // the rows of a tile are short.
  template <class Function>
  void each_half(const T* from, Scratch* to, Index pixels, Function&& function) const {
    for (Index i = 0; i < pixels; ++i, from += kBlock, to += kBlock) {
      if constexpr (!Simd::kOverlaps) {
        __builtin_prefetch(from + below_);
        __builtin_prefetch(from + below_ + kPanel);
      }
      put<Simd>(to, function(Simd::load_elements(from), 0, i));
      put<Simd>(to + kPanel, function(Simd::load_elements(from + kPanel), 1, i));
    }
  }

  static constexpr Index kMeasured = 8;

  const ConvStep& s_;
  const Context& context_;
  float* const norms_;
  Scratch* scratch_ = nullptr;
  Index plane_ = 0;
  Index top_ = 0;  // the tile's first row in the input; negative if zeros come first
  Index left_ = 0;
  Index rows_ = 0;
  Index columns_ = 0;
  Index begin_ = 0;
  Index end_ = 0;
  Index below_ = 0;  // elements from a row that is loaded to the next
  Index n_ = 0;
  const float* coefficients_ = nullptr;
  Index block_ = 0;
  Index row_ = 0;
  Index column_ = 0;
  Index left_over_ = 0;
};

}  // namespace rbln_vae
