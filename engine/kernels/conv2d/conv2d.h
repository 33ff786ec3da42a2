// Direct convolution for one instruction set. An item of the step is one tile of the image, for
// some of the output channels.
//
// The tile's input is copied into the thread's scratch, with its halo and the zeros around the
// image, and norm and activation are applied on the way. So each is computed once per tile, and
// products read aligned memory that stays in the L2 cache. Sums are completed in registers; bias,
// residual and statistics follow immediately.
#pragma once

#include <cstring>

#include "engine/kernels/conv2d/epilogue.h"
#include "engine/kernels/conv2d/loader.h"
#include "engine/kernels/simd/instruction_set.h"
#include "engine/steps.h"

namespace rbln_vae {

template <InstructionSet Simd>
class Conv2d {
  using T = typename Simd::T;
  using Scratch = typename Simd::Scratch;
  static constexpr Index kLoadedAtOnce = 8;

 public:
  static Index scratch_bytes(const ConvStep& s) {
    return tiles_bytes(s) + s.norm_bytes();
  }

  static void run(const ConvStep& s, const Context& context, Index item) {
    Conv2d(s, context).run(item);
  }

 private:
  Conv2d(const ConvStep& s, const Context& context) : s_(s), context_(context) {
    pitch_ = s.columns_read();
    plane_ = s.rows_read() * pitch_ * kBlock;
  }

  static Index tiles_bytes(const ConvStep& s) {
    return (s.together > 1 ? 2 : 1) * tile_elements(s) * static_cast<Index>(sizeof(Scratch));
  }

  static Index tile_elements(const ConvStep& s) {
    // Products may read, and discard, a row of pixels beyond the last.
    const Index slack = (Simd::kMaxPixels + 1) * s.stride;
    return (s.blocks() * s.rows_read() * s.columns_read() + slack) * kBlock;
  }

  T* pixel(const Image& image, Index n, Index block, Index y, Index x) const {
    return reinterpret_cast<T*>(context_.at(image.offset)) + image.at(n, block, y) +
           x * kBlock;
  }

  void run(Index item) {
    Simd::enter();
    const Index split = s_.split(item);
    const Index begin = s_.first_tile(item);
    const Index end = smaller(begin + s_.together, s_.tiles());
    const Index panels = s_.panels();
    // Whole groups of panels, in even parts.
    const Index groups = ceil_div(panels, Simd::kMaxPanels);
    const Index first = groups * split / s_.splits;
    const Index last = groups * (split + 1) / s_.splits;
    Scratch* here = reinterpret_cast<Scratch*>(context_.scratch);
    Scratch* there = here + (s_.together > 1 ? tile_elements(s_) : 0);
    Loader<Simd> loader(s_, context_,
                        reinterpret_cast<float*>(context_.scratch + tiles_bytes(s_)));
    for (Index tile = begin; tile < end; ++tile) {
      const ConvTile current(s_, tile);
      if (tile == begin) {
        loader.start(current, here, plane_);
      }
      loader.finish();
      if (tile + 1 < end) loader.start(ConvTile(s_, tile + 1), there, plane_);
      Epilogue<Simd> epilogue(s_, context_, current.n);
      // The loading of the next tile is distributed over the groups and cells.
      Index parts = (last - first) * ceil_div(current.height, s_.cell_height) *
                    ceil_div(current.width, s_.cell_width);
      for (Index group = first; group < last && !interrupted<Simd>(context_); ++group) {
        const Index panel = group * Simd::kMaxPanels;
        current.each_cell(s_, [&](const ConvTile& cell) {
          const Index share = ceil_div(loader.left(), parts--);
          const Scratch* const input =
              here + ((cell.y - current.y) * pitch_ + cell.x - current.x) * s_.stride * kBlock;
          convolve(cell, input, panel, smaller(Simd::kMaxPanels, panels - panel), epilogue,
                   loader, share);
        });
      }
      epilogue.finish();
      Scratch* const swapped = here;
      here = there;
      there = swapped;
    }
    Simd::leave();
  }

