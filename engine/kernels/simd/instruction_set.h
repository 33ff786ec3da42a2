// The requirements of convolutions and attention for an instruction set.
//
// An instruction set has two independent parts: how images are stored and processed, 16 floats at
// a time, and how products are computed. `Joined` combines one of each.
#pragma once

#include <concepts>
#include <type_traits>

#include "engine/kernels/activation.h"
#include "engine/kernels/simd/gemm.h"

namespace rbln_vae {

// Images with elements of type T, and arithmetic on vectors of 16 floats, one panel of channels.
template <class S>
concept StoresImages = requires(const typename S::Vector& v, const float* floats, float* sums,
                                const typename S::T* from, typename S::T* to) {
  { S::set(1.0f) } -> std::same_as<typename S::Vector>;
  { S::load(floats) } -> std::same_as<typename S::Vector>;
  { S::store(sums, v) };
  { S::load_elements(from) } -> std::same_as<typename S::Vector>;
  { S::store_elements(to, v) };
  { S::add(v, v) } -> std::same_as<typename S::Vector>;
  { S::subtract(v, v) } -> std::same_as<typename S::Vector>;
  { S::multiply(v, v) } -> std::same_as<typename S::Vector>;
  { S::multiply_add(v, v, v) } -> std::same_as<typename S::Vector>;  // v * v + v
  { S::magnitude(v) } -> std::same_as<typename S::Vector>;
  // Of a NaN and another, the second.
  { S::maximum(v, v) } -> std::same_as<typename S::Vector>;
  { S::largest(v) } -> std::same_as<float>;
  { S::sum(v) } -> std::same_as<float>;
  // As precise as the type of stored images requires.
  { S::exp2(v) } -> std::same_as<typename S::Vector>;
  { S::silu(v) } -> std::same_as<typename S::Vector>;
};

// Products of pixels of type Scratch and packed weights of type T. One product computes up to
// kMaxRows x kMaxPixels outputs for up to kMaxPanels panels of 16 channels.
template <class S>
concept MakesProducts = requires(const Gemm<typename S::T, typename S::Scratch>& operands) {
  requires std::same_as<typename S::Scratch, float> ||
               std::same_as<typename S::Scratch, typename S::T>;
  requires std::same_as<decltype(S::kMaxRows), const Index>;
  requires std::same_as<decltype(S::kMaxPixels), const Index>;
  requires std::same_as<decltype(S::kMaxPanels), const Index>;
  // Whether a product overlaps with loading the next tile and storing the previous sums; and
  // whether products are computed in whole tile registers.
  requires std::same_as<decltype(S::kOverlaps), const bool>;
  requires std::same_as<decltype(S::kWholeTiles), const bool>;
  // How many products may take turns to prefetch a panel of weights.
  requires std::same_as<decltype(S::kPrefetchTurns), const Index>;
  // The distance of rows of sums, in pixels.
  { S::sums_pitch(Index{}) } -> std::same_as<Index>;
  // The number of rows of a product, for rows with a number of pixels.
  { S::rows_at_once(Index{}) } -> std::same_as<Index>;
  // Called by a thread before and after an item.
  S::enter();
  S::leave();
  S::gemm(operands);
  // With overlap, a function to call during a product, once for each block and tap.
  requires !S::kOverlaps || requires { S::gemm(operands, [] {}); };
};

template <class S>
concept InstructionSet = StoresImages<S> && MakesProducts<S>;

template <StoresImages Images, MakesProducts Products>
  requires std::same_as<typename Images::T, typename Products::T>
struct Joined : Images, Products {
  using T = typename Images::T;
};

// The larger of each of 16 channels and zero; a NaN stays a NaN.
template <StoresImages Simd>
static inline typename Simd::Vector relu(const typename Simd::Vector& v) {
  return Simd::maximum(Simd::set(0.0f), v);
}

// Applies any activation to 16 channels. Most are too rare to be vectorised.
template <StoresImages Simd>
static inline typename Simd::Vector activated(Activation function,
                                              const typename Simd::Vector& v) {
  if (function == Activation::kNone) return v;
  if (function == Activation::kSilu) return Simd::silu(v);
  if (function == Activation::kRelu) return relu<Simd>(v);
  alignas(64) float lanes[kPanel];
  Simd::store(lanes, v);
  for (float& lane : lanes) lane = activate(function, lane);
  return Simd::load(lanes);
}

// Writes 16 channels to the thread's scratch: as float32 if products take float32, else in the
// type of stored images.
template <StoresImages Simd, class Scratch>
static inline void put(Scratch* to, const typename Simd::Vector& v) {
  if constexpr (std::is_same_v<Scratch, float>) {
    Simd::store(to, v);
  } else {
    Simd::store_elements(to, v);
  }
}

}  // namespace rbln_vae
