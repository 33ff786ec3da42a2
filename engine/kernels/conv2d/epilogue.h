// Processes the sums of a product: adds bias and residual, applies an activation, stores the
// result, and accumulates the statistics of its channels. It can process a few pixels at a time:
// an instruction set whose products run in parallel to its vector units overlaps the two.
#pragma once

#include "engine/kernels/simd/instruction_set.h"
#include "engine/kernels/simd/range.h"
#include "engine/steps.h"

namespace rbln_vae {

template <StoresImages Simd>
class Epilogue {
  using T = typename Simd::T;
  using Vector = typename Simd::Vector;

 public:
  // Sums of `rows` x `pixels` outputs whose first is (y, x), for `panels` panels.
  struct Job {
    const float* sums;  // [panels][rows][pitch][16]
    Index pitch;
    const float* bias;  // of all panels
    Index panel;
    Index panels;
    Index rows;
    Index pixels;
    T* output;          // of the first pixel, in the block of the first panel
    const T* residual;  // the same for the residual, or null
    Index pixel_step;   // elements from one output pixel to the next
    Index row_step;
    Index residual_row_step;
    Index block_step;
    float* partials;  // of the cell that the pixels belong to, or null
    Index points;     // outputs of the cell, by channel
    bool first;       // of the cell, for these panels
    bool last;
  };

  // For outputs of image `n`.
  Epilogue(const ConvStep& s, const Context& context, Index n)
      : s_(s), context_(context), n_(n) {}
  ~Epilogue() { report<Simd>(largest_, context_, n_); }
  Epilogue(const Epilogue&) = delete;
  Epilogue& operator=(const Epilogue&) = delete;

  // The previous job must be finished.
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
      if (job_.last && job_.partials != nullptr) end_panel();
      row_ = 0;
      ++p_;
    }
  }

  void finish() { advance(left_); }

 private:
  // Statistics of a panel. Values are relative to the cell's first pixel, so that a mean far from
  // zero loses no precision.
  struct Statistics {
    alignas(64) float shift[kPanel];
    alignas(64) float row_sum[kPanel];
    alignas(64) float row_square[kPanel];
    alignas(64) double sum[kPanel];
    alignas(64) double square[kPanel];
  };

  void do_pixels(Index count) {
    const Index panel = job_.panel + p_;
    const Index block = panel / 2 - job_.panel / 2;
    const Index at =
        block * job_.block_step + pixel_ * job_.pixel_step + panel % 2 * kPanel;
    const float* sums =
        job_.sums + ((p_ * job_.rows + row_) * job_.pitch + pixel_) * kPanel;
    T* to = job_.output + row_ * job_.row_step + at;
    const T* residual = job_.residual == nullptr
                            ? nullptr
                            : job_.residual + row_ * job_.residual_row_step + at;
    const Vector factor = Simd::set(s_.factor);
    const Vector bias = Simd::load(job_.bias + panel * kPanel);
    Vector largest = largest_;
    // Padding channels of the last block must read as zero.
    const bool pad = panel % 2 == 0 && panel + 1 == s_.panels();
    const bool count_in = job_.partials != nullptr;
    Statistics& statistics = statistics_[p_];
    Vector shift = bias, sum = bias, square = bias;
    if (count_in) {
      if (job_.first && row_ == 0 && pixel_ == 0) {
        Simd::store(statistics.shift, output(sums, factor, bias, residual));
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
      const Vector v = output(sums + i * kPanel, factor, bias,
                              residual == nullptr ? nullptr : residual + i * job_.pixel_step);
      see<Simd>(v, largest);
      Simd::store_elements(to + i * job_.pixel_step, v);
      if (pad) Simd::store_elements(to + i * job_.pixel_step + kPanel, Simd::set(0.0f));
      if (count_in) {
        const Vector distance = Simd::subtract(v, shift);
        sum = Simd::add(sum, distance);
        square = Simd::multiply_add(distance, distance, square);
      }
    }
    largest_ = largest;
    if (count_in) {
      Simd::store(statistics.row_sum, sum);
      Simd::store(statistics.row_square, square);
    }
  }

  // The output of one pixel for 16 channels.
  Vector output(const float* sums, const Vector& factor, const Vector& bias,
                const T* residual) const {
    Vector v = Simd::multiply_add(Simd::load(sums), factor, bias);
    if (residual != nullptr) v = Simd::add(v, Simd::load_elements(residual));
    return activated<Simd>(s_.output_activation, v);
  }

  // Sums of rows are accumulated in double precision.
  void end_row() {
    if (job_.partials == nullptr) return;
    Statistics& statistics = statistics_[p_];
    for (Index i = 0; i < kPanel; ++i) {
      statistics.sum[i] += static_cast<double>(statistics.row_sum[i]);
      statistics.square[i] += static_cast<double>(statistics.row_square[i]);
    }
  }

  // Stores the mean of each channel over the cell, and the sum of squared distances from it.
  void end_panel() {
    const Statistics& statistics = statistics_[p_];
    float* means = job_.partials + (job_.panel + p_) * kPanel;
    float* squares = means + s_.panels() * kPanel;
    for (Index i = 0; i < kPanel; ++i) {
      const double mean = statistics.sum[i] / static_cast<double>(job_.points);
      const double rest = statistics.square[i] - statistics.sum[i] * mean;
      means[i] = static_cast<float>(static_cast<double>(statistics.shift[i]) + mean);
      squares[i] = static_cast<float>(rest < 0 ? 0 : rest);
    }
  }

  const ConvStep& s_;
  const Context& context_;
  const Index n_;
  Job job_ = {};
  Index p_ = 0;
  Index row_ = 0;
  Index pixel_ = 0;
  Index left_ = 0;
  Statistics statistics_[Simd::kMaxPanels];
  Vector largest_ = Simd::set(0.0f);  // magnitudes of the tile's outputs
};

}  // namespace rbln_vae
