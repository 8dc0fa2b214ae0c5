// Rows of dropout factors, W Philox counters at a time.
#pragma once

#include "ptv2/params.h"
#include "ptv2/philox.h"
#include "simd.h"

namespace ptv2 {

// keep_row writes whole groups of 4 W elements: buffers it fills need this much room past their end.
constexpr int64_t KEEP_SLACK = 4 * W;

// The product of each 64-bit lane's low half with m.
PTV2_INLINE u64v multiply_low(u64v x, uint32_t m) {
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

struct LowPairs {  // 64-bit lanes of a and b in turn, from their low halves, as 32-bit indices
  static constexpr int at(int e) { return (e & 2 ? W : 0) + e / 4 * 2 + e % 2; }
};
struct HighPairs {
  static constexpr int at(int e) { return LowPairs::at(e) + W / 2; }
};

// out[j] = 0 or scale for columns first + j, j < n (and up to KEEP_SLACK - 1 beyond), of the row whose column c has counter
// (c / 4, c1, c2, stream). first is a multiple of 4.
// Counter words live in the low halves of 64-bit lanes, where the widening product reads them; what is left in the high
// halves is never looked at until the words are put together.
inline void keep_row(float* out, int64_t n, uint32_t c1, uint32_t c2, philox::Stream stream, const Dropout& drop,
                     int64_t first = 0) {
  constexpr int GROUPS = W / 2;  // counters a vector
  u64v lane{};
  for (int i = 0; i < GROUPS; ++i) lane[i] = i;
  const f32v scale = broadcast(drop.scale);
  for (int64_t j = 0; j < n; j += 8 * GROUPS) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      u64v a = lane + static_cast<uint64_t>((first + j) / 4 + half * GROUPS), b = u64v{} + c1, c = u64v{} + c2;
      u64v d = u64v{} + static_cast<uint64_t>(drop.site * philox::NUM_STREAMS + stream);
      uint32_t k0 = static_cast<uint32_t>(drop.seed), k1 = static_cast<uint32_t>(drop.seed >> 32);
#pragma GCC unroll 7
      for (int round = 0; round < philox::ROUNDS; ++round) {
        const u64v p0 = multiply_low(a, philox::M0), p1 = multiply_low(c, philox::M1);
        a = (p1 >> 32) ^ b ^ (u64v{} + k0), b = p1;
        c = (p0 >> 32) ^ d ^ (u64v{} + k1), d = p0;
        k0 += philox::W0, k1 += philox::W1;
      }
      const u32v ab = bits_as<u32v>((a & 0xFFFFFFFFu) | (b << 32)), cd = bits_as<u32v>((c & 0xFFFFFFFFu) | (d << 32));
      const u32v low = shuffle_by<LowPairs>(ab, cd), high = shuffle_by<HighPairs>(ab, cd);
      float* to = out + j + half * 4 * GROUPS;
      store(to, low >= drop.threshold ? scale : f32v{});
      store(to + W, high >= drop.threshold ? scale : f32v{});
    }
  }
}

}  // namespace ptv2
