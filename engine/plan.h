// A plan: the steps of one run for one input shape, checked when they are added.
//
// Inputs have the same shape, and so have outputs: most runs have one of each, and those of
// videos several frames.
#pragma once

#include <array>
#include <string>
#include <variant>
#include <vector>

#include "engine/kernels/kernels.h"

namespace rbln_vae {

using Step =
    std::variant<ImportStep, ExportStep, ConvStep, WinogradStep, StatisticsStep, NormStep,
                 AttentionPackStep, AttentionStep, ModulateStep, PointwiseStep, ShuffleStep,
                 MoveRowsStep>;

using Shape = std::array<Index, 4>;

// Bytes of the arena.
struct Range {
  Index offset;
  Index bytes;
};

class Plan {
 public:
  // For so many inputs and outputs (N, C, H, W). Throws std::invalid_argument where sizes overflow
  // or are negative.
  Plan(const Kernels& kernels, Index arena_bytes, const Shape& input, const Shape& output,
       Index inputs, Index outputs, Index state_bytes);

  // Each checks that everything the step touches lies in the arena, and throws
  // std::invalid_argument if not. Sizes of weights count bytes.
  void add(const ImportStep& step);
  void add(const ExportStep& step);
  void add(const ConvStep& step, Index weight_bytes, Index bias_bytes, Index gamma_bytes,
           Index kept_bytes);
  void add(const WinogradStep& step, Index weight_bytes, Index kept_bytes);
  void add(const StatisticsStep& step);
  void add(const NormStep& step, Index weight_bytes, Index bias_bytes);
  void add(const AttentionPackStep& step);
  void add(const AttentionStep& step);
  void add(const ModulateStep& step);
  void add(const PointwiseStep& step);
  void add(const ShuffleStep& step, Index order_bytes);
  void add(const MoveRowsStep& step);

  const Kernels& kernels() const { return kernels_; }
  const std::vector<Step>& steps() const { return steps_; }
  const Shape& input_shape() const { return input_shape_; }
  const Shape& output_shape() const { return output_shape_; }
  Index inputs() const { return inputs_; }
  Index outputs() const { return outputs_; }
  Index arena_bytes() const { return arena_bytes_; }
  // Of the state, whose offsets follow those of the arena.
  Index state_bytes() const { return state_bytes_; }
  // Of one thread.
  Index scratch_bytes() const { return scratch_bytes_; }
  Index items(std::size_t step) const { return items_[step]; }
  // The parts of the arena that a step may touch.
  const std::vector<Range>& ranges(std::size_t step) const { return ranges_[step]; }

  void run_item(std::size_t step, const Context& context, Index item) const;

 private:
  void append(Step step, Index items, Index scratch);
  Index element_bytes() const { return bytes(kernels_.dtype); }
  void check_range(const char* what, Index offset, Index bytes) const;
  // Transformed kernels, which lie in the arena or are kept.
  void check_kernels(Index offset, const float* kept, Index kept_bytes, Index bytes) const;
  void check_image(const char* what, Index batch, const Image& image) const;
  // A residual may be left out.
  void check_residual(Index batch, const Image& residual, const Image& output) const;
  static void check_activation(Activation activation);
  void check_reading(Index batch, const Image& image, const Reading& reading) const;

  const Kernels& kernels_;
  Index arena_bytes_;
  Shape input_shape_;
  Shape output_shape_;
  Index inputs_;
  Index outputs_;
  Index state_bytes_;
  Index scratch_bytes_ = 0;
  std::vector<Step> steps_;
  std::vector<Index> items_;
  std::vector<std::vector<Range>> ranges_;
  mutable std::vector<Range> checked_;  // of the step that is being added
};

}  // namespace rbln_vae
