// The derivative of GELU lies in [-0.1290, 1.1290]: 16-bit activations keep it as one byte, off by at most 0.0025.
#pragma once

namespace ptv2::gelu_code {

constexpr float LOW = -0.13f;
constexpr float STEP = 1.26f / 255.0f;      // decode: code * STEP + LOW
constexpr float INV_STEP = 255.0f / 1.26f;  // encode: round((g - LOW) * INV_STEP)

}  // namespace ptv2::gelu_code
