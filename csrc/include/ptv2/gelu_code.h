// The derivative of GELU lies in [-0.1290, 1.1290]: 16-bit activations keep it as one byte, off by at most 0.0025.
#pragma once

namespace ptv2::gelu_code {

constexpr float LOW = -0.13f;
constexpr float STEP = 1.26f / 255.0f;      // decode: code * STEP + LOW
constexpr float INV_STEP = 255.0f / 1.26f;  // encode: round((g - LOW) * INV_STEP)

// Six bits, for memory policy lean: multiples of 1/49 from -1/7, so that 0 and 1, where most units are, are exact; off by at most
// 0.0103. Four codes take three bytes: the columns of a row are cut into quarters, and byte k < 3 of column j holds the code of
// quarter k and two bits of the last quarter's.
constexpr float LOW6 = -1.0f / 7.0f, STEP6 = 1.0f / 49.0f, INV_STEP6 = 49.0f;

}  // namespace ptv2::gelu_code