  // All pixels of a cell for a few panels.
  void convolve(const ConvTile& cell, const Scratch* input, Index panel, Index panels,
                Epilogue<Simd>& epilogue, Loader<Simd>& loader, Index to_load) {
    const Index phases = s_.phases();
    const Index blocks = s_.blocks();
    const Index packed = s_.packed_blocks();
    const Index taps = s_.taps();
    const Index panel_step = phases * packed * taps * kPanelBlock;
    // Strides above 2 have no product of several pixels.
    const Index most = s_.stride <= 2 ? Simd::kMaxPixels : 1;
    const Index chunks = ceil_div(cell.width, most);
    const Index stripes = ceil_div(cell.height, Simd::rows_at_once(smaller(cell.width, most)));
    Index offsets[kMaxTaps];
    for (Index tap = 0; tap < taps; ++tap) {
      offsets[tap] = (tap / s_.kernel_width * pitch_ + tap % s_.kernel_width) * kBlock;
    }
    Gemm<T, Scratch> g;
    g.row_step = s_.stride * pitch_ * kBlock;
    g.pixel_step = s_.stride * kBlock;
    g.taps = offsets;
    g.tap_count = taps;
    g.blocks = blocks;
    g.plane = plane_;
    g.last_channels = s_.input.channels - (s_.input.blocks() - 1) * kBlock;
    g.panel_step = panel_step;
    g.panels = panels;

    const Index scale = s_.upsample ? 2 : 1;
    typename Epilogue<Simd>::Job job;
    job.panel = panel;
    job.panels = panels;
    job.pixel_step = scale * kBlock;
    job.row_step = scale * s_.output.row * kBlock;
    job.residual_row_step = scale * s_.residual.row * kBlock;
    job.block_step = s_.output.width * kBlock;
    job.partials = cell.partials(s_, context_);
    job.points = cell.height * cell.width * s_.points();

    // How many times a part of the next tile can be loaded.
    [[maybe_unused]] const Index turns =
        phases * stripes * chunks * blocks * taps;
    [[maybe_unused]] Index credit = 0;

    for (Index phase = 0; phase < phases; ++phase) {
      const Index down = phase / 2;
      const Index right = phase % 2;
      job.bias = s_.bias + phase * s_.bias_step();
      g.b = static_cast<const T*>(s_.weights) + panel * panel_step +
            (phase * packed + s_.skipped_blocks()) * taps * kPanelBlock;
      for (Index stripe = 0; stripe < stripes; ++stripe) {
        // Even parts: a product of a single row is slow where one makes several.
        const Index row = cell.height * stripe / stripes;
        g.rows = cell.height * (stripe + 1) / stripes - row;
        for (Index chunk = 0; chunk < chunks; ++chunk) {
          // Even parts, or whole tiles and a rest.
          const Index column = Simd::kWholeTiles ? chunk * most : cell.width * chunk / chunks;
          const Index end = Simd::kWholeTiles ? smaller(column + most, cell.width)
                                              : cell.width * (chunk + 1) / chunks;
          g.pixels = end - column;
          g.a = input + row * g.row_step + column * g.pixel_step;
          g.c = sums_[turn_];
          const Index y = (cell.y + row) * scale + down;
          const Index x = (cell.x + column) * scale + right;
          job.sums = g.c;
          job.pitch = Simd::sums_pitch(g.pixels);
          job.rows = g.rows;
          job.pixels = g.pixels;
          job.output = pixel(s_.output, cell.n, panel / 2, y, x);
          job.residual = s_.residual.channels == 0
                             ? nullptr
                             : pixel(s_.residual, cell.n, panel / 2, y, x);
          job.first = phase == 0 && row == 0 && chunk == 0;
          job.last = phase + 1 == phases && row + g.rows == cell.height && chunk + 1 == chunks;
          if constexpr (Simd::kOverlaps) {
            // While this product runs, the sums of the previous one are stored and the next tile
            // is loaded.
            const Index share = ceil_div(epilogue.left(), blocks * taps);
            Simd::gemm(g, [&] {
              epilogue.advance(share);
              // A few pixels at a time, since each call has a fixed cost.
              credit += to_load;
              if (credit >= kLoadedAtOnce * turns) {
                credit -= kLoadedAtOnce * turns;
                loader.advance(kLoadedAtOnce);
              }
            });
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
  Index pitch_;
  Index plane_;
  // Two buffers if the sums of one product are stored during the next.
  Index turn_ = 0;
  alignas(64) float sums_[Simd::kOverlaps ? 2 : 1]
                         [Simd::kMaxPanels * Simd::kMaxRows * Simd::kMaxPixels * kPanel];
};

}  // namespace rbln_vae
