// Convolutions of 3x3, and those that double an image, with fewer products, by Winograd's minimal
// filtering F(4x4, 3x3).
//
// The values of a polynomial at as many points as it has coefficients determine it, and the
// product of two polynomials is the product of their values. So 4x4 outputs need 6x6 products
// instead of 4x4x9, at the points 0, a, -a, b, -b and infinity in each direction. The weights are
// transformed before that, in each run or once for many. The input of a tile is transformed in the
// thread's scratch, multiplied position by position, and transformed back.
//
// After doubling, each of the four outputs of a point has a 2x2 kernel, which is a 3x3 kernel with
// a row and a column of zeros. The zeros eliminate the products at infinity or at zero, and 5x5
// products remain.
//
// Images may be stored in bfloat16, but everything in between is float32: products in bfloat16
// are not fast enough to make direct convolution, with four times the products, faster.
//
// The rounding of an output depends on its position in its 4x4 tile, and a NaN or an infinity in
// the input makes the whole tile NaN.
//
// The algorithm: "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308. The error
// as a function of the points: "Error Analysis and Improving the Accuracy of Winograd Convolution
// for Deep Neural Networks", arXiv 1803.10986.
#pragma once

#include <concepts>
#include <type_traits>

#include "engine/kernels/conv2d/epilogue.h"
#include "engine/kernels/conv2d/loader.h"
#include "engine/kernels/simd/instruction_set.h"
#include "engine/steps.h"

namespace rbln_vae {

// `Images` loads and stores images, `Simd` multiplies in float32.
template <InstructionSet Images, InstructionSet Simd = Images>
  requires std::same_as<typename Simd::T, float>
class Winograd {
  using T = typename Images::T;
  using Vector = typename Simd::Vector;
  static_assert(Images::kMaxPanels >= Simd::kMaxPanels);
  static constexpr Index kTile = kWinogradTile;
  static constexpr Index kSide = kTile + 2;
  static constexpr Index kPositions = kSide * kSide;
  static_assert(kSide == 6);  // the transforms are written for it
  // The most bytes of sums that wait to be transformed back, so that they fit in the L2 cache
  // together with the factors.
  static constexpr Index kSumsBytes = 320 * 1024;

  // The rounding error grows with the spread of the points' powers; 1 and 2 would double it.
  static constexpr double kA = 0.625;
  static constexpr double kB = 1.5;

 public:
  static Index scratch_bytes(const ConvStep& s) {
    const Sizes sizes(s);
    return (sizes.input + sizes.values * kPositions + sizes.sums * kPositions + sizes.outputs) *
               static_cast<Index>(sizeof(float)) +
           s.norm_bytes();
  }

  static void run(const ConvStep& s, const Context& context, Index item) {
    Winograd(s, context).run(item);
  }

  // Transforms the weights of one panel and block: [phases][taps][512] to
  // [phases][positions][512], where consecutive positions are `blocks` apart.
  static void transform(const WinogradStep& s, const Context& context, Index item) {
    const Index panel = item / s.blocks;
    const Index block = item % s.blocks;
    for (Index phase = 0; phase < s.phases(); ++phase) {
      const Index at = panel * s.phases() + phase;
      const T* from =
          static_cast<const T*>(s.weights) + (at * s.blocks + block) * s.taps() * kPanelBlock;
      const Range range(s.side, phase);
      float* kernels =
          s.kept != nullptr ? s.kept : reinterpret_cast<float*>(context.arena + s.kernels);
      float* to = kernels + (at * s.positions() * s.blocks + block) * kPanelBlock;
      for (Index k = 0; k < kBlock; ++k) {
        transform_kernels(range, s.side, from, k, to + k * kPanel, s.blocks * kPanelBlock);
      }
    }
  }

 private:
  // The points in both directions at which a phase has products.
  struct Range {
    Index down, right;  // the first point
    Index count;

    Range(Index side, Index phase)
        : down(side == 2 ? phase / 2 : 0), right(side == 2 ? phase % 2 : 0),
          count(side == 2 ? kSide - 1 : kSide) {}

