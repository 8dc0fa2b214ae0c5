// gelu(z) = z Phi(z) and its derivative, a vector at a time.
#pragma once

#include "simd.h"

namespace ptv2 {

struct Gelu {
  f32v value, derivative;
};

// Phi(-|z|) = exp(-z^2/2) * polynomial(t) / 2, t = 1 / (1 + 0.3275911 |z| / sqrt 2): Abramowitz and Stegun 7.1.26, within
// 0.75e-7. The same exponential gives the density for the derivative, and small tails keep their digits.
template <bool SAVE> PTV2_INLINE Gelu gelu_erf(f32v z) {
  const f32v a = bits_as<f32v>(bits_as<u32v>(z) & 0x7FFFFFFFu);
  const f32v t = reciprocal(a * (0.3275911f * 0.70710678118654752f) + 1.0f), e = exp(z * z * -0.5f);
  f32v p = t * (0.5f * 1.061405429f) - 0.5f * 1.453152027f;
  p = p * t + 0.5f * 1.421413741f;
  p = p * t - 0.5f * 0.284496736f;
  p = p * t + 0.5f * 0.254829592f;
  const f32v tail = p * t * e, cdf = z < 0.0f ? tail : 1.0f - tail;
  if constexpr (!SAVE) return {z * cdf, z};
  return {z * cdf, cdf + z * (e * 0.39894228040143268f)};
}

}  // namespace ptv2
