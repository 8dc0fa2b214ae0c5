// The elementwise part of linear_gelu, in place on the product's output: one read, one write, and the derivative (a byte an
// element in bf16). gelu(z) = z Phi(z) (gelu.h), or z/2 (1 + tanh(u)) with u = sqrt(2/pi) (z + 0.044715 z^3).
#include <algorithm>

#include "gelu.h"
#include "kernels.h"
#include "ptv2/gelu_code.h"
#include "rows.h"

namespace ptv2 {
namespace {

constexpr int64_t BLOCK = 4096;  // elements a task: a few microseconds

template <bool SAVE> PTV2_INLINE Gelu gelu_tanh(f32v z) {
  const f32v u = (z * z * 0.044715f + 1.0f) * z * 0.79788456080286536f;
  const f32v tail = reciprocal(exp(min(u * 2.0f, broadcast(80.0f))) + 1.0f);  // (1 - tanh u) / 2
  const f32v half = 1.0f - tail;                    // (1 + tanh u) / 2
  if constexpr (!SAVE) return {z * half, z};
  const f32v slope = (z * z * (3.0f * 0.044715f) + 1.0f) * 0.79788456080286536f;
  return {z * half, half + z * (half * tail * 2.0f) * slope};
}

PTV2_INLINE void put(float* derivative, int64_t i, f32v g, std::integral_constant<int, W>) { store(derivative + i, g); }
PTV2_INLINE void put(float* derivative, int64_t i, f32v g, int n) { store(derivative + i, g, n); }
PTV2_INLINE u8v encode(f32v g) {  // codes are positive and below 255 for every z: adding a half and truncating rounds them
  constexpr float OFFSET = 0.5f - gelu_code::LOW * gelu_code::INV_STEP;
  return narrow8(bits_as<u32v>(__builtin_convertvector(g * gelu_code::INV_STEP + OFFSET, i32v)));
}
PTV2_INLINE void put(uint8_t* derivative, int64_t i, f32v g, std::integral_constant<int, W>) {
  const u8v code = encode(g);
  std::memcpy(derivative + i, &code, W);
}
PTV2_INLINE void put(uint8_t* derivative, int64_t i, f32v g, int n) {
  const u8v code = encode(g);
  std::memcpy(derivative + i, &code, n);
}
PTV2_INLINE f32v get(const float* derivative, int64_t i, std::integral_constant<int, W> n) { return load_at(derivative, i, n); }
PTV2_INLINE f32v get(const float* derivative, int64_t i, int n) { return load_at(derivative, i, n); }
PTV2_INLINE f32v decode(u8v code) {
  return __builtin_convertvector(bits_as<i32v>(widen8(code)), f32v) * gelu_code::STEP + gelu_code::LOW;
}
PTV2_INLINE f32v get(const uint8_t* derivative, int64_t i, std::integral_constant<int, W>) {
  return decode(load_as<u8v>(derivative + i));
}
PTV2_INLINE f32v get(const uint8_t* derivative, int64_t i, int n) {
  u8v code{};
  std::memcpy(&code, derivative + i, n);
  return decode(code);
}

template <class T, class D, bool TANH, bool SAVE> void fwd(const GeluParams& p) {
  parallel_ranges((p.count + BLOCK - 1) / BLOCK, 2, [&](int64_t first, int64_t last) {
    T* z = static_cast<T*>(p.z) + first * BLOCK;
    D* derivative = static_cast<D*>(p.derivative) + (SAVE ? first * BLOCK : 0);
    for_vectors(std::min(last * BLOCK, p.count) - first * BLOCK, [&](int64_t i, auto n) {
      const f32v x = load_at(z, i, n);
      const Gelu g = TANH ? gelu_tanh<SAVE>(x) : gelu_erf<SAVE>(x);
      store_at(z, i, g.value, n);
      if constexpr (SAVE) put(derivative, i, g.derivative, n);
    });
  });
}

// Rows of 4 * quarter columns whose 6-bit codes are packed four in three bytes.
template <class T, bool TANH> void fwd_packed(const GeluParams& p) {
  constexpr float OFFSET = 0.5f - gelu_code::LOW6 * gelu_code::INV_STEP6;
  const int64_t quarter = p.quarter, rows = p.count / std::max<int64_t>(4 * quarter, 1);
  parallel_ranges(rows, 1 + BLOCK / (4 * quarter + 1), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      T* z = static_cast<T*>(p.z) + t * 4 * quarter;
      uint8_t* packed = static_cast<uint8_t*>(p.derivative) + t * 3 * quarter;
      for_vectors(quarter, [&](int64_t i, auto n) {
        u32v code[4];
        for (int k = 0; k < 4; ++k) {
          const f32v x = load_at(z + k * quarter, i, n);
          const Gelu g = TANH ? gelu_tanh<true>(x) : gelu_erf<true>(x);
          store_at(z + k * quarter, i, g.value, n);
          code[k] = bits_as<u32v>(__builtin_convertvector(g.derivative * gelu_code::INV_STEP6 + OFFSET, i32v));
        }
        for (int k = 0; k < 3; ++k) {
          const u8v byte = narrow8(code[k] | (code[3] >> 2 * k & 3u) << 6);
          std::memcpy(packed + k * quarter + i, &byte, n);
        }
      });
    }
  });
}