    bool has(Index y, Index x) const {
      return y >= down && y < down + count && x >= right && x < right + count;
    }
  };

  // The sizes of the parts of the scratch, in floats.
  struct Sizes {
    Index tiles;    // of 4x4, in a tile of the plan
    Index chunks;   // groups of tiles that are multiplied together
    Index chunk;    // tiles of each chunk except the last
    Index groups;   // groups of panels that are multiplied before they are transformed back
    Index input;    // a block of the input: [rows][columns][32]
    Index values;   // distance of positions of transformed inputs: [blocks][tiles][32]
    Index sums;     // distance of positions of sums: [groups][chunks][panels][pixels][16]
    Index outputs;  // a row of output tiles: [panels][4][columns][16]

    explicit Sizes(const ConvStep& s) {
      const Index across = ceil_div(s.tile_width, kTile);
      tiles = ceil_div(s.tile_height, kTile) * across;
      chunks = ceil_div(tiles, Simd::kMaxPixels);
      chunk = ceil_div(tiles, chunks);
      input = s.rows_read() * s.columns_read() * kBlock;
      values = apart(s.input.blocks() * tiles * kBlock);
      const Index group = chunks * kGroup;
      // The epilogue takes all phases of one group after another.
      groups = s.upsample ? 1
                          : larger(1, kSumsBytes / (kPositions * group *
                                                    static_cast<Index>(sizeof(float))));
      sums = apart(groups * group);
      outputs = Simd::kMaxPanels * kTile * across * kTile * kPanel;
    }

    // All positions are accessed together, so they are whole pages and a bit apart, to lie in
    // different sets of the L1 cache.
    static Index apart(Index floats) {
      constexpr Index page = 1024;
      return ceil_div(floats, page) * page + kBlock;
    }
  };

  static constexpr Index kGroup = Simd::kMaxPanels * Simd::kMaxPixels * kPanel;

  Winograd(const ConvStep& s, const Context& context)
      : s_(s), context_(context), sizes_(s) {
    input_ = reinterpret_cast<float*>(context.scratch);
    values_ = input_ + sizes_.input;
    sums_ = values_ + sizes_.values * kPositions;
    outputs_ = sums_ + sizes_.sums * kPositions;
    norms_ = outputs_ + sizes_.outputs;
  }

  void run(Index item) {
    const ConvTile tile(s_, s_.first_tile(item));
    const Index split = s_.split(item);
    const Index panels = s_.panels();
    const Index all = ceil_div(panels, Simd::kMaxPanels);
    const Index first = all * split / s_.splits;
    const Index last = all * (split + 1) / s_.splits;
    load(tile);
    Epilogue<Images> epilogue(s_);
    for (Index group = first; group < last; group += sizes_.groups) {
      const Index end = smaller(group + sizes_.groups, last);
      for (Index phase = 0; phase < s_.phases(); ++phase) {
        multiply(group, end, phase);
        for (Index each = group; each < end; ++each) {
          tile.each_cell(s_, [&](const ConvTile& cell) {
            store(tile, cell, each, each - group, phase, epilogue);
          });
        }
      }
    }
  }

  // Loads the input of the tile and transforms it, block by block.
  void load(const ConvTile& tile) {
    ConvTile whole = tile;
    whole.height = ceil_div(tile.height, kTile) * kTile;
    whole.width = ceil_div(tile.width, kTile) * kTile;
    down_ = whole.height / kTile;
    across_ = whole.width / kTile;
    tiles_ = down_ * across_;
    Loader<Images, float> loader(s_, context_, norms_);
    loader.start(whole, input_, 0);
    const Index pitch = s_.columns_read();
    for (Index block = 0; block < s_.input.blocks(); ++block) {
      loader.advance((whole.height + 2) * (whole.width + 2));
      float* to = values_ + block * sizes_.tiles * kBlock;
      for (Index y = 0; y < down_; ++y) {
        for (Index x = 0; x < across_; ++x, to += kBlock) {
          const float* from = input_ + (y * pitch + x) * kTile * kBlock;
          transform_input(from, pitch * kBlock, to, sizes_.values);
          transform_input(from + kPanel, pitch * kBlock, to + kPanel, sizes_.values);
        }
      }
    }
  }

