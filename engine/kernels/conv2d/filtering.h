// Convolutions with fewer products than their definition, which multiply sums of pixels with sums
// of taps: minimal filtering.
//
// An `Algorithm` says how 4x4 outputs are made: it transforms the pixels that they depend on to
// `kValues` values, whose `kProducts` products with `kMatrices` transformed kernels are summed
// over the channels, and makes the outputs of these sums, in one direction after the other
// (`separable.h`). So the input of a tile is transformed in the thread's scratch, multiplied kernel
// by kernel, and transformed back.
//
// Several frames are transformed over time besides, before they are in space, and back in this
// order, too. Then a tile has so many values and sums that they don't fit in the L2 cache at the
// same time. So only the values of one time are made at once, and meet all kernels of that time.
//
// The rounding of an output depends on its position in its 4x4 square, and a NaN or an infinity in
// the input can make the whole square NaN.
#pragma once

#include <type_traits>

#include "engine/kernels/conv2d/epilogue.h"
#include "engine/kernels/conv2d/loader.h"
#include "engine/kernels/conv2d/over_time.h"
#include "engine/kernels/conv2d/separable.h"
#include "engine/kernels/simd/instruction_set.h"
#include "engine/steps.h"

namespace rbln_vae {

// `Images` loads and stores images, `Simd` multiplies.
template <InstructionSet Images, InstructionSet Simd, class Algorithm, Index kFrames = 1>
class Filtering {
  using Times = OverTime<Simd, kFrames>;
  using Transforms = Separable<Simd, Algorithm>;
  using T = typename Images::T;
  using Weight = typename Simd::T;
  using Factor = typename Simd::Scratch;
  static_assert(Images::kMaxPanels >= Simd::kMaxPanels);
  static constexpr Index kTimes = Times::kTimes;
  static constexpr Index kValues = Algorithm::kValues;  // at one time
  static constexpr Index kProducts = Algorithm::kProducts;
  static constexpr Index kMatrices = Algorithm::kMatrices;
  // Rows and columns of outputs in a square, and those of the grid that make them.
  static constexpr Index kSquare = kOutputSquare;
  static constexpr Index kPoints = Algorithm::kPoints;
  static constexpr Index kScale = kSquare / kPoints;
  // Pixels of the input from one of these to the next, and those that all of a row depend on.
  static constexpr Index kStride = Algorithm::kStride;
  static Index read(Index points) { return (points - 1) * kStride + 3; }
  // Squares that are multiplied together.
  static constexpr Index kMost = Simd::kMaxRows * Simd::kMaxPixels;
  static constexpr Index kGroup = Simd::kMaxPanels * kMost * kPanel;
  // Bytes of sums that fit in the L2 cache together with the factors.
  static constexpr Index kSumsBytes = 320 * 1024;

 public:
  static Index scratch_bytes(const ConvStep& s) {
    const Sizes sizes(s);
    return (sizes.inputs + sizes.sums * kTimes * kProducts + sizes.outputs * kFrames) *
               static_cast<Index>(sizeof(float)) +
           sizes.all_values * static_cast<Index>(sizeof(Factor)) + s.norm_bytes();
  }

  static void run(const ConvStep& s, const Context& context, Index item) {
    Filtering(s, context).run(item);
  }

 private:
  // The sizes of the parts of the scratch, in elements.
  struct Sizes {
    Index squares;     // in a tile of the plan
    Index chunks;      // groups of squares that are multiplied together
    Index groups;      // groups of panels that are multiplied before they are transformed back
    Index input;       // a block of a frame of the input: [rows][columns][32]
    Index inputs;      // those that are there at the same time: one, or [blocks][times]
    Index values;      // distance of transformed inputs: [blocks][squares][32]
    Index all_values;  // all of them, and what whole tiles read, and discard, beyond
    Index sums;        // distance of products: [groups][chunks][panels][pixels][16]
    Index outputs;     // a row of squares of a frame: [panels][4][columns][16]