template <class T> void bwd_packed(const GeluBwdParams& p) {
  const int64_t quarter = p.quarter, rows = p.count / std::max<int64_t>(4 * quarter, 1);
  parallel_ranges(rows, 1 + BLOCK / (4 * quarter + 1), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const T* dh = static_cast<const T*>(p.dh) + t * 4 * quarter;
      const uint8_t* packed = static_cast<const uint8_t*>(p.derivative) + t * 3 * quarter;
      T* dz = static_cast<T*>(p.dz) + t * 4 * quarter;
      for_vectors(quarter, [&](int64_t i, auto n) {
        u32v code[4] = {};
        for (int k = 0; k < 3; ++k) {
          u8v byte{};
          std::memcpy(&byte, packed + k * quarter + i, n);
          code[k] = widen8(byte) & 63u;
          code[3] |= widen8(byte) >> 6 << 2 * k;
        }
        for (int k = 0; k < 4; ++k) {
          const f32v g = __builtin_convertvector(bits_as<i32v>(code[k]), f32v) * gelu_code::STEP6 + gelu_code::LOW6;
          store_at(dz + k * quarter, i, load_at(dh + k * quarter, i, n) * g, n);
        }
      });
    }
  });
}

template <class T, class D> void fwd(const GeluParams& p) {
  if (p.quarter > 0 && p.derivative) {
    p.tanh ? fwd_packed<T, true>(p) : fwd_packed<T, false>(p);
    return;
  }
  if (p.tanh)
    p.derivative ? fwd<T, D, true, true>(p) : fwd<T, D, true, false>(p);
  else
    p.derivative ? fwd<T, D, false, true>(p) : fwd<T, D, false, false>(p);
}

template <class T, class D> void bwd(const GeluBwdParams& p) {
  if (p.quarter > 0) {
    bwd_packed<T>(p);
    return;
  }
  parallel_ranges((p.count + BLOCK - 1) / BLOCK, 2, [&](int64_t first, int64_t last) {
    const T* dh = static_cast<const T*>(p.dh) + first * BLOCK;
    const D* derivative = static_cast<const D*>(p.derivative) + first * BLOCK;
    T* dz = static_cast<T*>(p.dz) + first * BLOCK;
    for_vectors(std::min(last * BLOCK, p.count) - first * BLOCK,
                [&](int64_t i, auto n) { store_at(dz, i, load_at(dh, i, n) * get(derivative, i, n), n); });
  });
}

}  // namespace

void gelu_fwd(const GeluParams& p) { p.dtype == DType::f32 ? fwd<float, float>(p) : fwd<bf16, uint8_t>(p); }
void gelu_bwd(const GeluBwdParams& p) { p.dtype == DType::f32 ? bwd<float, float>(p) : bwd<bf16, uint8_t>(p); }

}  // namespace ptv2
