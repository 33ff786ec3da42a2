// What the drivers of convolutions and attention ask of an instruction set.
//
// It has two pieces that know nothing of each other: how images are stored and worked on, 16
// floats at a time, and how products are made. `Joined` puts one of each together.
#pragma once

#include <concepts>
#include <type_traits>

#include "engine/kernels/simd/gemm.h"

namespace rbln_vae {

// Images of elements of type T, and arithmetic on vectors of 16 floats, a panel of channels.
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
  { S::maximum(v, v) } -> std::same_as<typename S::Vector>;
  { S::largest(v) } -> std::same_as<float>;
  { S::sum(v) } -> std::same_as<float>;
  // As precise as the type in which images are stored needs them.
  { S::exp2(v) } -> std::same_as<typename S::Vector>;
  { S::silu(v) } -> std::same_as<typename S::Vector>;
};

// Products of pixels of type Scratch by packed weights of type T. One product makes up to
// kMaxRows x kMaxPixels outputs for up to kMaxPanels panels of 16 channels.
template <class S>
concept MakesProducts = requires(const Gemm<typename S::T, typename S::Scratch>& operands) {
  requires std::same_as<typename S::Scratch, float> ||
               std::same_as<typename S::Scratch, typename S::T>;
  requires std::same_as<decltype(S::kMaxRows), const Index>;
  requires std::same_as<decltype(S::kMaxPixels), const Index>;
  requires std::same_as<decltype(S::kMaxPanels), const Index>;
  // Whether the next tile is loaded, and the sums before stored, during a product; and whether
  // products come in whole tiles of registers.
  requires std::same_as<decltype(S::kOverlaps), const bool>;
  requires std::same_as<decltype(S::kWholeTiles), const bool>;
  // Sums of a row of pixels lie this far apart.
  { S::sums_pitch(Index{}) } -> std::same_as<Index>;
  // Rows of a product on rows of so many pixels.
  { S::rows_at_once(Index{}) } -> std::same_as<Index>;
  // What a thread does before and after a step.
  S::enter();
  S::leave();
  S::gemm(operands);
  // What is to be done during a product, a part for each block and tap.
  requires !S::kOverlaps || requires { S::gemm(operands, [] {}); };
};

template <class S>
concept InstructionSet = StoresImages<S> && MakesProducts<S>;

template <StoresImages Images, MakesProducts Products>
  requires std::same_as<typename Images::T, typename Products::T>
struct Joined : Images, Products {
  using T = typename Images::T;
};

// Writes 16 channels into the thread's scratch: as they are where products take float32,
// else in the type of stored images.
template <StoresImages Simd, class Scratch>
static inline void put(Scratch* to, const typename Simd::Vector& v) {
  if constexpr (std::is_same_v<Scratch, float>) {
    Simd::store(to, v);
  } else {
    Simd::store_elements(to, v);
  }
}

}  // namespace rbln_vae
