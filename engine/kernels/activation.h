// Scalar activation functions, for pointwise steps and for those that are too rare in convolutions
// to be vectorised.
#pragma once

#include <cmath>

#include "engine/steps.h"

namespace rbln_vae {

[[maybe_unused]] static inline float activate(Activation function, float x) {
  switch (function) {
    case Activation::kSilu:
      return x / (1.0f + std::exp(-x));
    case Activation::kGelu:
      return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case Activation::kMish:
      return x * std::tanh(x > 20.0f ? x : std::log1p(std::exp(x)));
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;  // a NaN stays a NaN
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kNone:
      break;
  }
  return x;
}

}  // namespace rbln_vae
