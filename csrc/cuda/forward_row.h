// What the forward kernels share: the online softmax of a warp's 16 queries, and what leaves the block at the end.
#pragma once

#include "key_blocks.h"

namespace ptv2::cuda {

constexpr int KEYS = 64;  // of a block of keys

template <class E, int D>
struct ForwardRow {
  float out[D / 8][4] = {};
  float largest[2] = {NOTHING, NOTHING}, sum[2] = {0, 0};  // sum: this lane's share

  // Scores to probabilities, dropped and scaled for their product with the values; what is in `out` shrinks to the new maximum.
  PTV2_DEVICE void soften(float (&scores)[KEYS / 8][4], const Keys& keys, int query) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = largest[half];
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[j][half * 2 + i];
          score = j * 8 + lane() % 4 * 2 + i < keys.count ? score * keys.scale2 : -INFINITY;
          top = fmaxf(top, score);
        }
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float shrink = power_of_2(largest[half] - top);
      largest[half] = top;
      sum[half] *= shrink;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) out[d][half * 2] *= shrink, out[d][half * 2 + 1] *= shrink;
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[j][half * 2 + i];
          score = power_of_2(score - top);
          sum[half] += score;
          score *= keys.value_scale;
        }
    }
    if (keys.draw.threshold) {
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j) {
        const uint32_t bits = kept_by_queries(keys.draw, query, keys.first + j * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!(bits >> i & 1)) scores[j][i] = 0;
      }
    }
  }

  // Output and log-sum-exp of queries query.. of sequence s; `staged`: 16 rows of this warp's in shared memory.
  PTV2_DEVICE void store(const Attention& a, const Sequence& s, int n, int query, E* staged) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = sum[half];
      all += shuffle_xor(all, 1);
      all += shuffle_xor(all, 2);
      const float inverse = a.keep_scale / all;
      const int row = lane() / 4 + half * 8;
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
        store_pair<E>(staged + row * ROW<D> + d * 8 + lane() % 4 * 2, out[d][half * 2] * inverse, out[d][half * 2 + 1] * inverse);
      if (lane() % 4 == 0 && query + row < s.length)
        a.lse[static_cast<int64_t>(n) * a.T + s.start + query + row] = (largest[half] + logarithm_2(all)) * LN2;
    }
    sync_warp();
    const int64_t stride = static_cast<int64_t>(a.N) * D;
    store_rows<E, D>(static_cast<E*>(a.out) + n * D, s.start + query, stride, s.length - query, staged, 16);
  }
};

// One step of a warp's 16 queries over a block of keys; pieces of 16 keys that do not exist are left out.
template <class E, int D>
PTV2_DEVICE void attend(ForwardRow<E, D>& row, const uint32_t (&q)[D / 16][4], const E* k, const E* v, const Keys& keys,
                        int query) {
  float scores[KEYS / 8][4] = {};
#pragma unroll
  for (int j = 0; j < KEYS / 16; ++j)
    if (j * 16 < keys.count)
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t b[4];
        load_matrices(b, k + j * 16 * ROW<D> + d * 16 + right_at(ROW<D>));
        multiply<E>(scores[2 * j], q[d], b[0], b[1]);
        multiply<E>(scores[2 * j + 1], q[d], b[2], b[3]);
      }
  row.soften(scores, keys, query);
#pragma unroll
  for (int j = 0; j < KEYS / 16; ++j)
    if (j * 16 < keys.count) {
      uint32_t probs[4];
      as_left<E>(probs, scores[2 * j], scores[2 * j + 1]);
      multiply_fragment<E, D>(row.out, probs, v + j * 16 * ROW<D>);
    }
}

// Rows past the last sequence, by the blocks that are there for them.
template <class E, int D>
PTV2_DEVICE void zero_rest(const Attention& a, int block, int blocks) {
  const int n = block_y();
  const int64_t end = a.cu_seqlens[a.B];
  zero_rows<E, D>(static_cast<E*>(a.out) + n * D, end, a.T, static_cast<int64_t>(a.N) * D, block, blocks);
  for (int64_t t = end + block * num_threads() + thread(); t < a.T; t += blocks * num_threads())
    a.lse[static_cast<int64_t>(n) * a.T + t] = 0;
}

}  // namespace ptv2::cuda