  // The products of all positions for some groups of panels. The next weights are prefetched, one
  // panel during each chunk.
  void multiply(Index first, Index last, Index phase) {
    const Index blocks = s_.input.blocks();
    const Range range(s_.kernel_height, phase);
    const Index kernels = range.count * range.count * blocks * kPanelBlock;
    const Index tap = 0;
    Gemm<float> g;
    g.row_step = 0;
    g.pixel_step = kBlock;
    g.taps = &tap;
    g.tap_count = 1;
    g.blocks = blocks;
    g.plane = sizes_.tiles * kBlock;
    g.last_channels = s_.input.channels - (blocks - 1) * kBlock;
    g.panel_step = s_.phases() * kernels;
    g.rows = 1;
    const float* weights =
        (s_.kept != nullptr ? s_.kept
                            : reinterpret_cast<const float*>(context_.arena + s_.kernels)) +
        phase * kernels;
    const Index step = Simd::kMaxPanels * g.panel_step;  // from one group to the next
    for (Index y = 0; y < range.count && !stopped(context_); ++y) {
      for (Index x = 0; x < range.count; ++x) {
        const Index position = (range.down + y) * kSide + range.right + x;
        const float* here = weights + (y * range.count + x) * blocks * kPanelBlock;
        for (Index group = first; group < last; ++group) {
          const Index panel = group * Simd::kMaxPanels;
          g.panels = smaller(Simd::kMaxPanels, s_.panels() - panel);
          g.b = here + group * step;
          g.c = sums_ + position * sizes_.sums + (group - first) * sizes_.chunks * kGroup;
          const float* next = group + 1 < last ? g.b + step
                                               : here + blocks * kPanelBlock + first * step;
          for (Index chunk = 0; chunk * sizes_.chunk < tiles_; ++chunk, g.c += kGroup) {
            const Index begin = chunk * sizes_.chunk;
            g.pixels = smaller(sizes_.chunk, tiles_ - begin);
            g.a = values_ + position * sizes_.values + begin * kBlock;
            g.ahead = chunk < g.panels ? next + chunk * g.panel_step : nullptr;
            Simd::gemm(g);
          }
        }
      }
    }
  }

  // Transforms the sums of one group back in one cell, a row of tiles at a time, and stores it.
  void store(const ConvTile& tile, const ConvTile& cell, Index group, Index place, Index phase,
             Epilogue<Images>& epilogue) {
    const Index down = ceil_div(cell.height, kTile);
    const Index across = ceil_div(cell.width, kTile);
    const Index first = (cell.y - tile.y) / kTile * across_ + (cell.x - tile.x) / kTile;
    const Index panel = group * Simd::kMaxPanels;
    const Index scale = s_.upsample ? 2 : 1;
    const Range range(s_.kernel_height, phase);
    typename Epilogue<Images>::Job job;
    job.sums = outputs_;
    job.bias = s_.bias + phase * s_.bias_step();
    job.pitch = across * kTile;
    job.panel = panel;
    job.panels = smaller(Simd::kMaxPanels, s_.panels() - panel);
    job.pixels = cell.width;
    job.pixel_step = scale * kBlock;
    job.row_step = scale * s_.output.width * kBlock;
    job.block_step = s_.output.plane * kBlock;
    job.residual_block_step = s_.residual.plane * kBlock;
    job.partials = cell.partials(s_, context_);
    job.points = cell.height * cell.width * s_.phases();
    const float* sums = sums_ + place * sizes_.chunks * kGroup;
    for (Index row = 0; row < down; ++row) {
      job.rows = smaller(kTile, cell.height - row * kTile);
      // Surplus rows are overwritten by the next panel, or lie in the buffer's slack.
      for (Index each = 0; each < job.panels; ++each) {
        for (Index x = 0; x < across; ++x) {
          const Index at = first + row * across_ + x;
          const float* from = sums + at / sizes_.chunk * kGroup +
                              (each * Simd::kMaxPixels + at % sizes_.chunk) * kPanel;
          float* to = outputs_ + (each * job.rows * job.pitch + x * kTile) * kPanel;
          const auto transform = s_.doubles() ? transform_output<false> : transform_output<true>;
          transform(range, from, sizes_.sums, to, job.pitch * kPanel);
        }
      }
      const Index y = (cell.y + row * kTile) * scale + (s_.upsample ? phase / 2 : 0);
      const Index x = cell.x * scale + (s_.upsample ? phase % 2 : 0);
      job.output = pixel(s_.output, cell.n, panel / 2, y, x);
      job.residual = s_.residual.channels == 0
                         ? nullptr
                         : pixel(s_.residual, cell.n, panel / 2, y, x);
      job.first = phase == 0 && row == 0;
      job.last = phase + 1 == s_.phases() && row + 1 == down;
      epilogue.start(job);
      epilogue.finish();
    }
  }