    explicit Sizes(const ConvStep& s) {
      const Index across = ceil_div(s.tile_width, kPoints);
      squares = ceil_div(s.tile_height, kPoints) * across;
      chunks = ceil_div(squares, kMost);
      input = s.rows_read() * s.columns_read() * kBlock;
      inputs = kFrames > 1 ? summed_blocks(s) * kTimes * input : input;
      values = apart<Factor>(summed_blocks(s) * squares * kBlock);
      all_values = kValues * values + (Simd::kWholeTiles ? kMost * kBlock : 0);
      const Index group = chunks * kGroup;
      const Index all = ceil_div(ceil_div(s.panels(), Simd::kMaxPanels), s.splits);
      groups = groups_together(s, all, group * kProducts * static_cast<Index>(sizeof(float)));
      sums = apart<float>(groups * group);
      outputs = Simd::kMaxPanels * kSquare * across * kSquare * kPanel;
    }

    // How many of all groups, each with so many bytes of sums, are multiplied before they are
    // transformed back. If their sums fit in the L2 cache, all values are read again for the next
    // ones. With many channels it is less to let the sums of all groups pass through the larger
    // cache: three times, since a line is read before it is written.
    Index groups_together(const ConvStep& s, Index all, Index bytes) const {
      if (kFrames > 1) return all;
      if (s.phases() > 1) return 1;  // the epilogue takes all phases of one after another
      const Index fit = smaller(larger(1, kSumsBytes / bytes), all);
      const Index again = (ceil_div(all, fit) - 1) * kValues * values *
                          static_cast<Index>(sizeof(Factor));
      return again > 3 * all * bytes ? all : fit;
    }

    // All of them are accessed together, so they are whole pages and a bit apart, to lie in
    // different sets of the L1 cache.
    template <class Element>
    static Index apart(Index elements) {
      constexpr Index page = 4096 / sizeof(Element);
      return ceil_div(elements, page) * page + 128 / static_cast<Index>(sizeof(Element));
    }
  };

  // The blocks of input channels whose products are summed up before they are transformed back.
  static Index summed_blocks(const ConvStep& s) {
    return kFrames > 1 ? s.input.blocks() : s.blocks();
  }

  Filtering(const ConvStep& s, const Context& context)
      : s_(s), context_(context), sizes_(s) {
    input_ = reinterpret_cast<float*>(context.scratch);
    values_ = reinterpret_cast<Factor*>(input_ + sizes_.inputs);
    sums_ = reinterpret_cast<float*>(values_ + sizes_.all_values);
    outputs_ = sums_ + sizes_.sums * kTimes * kProducts;
    norms_ = outputs_ + sizes_.outputs * kFrames;
    const void* kernels = s.weights;
    if (s.winograd()) kernels = context.at(s.kernels);
    if (s.winograd() && s.kept != nullptr) kernels = s.kept;
    kernels_ = static_cast<const Weight*>(kernels);
  }

  void run(Index item) {
    Simd::enter();
    const ConvTile tile(s_, s_.first_tile(item));
    const Index split = s_.split(item);
    const Index panels = s_.panels();
    const Index all = ceil_div(panels, Simd::kMaxPanels);
    const Index first = all * split / s_.splits;
    const Index last = all * (split + 1) / s_.splits;
    load(tile);
    Epilogue<Images> epilogue(s_, context_, tile.n);
    for (Index group = first; group < last; group += sizes_.groups) {
      const Index end = smaller(group + sizes_.groups, last);
      for (Index phase = 0; phase < s_.phases(); ++phase) {
        for (Index time = 0; time < kTimes; ++time) {
          if constexpr (kFrames > 1) transform(time);
          multiply(group, end, phase, time);
        }
        for (Index each = group; each < end; ++each) {
          tile.each_cell(s_, [&](const ConvTile& cell) {
            store(tile, cell, each, each - group, phase, epilogue);
          });
        }
      }
    }
    Simd::leave();
  }

  // Loads the input of the tile block by block, and transforms it: of several frames over time.
  void load(const ConvTile& tile) {
    ConvTile whole = tile;
    whole.height = ceil_div(tile.height, kPoints) * kPoints;
    whole.width = ceil_div(tile.width, kPoints) * kPoints;
    down_ = whole.height / kPoints;
    across_ = whole.width / kPoints;
    squares_ = down_ * across_;
    chunks_ = ceil_div(squares_, kMost);
    Loader<Images, float> loader(s_, context_, norms_);
    loader.start(whole, input_, kFrames > 1 ? sizes_.input : 0);
    for (Index block = 0; block < summed_blocks(s_); ++block) {
      loader.advance((kFrames > 1 ? kTimes : 1) * read(whole.height) * read(whole.width));
      if constexpr (kFrames > 1) {
        transform_over_time(input_ + block * kTimes * sizes_.input,
                            read(whole.height) * s_.columns_read() * kBlock);
      } else {
        transform(input_, block);
      }
    }
  }

