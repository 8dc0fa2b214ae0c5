// Loops over rows of any width: whole vectors, then one partial one.
#pragma once

#include "simd.h"

namespace ptv2 {

// f(i, n): n == W for whole vectors, fewer for the last. Loading through at(p, i, n) costs nothing when n == W is a constant.
template <class F> PTV2_INLINE void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + W <= count; i += W) f(i, std::integral_constant<int, W>{});
  if (i < count) f(i, static_cast<int>(count - i));
}
template <class T> PTV2_INLINE f32v load_at(const T* p, int64_t i, std::integral_constant<int, W>) { return load(p + i); }
template <class T> PTV2_INLINE f32v load_at(const T* p, int64_t i, int n) { return load(p + i, n); }
template <class T> PTV2_INLINE void store_at(T* p, int64_t i, f32v v, std::integral_constant<int, W>) { store(p + i, v); }
template <class T> PTV2_INLINE void store_at(T* p, int64_t i, f32v v, int n) { store(p + i, v, n); }

// Lanes past n set to zero.
PTV2_INLINE f32v clear_past(f32v v, std::integral_constant<int, W>) { return v; }
PTV2_INLINE f32v clear_past(f32v v, int n) {
  for (int i = n; i < W; ++i) v[i] = 0.0f;
  return v;
}

struct Moments {
  float mean, rstd;
};

// Mean and 1/std of a row that lies in cache, in two passes: the differences are squared, not the values.
inline Moments moments(const float* row, int64_t count, float eps) {
  f32v total{};
  for_vectors(count, [&](int64_t i, auto n) { total += load_at(row, i, n); });
  const float mean = sum(total) / static_cast<float>(count);
  f32v squares{};
  for_vectors(count, [&](int64_t i, auto n) {
    const f32v d = clear_past(load_at(row, i, n) - mean, n);
    squares += d * d;
  });
  return {mean, 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(count) + eps)};
}

}  // namespace ptv2