  T* pixel(const Image& image, Index n, Index block, Index y, Index x) const {
    return reinterpret_cast<T*>(context_.arena + image.offset) + image.at(n, block, y) +
           x * kBlock;
  }

  static Vector scaled(double factor, const Vector& x) {
    return Simd::multiply(Simd::set(static_cast<float>(factor)), x);
  }
  static Vector times(double factor, const Vector& x, const Vector& sum) {
    return Simd::multiply_add(Simd::set(static_cast<float>(factor)), x, sum);
  }

  // Transforms six inputs in one direction: the transpose of interpolation.
  [[gnu::always_inline]] static void forward(const Vector (&d)[kSide], Vector (&v)[kSide]) {
    constexpr double aa = kA * kA, bb = kB * kB;
    const Vector even_a = times(-bb, d[2], d[4]);
    const Vector odd_a = times(-bb, d[1], d[3]);
    const Vector even_b = times(-aa, d[2], d[4]);
    const Vector odd_b = times(-aa, d[1], d[3]);
    v[0] = times(aa * bb, d[0], times(-aa - bb, d[2], d[4]));
    v[1] = times(kA, odd_a, even_a);
    v[2] = times(-kA, odd_a, even_a);
    v[3] = times(kB, odd_b, even_b);
    v[4] = times(-kB, odd_b, even_b);
    v[5] = times(aa * bb, d[1], times(-aa - bb, d[3], d[5]));
  }

  // Computes four outputs from the products at six points, with the powers of the points.
  [[gnu::always_inline]] static void backward(const Vector (&m)[kSide], Vector (&y)[kTile]) {
    constexpr double aa = kA * kA, bb = kB * kB;
    const Vector even_a = Simd::add(m[1], m[2]);
    const Vector odd_a = Simd::subtract(m[1], m[2]);
    const Vector even_b = Simd::add(m[3], m[4]);
    const Vector odd_b = Simd::subtract(m[3], m[4]);
    y[0] = Simd::add(Simd::add(even_a, even_b), m[0]);
    y[1] = times(kA, odd_a, scaled(kB, odd_b));
    y[2] = times(aa, even_a, scaled(bb, even_b));
    y[3] = times(aa * kA, odd_a, times(bb * kB, odd_b, m[5]));
  }

  // Transforms 6x6 pixels of 16 channels.
  static void transform_input(const float* from, Index row_step, float* to, Index step) {
    Vector columns[kSide][kSide];
#pragma GCC unroll 6
    for (Index x = 0; x < kSide; ++x) {
      Vector d[kSide], v[kSide];
#pragma GCC unroll 6
      for (Index y = 0; y < kSide; ++y) d[y] = Simd::load(from + y * row_step + x * kBlock);
      forward(d, v);
#pragma GCC unroll 6
      for (Index y = 0; y < kSide; ++y) columns[y][x] = v[y];
    }
#pragma GCC unroll 6
    for (Index y = 0; y < kSide; ++y) {
      Vector v[kSide];
      forward(columns[y], v);
#pragma GCC unroll 6
      for (Index x = 0; x < kSide; ++x) Simd::store(to + (y * kSide + x) * step, v[x]);
    }
  }