  // Transforms some elements of a block of all frames over time, in place.
  void transform_over_time(float* input, Index elements) const {
    for (Index at = 0; at < elements; at += kPanel) {
      typename Simd::Vector d[kTimes], v[kTimes];
#pragma GCC unroll 6
      for (Index i = 0; i < kTimes; ++i) d[i] = Simd::load(input + i * sizes_.input + at);
      Times::forward(d, v);
#pragma GCC unroll 6
      for (Index i = 0; i < kTimes; ++i) Simd::store(input + i * sizes_.input + at, v[i]);
    }
  }

  // Transforms all blocks at one time in space.
  void transform(Index time) {
    for (Index block = 0; block < summed_blocks(s_); ++block) {
      transform(input_ + (block * kTimes + time) * sizes_.input, block);
    }
  }

  // Transforms a block in space.
  void transform(const float* input, Index block) {
    const Index pitch = s_.columns_read();
    Factor* to = values_ + block * sizes_.squares * kBlock;
    for (Index y = 0; y < down_; ++y) {
      for (Index x = 0; x < across_; ++x, to += kBlock) {
        const float* from = input + (y * pitch + x) * kPoints * kStride * kBlock;
        Transforms::input(from, pitch * kBlock, to, sizes_.values);
        Transforms::input(from + kPanel, pitch * kBlock, to + kPanel, sizes_.values);
      }
    }
  }

  // Chunks are even parts of the squares, or whole tiles and a rest.
  Index begin(Index chunk) const {
    return Simd::kWholeTiles ? chunk * kMost : squares_ * chunk / chunks_;
  }
  Index chunk_of(Index square) const {
    return Simd::kWholeTiles ? square / kMost : ((square + 1) * chunks_ - 1) / squares_;
  }

  // All products of one time for some groups of panels. The next kernels are prefetched: a panel
  // takes a chunk, or several, so that memory has the time of their products.
  void multiply(Index first, Index last, Index phase, Index time) {
    const Index blocks = summed_blocks(s_);
    const Index kernels = kTimes * kMatrices * blocks * kPanelBlock;  // of one panel and phase
    const Index tap = 0;
    Gemm<Weight, Factor> g;
    g.pixel_step = kBlock;
    g.taps = &tap;
    g.tap_count = 1;
    g.blocks = blocks;
    g.plane = sizes_.squares * kBlock;
    g.last_channels = s_.input.channels - (s_.input.blocks() - 1) * kBlock;
    g.panel_step = s_.phases() * kernels;
    const Index step = Simd::kMaxPanels * g.panel_step;  // from one group to the next
    g.turns = chunks_ < Simd::kPrefetchTurns ? 1 : Simd::kPrefetchTurns;
    const Index share = blocks * kPanelBlock / g.turns;
    for (Index matrix = 0; matrix < kMatrices && !interrupted<Simd>(context_); ++matrix) {
      const Weight* here =
          kernels_ + phase * kernels + (time * kMatrices + matrix) * blocks * kPanelBlock;
      for (Index group = first; group < last; ++group) {
        g.panels = smaller(Simd::kMaxPanels, s_.panels() - group * Simd::kMaxPanels);
        g.b = here + group * step;
        const Weight* next =
            group + 1 < last ? g.b + step : here + blocks * kPanelBlock + first * step;
        Index turn = 0;
        for (Index product = Algorithm::first(matrix); product < Algorithm::first(matrix + 1);
             ++product) {
          g.c = sums_ + (time * kProducts + product) * sizes_.sums +
                (group - first) * sizes_.chunks * kGroup;
          for (Index chunk = 0; chunk < chunks_; ++chunk, ++turn, g.c += kGroup) {
            const Index first_square = begin(chunk);
            const Index count = smaller(begin(chunk + 1), squares_) - first_square;
            g.pixels = smaller(count, Simd::kMaxPixels);
            g.rows = ceil_div(count, g.pixels);
            g.row_step = g.pixels * kBlock;
            g.a = values_ + Algorithm::value(product) * sizes_.values + first_square * kBlock;
            g.ahead = turn < g.panels * g.turns
                          ? next + turn / g.turns * g.panel_step + turn % g.turns * share
                          : nullptr;
            Simd::gemm(g);
          }
        }
      }
    }
  }

