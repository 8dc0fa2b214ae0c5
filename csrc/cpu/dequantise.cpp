// Quantised frozen weights back to the compute dtype, W = value(code) * scale: every code is read once, every weight written
// once. The product is fp32 and rounded once, so that all instruction sets and the reference agree in every bit.
#include "kernels.h"
#include "rows.h"

namespace ptv2 {
namespace {

constexpr int64_t BLOCK = 64;  // weights that share one absmax in NF4
constexpr int64_t GRAIN = 16384;

PTV2_INLINE u32v load_bytes(const uint8_t* p, std::integral_constant<int, W>) { return widen8(load_as<u8v>(p)); }
PTV2_INLINE u32v load_bytes(const uint8_t* p, int n) {
  uint8_t lanes[W] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return widen8(load_as<u8v>(lanes));
}
PTV2_INLINE f32v from_int(i32v v) { return __builtin_convertvector(v, f32v); }

PTV2_INLINE f32v decode_int8(u32v byte) { return from_int(bits_as<i32v>(byte << 24) >> 24); }

// e4m3fn: 4 exponent bits of bias 7, 3 of mantissa, no infinities, NaN is all ones. A subnormal goes through an integer
// conversion, because a float32 subnormal is flushed where the program asked for that.
PTV2_INLINE f32v decode_e4m3(u32v byte) {
  const u32v low = byte & 0x7Fu;
  const f32v small = from_int(bits_as<i32v>(low)) * 0x1p-9f;
  const f32v normal = bits_as<f32v>((low << 20) + (120u << 23));
  const u32v magnitude = bits_as<u32v>(low < 8u ? small : normal);
  const u32v finite = magnitude | (byte & 0x80u) << 24;
  return bits_as<f32v>(low == 0x7Fu ? broadcast(uint32_t{0x7FC00000}) : finite);
}

// NF4's levels, kernels/nf4.py.
alignas(64) constexpr float LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

PTV2_INLINE f32v level(u32v index) {
#if defined(__AVX512F__)
  return bits_as<f32v>(_mm512_permutexvar_ps(bits_as<__m512i>(index), _mm512_load_ps(LEVELS)));
#elif defined(__AVX2__)
  const __m256i lane = bits_as<__m256i>(index);  // the permutation looks at three bits, the blend at the sign
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(LEVELS), lane);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(LEVELS + 8), lane);
  return bits_as<f32v>(_mm256_blendv_ps(low, high, bits_as<__m256>(index << 28)));
#else
  f32v v{};
  for (int i = 0; i < W; ++i) v[i] = LEVELS[index[i]];
  return v;
#endif
}

// W codes of W / 2 bytes: both nibbles of a byte, the high one first, into the two bytes of a 16-bit lane.
PTV2_INLINE u32v load_nibbles(const uint8_t* p) {
  typedef uint8_t bytes __attribute__((vector_size(W / 2)));
  typedef uint16_t words __attribute__((vector_size(W)));
  const words x = __builtin_convertvector(load_as<bytes>(p), words);
  return widen8(bits_as<u8v>(x >> 4 | (x & 15) << 8));
}

template <class T, class Decode> void run_rows(const DequantiseParams& p, const Decode& decode) {
  parallel_ranges(p.rows, 1 + GRAIN / (p.columns + 1), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const uint8_t* codes = static_cast<const uint8_t*>(p.codes) + r * p.columns;
      T* out = static_cast<T*>(p.out) + r * p.columns;
      const float scale = p.scales[r];
      for_vectors(p.columns, [&](int64_t i, auto n) { store_at(out, i, decode(load_bytes(codes + i, n)) * scale, n); });
    }
  });
}

template <class T> void run_nf4(const DequantiseParams& p) {
  parallel_ranges(p.rows * p.columns / BLOCK, GRAIN / BLOCK, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const uint8_t* codes = static_cast<const uint8_t*>(p.codes) + b * (BLOCK / 2);
      T* out = static_cast<T*>(p.out) + b * BLOCK;
      const float scale = p.scales[b];
      for (int64_t i = 0; i < BLOCK; i += W) store(out + i, level(load_nibbles(codes + i / 2)) * scale);
    }
  });
}

template <class T> void run(const DequantiseParams& p) {
  switch (p.kind) {
    case Quantisation::int8: return run_rows<T>(p, [](u32v byte) { return decode_int8(byte); });
    case Quantisation::fp8: return run_rows<T>(p, [](u32v byte) { return decode_e4m3(byte); });
    case Quantisation::nf4: return run_nf4<T>(p);
  }
}

}  // namespace

void dequantise(const DequantiseParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace ptv2
