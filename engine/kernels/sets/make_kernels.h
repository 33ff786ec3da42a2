// Makes the row of an instruction set in the table of kernels.
#pragma once

#include <type_traits>

#include "engine/kernels/attention/attention.h"
#include "engine/kernels/conv2d/conv2d.h"
#include "engine/kernels/conv2d/doubling.h"
#include "engine/kernels/conv2d/filtering.h"
#include "engine/kernels/conv2d/halving.h"
#include "engine/kernels/conv2d/winograd_kernels.h"
#include "engine/kernels/sets.h"
#include "engine/kernels/simd/instruction_set.h"

namespace rbln_vae {

// The facts in the row that do not follow from the instruction set's types.
struct Facts {
  Isa isa;
  Index tile_bytes;
  Index most_queries;
  Costs costs;
  DoublingCosts doubling;
  double (*limit)(double seconds);
};

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) {
    return DType::kFloat32;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return DType::kBFloat16;
  } else {
    static_assert(std::is_same_v<T, Float16>);
    return DType::kFloat16;
  }
}

// Direct convolutions, and those that double an image.
template <InstructionSet Simd>
struct Convolutions {
  using Doubled = Filtering<Simd, Simd, Doubling<Simd>>;

  static Index scratch_bytes(const ConvStep& s) {
    return s.doubles ? Doubled::scratch_bytes(s) : Conv2d<Simd>::scratch_bytes(s);
  }
  static void run(const ConvStep& s, const Context& context, Index item) {
    s.doubles ? Doubled::run(s, context, item) : Conv2d<Simd>::run(s, context, item);
  }
};

// Without Winograd's algorithm.
template <InstructionSet Simd>
constexpr Kernels make_kernels(const Facts& facts) {
  return {facts.isa,
          dtype_of<typename Simd::T>(),
          dtype_of<typename Simd::Scratch>(),
          Simd::kMaxRows,
          Simd::kMaxPixels,
          Simd::kMaxPanels,
          Simd::kOverlaps,
          facts.tile_bytes,
          facts.most_queries,
          facts.costs,
          facts.doubling,
          Convolutions<Simd>::scratch_bytes,
          Convolutions<Simd>::run,
          nullptr,
          AttentionPack<Simd>::run,
          Attention<Simd>::scratch_bytes,
          Attention<Simd>::run,
          facts.limit};
}

// Those with Winograd's algorithm if the step asks for it, with the products of `Float32`.
template <InstructionSet Simd, InstructionSet Float32>
struct WinogradConvolutions {
  template <Index kFrames>
  using Filtered = Filtering<Simd, Float32, Winograd<Float32>, kFrames>;
  using Halved = Filtering<Simd, Float32, Halving<Float32>>;

  static Index scratch_bytes(const ConvStep& s) {
    if (!s.winograd()) return Convolutions<Simd>::scratch_bytes(s);
    if (s.stride == 2) return Halved::scratch_bytes(s);
    switch (s.at_once) {
      case 2: return Filtered<2>::scratch_bytes(s);
      case 4: return Filtered<4>::scratch_bytes(s);
      default: return Filtered<1>::scratch_bytes(s);
    }
  }
  static void run(const ConvStep& s, const Context& context, Index item) {
    if (!s.winograd()) return Convolutions<Simd>::run(s, context, item);
    if (s.stride == 2) return Halved::run(s, context, item);
    switch (s.at_once) {
      case 2: return Filtered<2>::run(s, context, item);
      case 4: return Filtered<4>::run(s, context, item);
      default: return Filtered<1>::run(s, context, item);
    }
  }
};

template <InstructionSet Simd, InstructionSet Float32 = Simd>
constexpr Kernels make_winograd_kernels(const Facts& facts) {
  Kernels kernels = make_kernels<Simd>(facts);
  kernels.conv2d_scratch = WinogradConvolutions<Simd, Float32>::scratch_bytes;
  kernels.conv2d = WinogradConvolutions<Simd, Float32>::run;
  kernels.winograd_kernels = WinogradKernels<Simd, Float32>::run;
  return kernels;
}

}  // namespace rbln_vae