  // Transforms the sums of one group back in one cell, a row of squares at a time, and stores it.
  void store(const ConvTile& tile, const ConvTile& cell, Index group, Index place, Index phase,
             Epilogue<Images>& epilogue) {
    const Index down = ceil_div(cell.height, kPoints);
    const Index across = ceil_div(cell.width, kPoints);
    const Index first = (cell.y - tile.y) / kPoints * across_ + (cell.x - tile.x) / kPoints;
    const Index panel = group * Simd::kMaxPanels;
    const Index apart = s_.phases() > 1 ? 2 : 1;  // pixels from one output to the next
    const Index height = cell.height * kScale;
    typename Epilogue<Images>::Job job;
    job.bias = s_.bias + phase * s_.bias_step();
    job.pitch = across * kSquare;
    job.panel = panel;
    job.panels = smaller(Simd::kMaxPanels, s_.panels() - panel);
    job.pixels = cell.width * kScale;
    job.pixel_step = apart * kBlock;
    job.row_step = apart * s_.output.row * kBlock;
    job.residual_row_step = apart * s_.residual.row * kBlock;
    job.block_step = s_.output.width * kBlock;
    job.partials = cell.partials(s_, context_);
    job.points = cell.height * cell.width * s_.points();
    const float* sums = sums_ + place * sizes_.chunks * kGroup;
    for (Index row = 0; row < down; ++row) {
      job.rows = smaller(kSquare, height - row * kSquare);
      // Surplus rows are overwritten by the next panel, or lie in the buffer's slack.
      for (Index each = 0; each < job.panels; ++each) {
        for (Index x = 0; x < across; ++x) {
          const Index at = first + row * across_ + x;
          const Index chunk = chunk_of(at);
          const float* from =
              sums + chunk * kGroup + (each * kMost + at - begin(chunk)) * kPanel;
          float* to = outputs_ + (each * job.rows * job.pitch + x * kSquare) * kPanel;
          transform_back(from, to, job.pitch * kPanel);
        }
      }
      const Index y = (cell.y * kScale + row * kSquare) * apart + phase / 2;
      const Index x = cell.x * kScale * apart + phase % 2;
      job.first = phase == 0 && row == 0;
      job.last = phase + 1 == s_.phases() && row + 1 == down;
      for (Index frame = 0; frame < kFrames; ++frame) {
        const Index n = s_.made_image(frame, cell.n);
        job.sums = outputs_ + frame * sizes_.outputs;
        job.output = pixel(s_.output, n, panel / 2, y, x);
        job.residual =
            s_.residual.channels == 0 ? nullptr : pixel(s_.residual, n, panel / 2, y, x);
        epilogue.start(job);
        epilogue.finish();
      }
    }
  }

  // The outputs of a square of all frames, for a panel.
  void transform_back(const float* from, float* to, Index row_step) const {
    if constexpr (kFrames == 1) {
      Transforms::output(from, sizes_.sums, to, row_step);
    } else {
      alignas(64) float products[kFrames][kProducts * kPanel];
      for (Index product = 0; product < kProducts; ++product) {
        typename Simd::Vector m[kTimes], y[kFrames];
#pragma GCC unroll 6
        for (Index time = 0; time < kTimes; ++time) {
          m[time] = Simd::load(from + (time * kProducts + product) * sizes_.sums);
        }
        Times::backward(m, y);
#pragma GCC unroll 6
        for (Index frame = 0; frame < kFrames; ++frame) {
          Simd::store(products[frame] + product * kPanel, y[frame]);
        }
      }
      for (Index frame = 0; frame < kFrames; ++frame) {
        Transforms::output(products[frame], kPanel, to + frame * sizes_.outputs, row_step);
      }
    }
  }

  T* pixel(const Image& image, Index n, Index block, Index y, Index x) const {
    return reinterpret_cast<T*>(context_.at(image.offset)) + image.at(n, block, y) +
           x * kBlock;
  }

  const ConvStep& s_;
  const Context& context_;
  const Sizes sizes_;
  float* input_;
  Factor* values_;
  float* sums_;
  float* outputs_;
  float* norms_;
  const Weight* kernels_;  // [panels][phases][times][matrices][blocks][512]
  // The squares of the loaded tile.
  Index down_ = 0;
  Index across_ = 0;
  Index squares_ = 0;
  Index chunks_ = 0;
};

}  // namespace rbln_vae