  // Computes 4x4 pixels of a panel. With kAll there are products at all points, not only in the
  // range.
  template <bool kAll>
  static void transform_output(const Range& range, const float* from, Index step, float* to,
                               Index row_step) {
    Vector rows[kTile][kSide];
#pragma GCC unroll 6
    for (Index x = 0; x < kSide; ++x) {
      Vector m[kSide], v[kTile];
#pragma GCC unroll 6
      for (Index y = 0; y < kSide; ++y) {
        m[y] = kAll || range.has(y, x) ? Simd::load(from + (y * kSide + x) * step)
                                       : Simd::set(0.0f);
      }
      backward(m, v);
#pragma GCC unroll 6
      for (Index y = 0; y < kTile; ++y) rows[y][x] = v[y];
    }
#pragma GCC unroll 6
    for (Index y = 0; y < kTile; ++y) {
      Vector v[kTile];
      backward(rows[y], v);
#pragma GCC unroll 6
      for (Index x = 0; x < kTile; ++x) Simd::store(to + y * row_step + x * kPanel, v[x]);
    }
  }

  // Evaluates three taps at the points, each divided by the product of its distances from the
  // other points.
  [[gnu::always_inline]] static void values(const Vector (&g)[3], Vector (&v)[kSide]) {
    constexpr double aa = kA * kA, bb = kB * kB;
    constexpr double share_a = 1 / (2 * aa * (aa - bb)), share_b = 1 / (2 * bb * (bb - aa));
    const Vector even_a = times(aa * share_a, g[2], scaled(share_a, g[0]));
    const Vector even_b = times(bb * share_b, g[2], scaled(share_b, g[0]));
    v[0] = scaled(1 / (aa * bb), g[0]);
    v[1] = times(kA * share_a, g[1], even_a);
    v[2] = times(-kA * share_a, g[1], even_a);
    v[3] = times(kB * share_b, g[1], even_b);
    v[4] = times(-kB * share_b, g[1], even_b);
    v[5] = g[2];
  }

  // The weights of a tap for 16 output channels and one input channel of a block.
  static Vector tap(const T* block, Index channel) {
    if constexpr (std::is_same_v<T, float>) {
      return Simd::load(block + panel_index(block, channel, 0));
    } else if constexpr (requires { Images::load_alternate(block, channel); }) {
      // Two input channels are side by side.
      const Index pair = channel & ~Index{1};
      return Images::load_alternate(block + panel_index(block, pair, 0), channel & 1);
    } else {
      alignas(64) float lanes[kPanel];
      for (Index n = 0; n < kPanel; ++n) lanes[n] = to_float(block[panel_index(block, channel, n)]);
      return Simd::load(lanes);
    }
  }

  // Transforms the kernels of 16 output channels for one input channel.
  static void transform_kernels(const Range& range, Index side, const T* from, Index channel,
                                float* to, Index step) {
    Vector rows[kSide][3];
    for (Index x = 0; x < 3; ++x) {
      Vector g[3], v[kSide];
      for (Index y = 0; y < 3; ++y) {
        const Index down = y - range.down, right = x - range.right;
        const bool there = down >= 0 && down < side && right >= 0 && right < side;
        g[y] = there ? tap(from + (down * side + right) * kPanelBlock, channel) : Simd::set(0.0f);
      }
      values(g, v);
      for (Index y = 0; y < kSide; ++y) rows[y][x] = v[y];
    }
    for (Index y = 0; y < range.count; ++y) {
      Vector v[kSide];
      values(rows[range.down + y], v);
      for (Index x = 0; x < range.count; ++x) {
        Simd::store(to + (y * range.count + x) * step, v[range.right + x]);
      }
    }
  }

  const ConvStep& s_;
  const Context& context_;
  const Sizes sizes_;
  float* input_;
  float* values_;
  float* sums_;
  float* outputs_;
  float* norms_;
  // The 4x4 tiles of the loaded tile.
  Index down_ = 0;
  Index across_ = 0;
  Index tiles_ = 0;
};

}  // namespace rbln_vae
