// Rows of dropout factors, W Philox counters at a time.
#pragma once

#include "ptv2/params.h"
#include "ptv2/philox.h"
#include "simd.h"

namespace ptv2 {

// keep_row writes whole groups of 4 W elements: buffers it fills need this much room past their end.
constexpr int64_t KEEP_SLACK = 4 * W;

struct HighWords {  // of even = products of even lanes, odd = products of odd lanes
  static constexpr int at(int e) { return e & 1 ? W + e : e + 1; }
};
struct LowWords {
  static constexpr int at(int e) { return e & 1 ? W + e - 1 : e; }
};

PTV2_INLINE u64v multiply_even_lanes(u64v x, uint32_t m) {
#if defined(__AVX512F__)
  return reinterpret_cast<u64v>(_mm512_mul_epu32(reinterpret_cast<__m512i>(x), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
  return reinterpret_cast<u64v>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
  return reinterpret_cast<u64v>(_mm_mul_epu32(reinterpret_cast<__m128i>(x), _mm_set1_epi64x(m)));
#else
  return (x & 0xFFFFFFFFu) * m;
#endif
}

PTV2_INLINE void multiply_wide(u32v x, uint32_t m, u32v& high, u32v& low) {
  const u32v even = bits_as<u32v>(multiply_even_lanes(bits_as<u64v>(x), m));
  const u32v odd = bits_as<u32v>(multiply_even_lanes(bits_as<u64v>(x) >> 32, m));
  high = shuffle_by<HighWords>(even, odd);
  low = shuffle_by<LowWords>(even, odd);
}

struct Interleave {  // a0 b0 a1 b1 ... of the low halves
  static constexpr int at(int e) { return (e & 1 ? W : 0) + e / 2; }
};
struct InterleaveHigh {
  static constexpr int at(int e) { return (e & 1 ? W : 0) + W / 2 + e / 2; }
};

// out[j] = 0 or scale for columns j < n (and up to KEEP_SLACK - 1 beyond) of the row with counters (j / 4, c1, c2, stream).
inline void keep_row(float* out, int64_t n, uint32_t c1, uint32_t c2, philox::Stream stream, const Dropout& drop) {
  u32v lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  const f32v scale = broadcast(drop.scale);
  for (int64_t j = 0; j < n; j += 4 * W) {
    u32v a = lane + static_cast<uint32_t>(j / 4), b = broadcast(c1), c = broadcast(c2);
    u32v d = broadcast(drop.site * philox::NUM_STREAMS + stream);
    uint32_t k0 = static_cast<uint32_t>(drop.seed), k1 = static_cast<uint32_t>(drop.seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < philox::ROUNDS; ++round) {
      u32v high0, low0, high1, low1;
      multiply_wide(a, philox::M0, high0, low0);
      multiply_wide(c, philox::M1, high1, low1);
      a = high1 ^ b ^ k0, b = low1, c = high0 ^ d ^ k1, d = low0;
      k0 += philox::W0, k1 += philox::W1;
    }
    const u32v ac_low = shuffle_by<Interleave>(a, c), ac_high = shuffle_by<InterleaveHigh>(a, c);
    const u32v bd_low = shuffle_by<Interleave>(b, d), bd_high = shuffle_by<InterleaveHigh>(b, d);
    const u32v word[4] = {shuffle_by<Interleave>(ac_low, bd_low), shuffle_by<InterleaveHigh>(ac_low, bd_low),
                          shuffle_by<Interleave>(ac_high, bd_high), shuffle_by<InterleaveHigh>(ac_high, bd_high)};
    for (int i = 0; i < 4; ++i) store(out + j + i * W, word[i] >= drop.threshold ? scale : f32v{});
  }
}

}  // namespace ptv2
