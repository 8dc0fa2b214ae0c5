// Vectors of the widest float registers of the instruction set this file is compiled for, through the vector extension of
// GCC and Clang: one source for AVX-512, AVX2 and the baseline. 16-bit floats are widened on load and rounded on store.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#define PTV2_INLINE inline __attribute__((always_inline))

namespace ptv2 {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float f32v __attribute__((vector_size(W * 4)));
typedef int32_t i32v __attribute__((vector_size(W * 4)));
typedef uint32_t u32v __attribute__((vector_size(W * 4)));
typedef uint64_t u64v __attribute__((vector_size(W * 4)));
typedef uint16_t u16v __attribute__((vector_size(W * 2)));
typedef uint8_t u8v __attribute__((vector_size(W)));

struct bf16 {
  uint16_t bits;
};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class V> PTV2_INLINE V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class To, class From> PTV2_INLINE To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof(To));
  return to;
}
PTV2_INLINE f32v broadcast(float x) { return x - f32v{}; }
PTV2_INLINE u32v broadcast(uint32_t x) { return x + u32v{}; }

// Integers to fewer and more bits. GCC takes lanes apart for the narrowing that AVX-512 does in one instruction.
PTV2_INLINE u16v narrow16(u32v v) {
#if defined(__AVX512F__)
  return reinterpret_cast<u16v>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, u16v);
#endif
}
PTV2_INLINE u8v narrow8(u32v v) {
#if defined(__AVX512F__)
  return reinterpret_cast<u8v>(_mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, u8v);
#endif
}
PTV2_INLINE u32v widen8(u8v v) {
#if defined(__AVX512F__)
  return reinterpret_cast<u32v>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, u32v);
#endif
}

PTV2_INLINE f32v load(const float* p) { return load_as<f32v>(p); }
PTV2_INLINE f32v load(const bf16* p) {
  return bits_as<f32v>(__builtin_convertvector(load_as<u16v>(p), u32v) << 16);
}
PTV2_INLINE void store(float* p, f32v v) { std::memcpy(p, &v, sizeof(v)); }
PTV2_INLINE void store(bf16* p, f32v v) {  // round to nearest even; NaN stays NaN
  const u32v u = bits_as<u32v>(v);
  const u32v rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const u16v narrow = narrow16(v != v ? broadcast(uint32_t{0x7FC0}) : rounded);
  std::memcpy(p, &narrow, sizeof(narrow));
}

// The last n < W elements of a row; lanes past n are zero.
template <class T> PTV2_INLINE f32v load(const T* p, int n) {
  T lanes[W] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T> PTV2_INLINE void store(T* p, f32v v, int n) {
  T lanes[W];
  store(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// Lanes picked from (a, b) by constant indices 0 .. 2W-1.
template <class V, int... I> PTV2_INLINE V shuffle(V a, V b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return bits_as<V>(__builtin_shuffle(bits_as<i32v>(a), bits_as<i32v>(b), i32v{I...}));
#endif
}
template <class Index, class V, int... E> PTV2_INLINE V shuffle_by(V a, V b, std::integer_sequence<int, E...>) {
  return shuffle(a, b, std::integer_sequence<int, Index::at(E)...>{});
}
template <class Index, class V> PTV2_INLINE V shuffle_by(V a, V b) {
  return shuffle_by<Index>(a, b, std::make_integer_sequence<int, W>{});
}

PTV2_INLINE f32v max(f32v a, f32v b) { return a < b ? b : a; }  // a NaN in `a` stays
PTV2_INLINE f32v min(f32v a, f32v b) { return a > b ? b : a; }

// Sum and maximum of the lanes: halves are folded onto each other, in an order that depends on W alone.
template <int H> struct SwapHalves {
  static constexpr int at(int e) { return e ^ H; }
};
template <int H = W / 2> PTV2_INLINE float sum(f32v v) {
  v += shuffle_by<SwapHalves<H>>(v, v);
  if constexpr (H > 1)
    return sum<H / 2>(v);
  else
    return v[0];
}
template <int H = W / 2> PTV2_INLINE float max(f32v v) {
  v = max(v, shuffle_by<SwapHalves<H>>(v, v));
  if constexpr (H > 1)
    return max<H / 2>(v);
  else
    return v[0];
}

// exp to 2 units in the last place (Cephes expf's polynomial). The smallest result is 1.2e-38, or 2^-149 with AVX-512.
PTV2_INLINE f32v exp(f32v x) {
#if defined(__AVX512F__)
  x = min(max(x, broadcast(-104.0f)), broadcast(89.0f));  // NaN passes through
  const f32v n = _mm512_roundscale_ps(x * 1.44269504088896341f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = min(max(x, broadcast(-87.33f)), broadcast(88.37f));
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const f32v t = x * 1.44269504088896341f + magic;
  const f32v n = t - magic;
#endif
  const f32v r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f32v p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);  // p * 2^n
#else
  return p * bits_as<f32v>((bits_as<i32v>(t) - 0x4B400000 + 127) << 23);
#endif
}

// 1 / x to one unit in the last place.
PTV2_INLINE f32v reciprocal(f32v x) {
#if defined(__AVX512F__)
  const f32v r = _mm512_rcp14_ps(x);  // 14 bits; a Newton step doubles them
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// Butterfly transposition of W rows of W floats, log2(W) stages of two-input shuffles.
template <int H> struct LowHalf {
  static constexpr int at(int e) { return e & H ? W + e - H : e; }
};
template <int H> struct HighHalf {
  static constexpr int at(int e) { return e & H ? W + e : e + H; }
};
template <int H> PTV2_INLINE void transpose(f32v (&rows)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & H)) {
      const f32v a = rows[i], b = rows[i + H];
      rows[i] = shuffle_by<LowHalf<H>>(a, b);
      rows[i + H] = shuffle_by<HighHalf<H>>(a, b);
    }
  if constexpr (H > 1) transpose<H / 2>(rows);
}
PTV2_INLINE void transpose(f32v (&rows)[W]) { transpose<W / 2>(rows); }

}  // namespace ptv2
