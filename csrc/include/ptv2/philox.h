// Philox4x32 with 7 rounds (Salmon et al., SC 2011): the dropout bits of every backend. The counters are those of
// ptv2_engine/ops/_philox.py, so a mask depends on the seed, the call site and the element's position alone.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PTV2_HD __host__ __device__ __forceinline__
#else
#define PTV2_HD inline
#endif

namespace ptv2::philox {

constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;  // key increments
constexpr int ROUNDS = 7;

enum Stream : uint32_t { HIDDEN = 0, PREFIX_PROB = 1, TOKEN_PROB = 2, PREFIX_K = 3, PREFIX_V = 4, NUM_STREAMS = 8 };

struct Words {
  uint32_t w[4];
};

PTV2_HD Words words(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < ROUNDS; ++round) {
    const uint64_t a = static_cast<uint64_t>(M0) * c0, b = static_cast<uint64_t>(M1) * c2;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c0 = n0, c1 = static_cast<uint32_t>(b), c2 = n2, c3 = static_cast<uint32_t>(a);
    k0 += W0, k1 += W1;
  }
  return {{c0, c1, c2, c3}};
}

// The smallest word that is kept at drop probability p.
PTV2_HD uint32_t threshold(double p) {
  const double t = p * 4294967296.0 + 0.5;
  return t >= 4294967295.0 ? 0xFFFFFFFFu : static_cast<uint32_t>(t);
}

}  // namespace ptv2::philox
