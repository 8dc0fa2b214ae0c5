// Prefix attention, forward: one block owns (64 queries, head) of a sequence, a warp 16 of them with all their columns in
// registers. Key blocks arrive two deep by cp.async: first the prefix's, read from its one copy, then the sequence's own.
//
// HBM: q, k, v read once where a sequence fits one query tile (again from L2 for each further one), out and lse written once.
#include "tile.h"

namespace ptv2::cuda {

constexpr int QUERIES = 64, KEYS = 64, FORWARD_THREADS = 128;

template <int D>
constexpr int FORWARD_SHARED = (QUERIES + 4 * KEYS) * ROW<D> * 2;

// One online-softmax step over KEYS keys of which `count` exist; sum is this lane's share of the row's.
template <class E, int D>
struct Row {
  float out[D / 8][4] = {};
  float largest[2] = {NOTHING, NOTHING}, sum[2] = {0, 0};

  PTV2_DEVICE void attend(const uint32_t (&q)[D / 16][4], const E* k, const E* v, int count, float scale2, float value_scale,
                          const Draw& draw, int query, int key) {
    float scores[KEYS / 8][4] = {};
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j)
      if (j * 16 < count)
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          uint32_t b[4];
          load_matrices(b, k + j * 16 * ROW<D> + d * 16 + right_at(ROW<D>));
          multiply<E>(scores[2 * j], q[d], b[0], b[1]);
          multiply<E>(scores[2 * j + 1], q[d], b[2], b[3]);
        }
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = largest[half];
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[j][half * 2 + i];
          score = j * 8 + lane() % 4 * 2 + i < count ? score * scale2 : -INFINITY;
          top = fmaxf(top, score);
        }
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      shrink[half] = power_of_2(largest[half] - top);
      largest[half] = top;
      sum[half] *= shrink[half];
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[j][half * 2 + i];
          score = power_of_2(score - top);
          sum[half] += score;
          score *= value_scale;
        }
    }
    if (draw.threshold) {
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j) {
        const uint32_t bits = kept_by_queries(draw, query, key + j * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!(bits >> i & 1)) scores[j][i] = 0;
      }
    }
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[d][i] *= shrink[i / 2];
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j)
      if (j * 16 < count) {
        uint32_t probs[4];
        as_left<E>(probs, scores[2 * j], scores[2 * j + 1]);
        multiply_fragment<E, D>(out, probs, v + j * 16 * ROW<D>);
      }
  }
};

template <class E, int D>
PTV2_KERNEL(FORWARD_THREADS, D <= 96 ? 3 : 2) forward_kernel(const Attention a) {
  const int n = block_y(), b = block_z(), column = n * D;
  const int64_t out_row = static_cast<int64_t>(a.N) * D;
  if (b == a.B) {  // rows past the last sequence
    const int64_t end = a.cu_seqlens[b];
    zero_rows<E, D>(static_cast<E*>(a.out) + column, end, a.T, out_row, block_x(), num_blocks_x());
    for (int64_t t = end + block_x() * num_threads() + thread(); t < a.T; t += num_blocks_x() * num_threads())
      a.lse[static_cast<int64_t>(n) * a.T + t] = 0;
    return;
  }
  const Sequence s = sequence(a, b);
  const int first = block_x() * QUERIES;
  if (first >= s.length) return;

  E* const q_tile = reinterpret_cast<E*>(shared_memory());
  E* const k_tiles = q_tile + QUERIES * ROW<D>;
  E* const v_tiles = k_tiles + 2 * KEYS * ROW<D>;
  const int prefix_blocks = ceil_div(s.num_prefix, KEYS), blocks = prefix_blocks + ceil_div(s.length, KEYS);
  const E* const prefix_k = static_cast<const E*>(a.prefix_k) + s.prompt * a.prefix_k_prompt + column;
  const E* const prefix_v = static_cast<const E*>(a.prefix_v) + s.prompt * a.prefix_v_prompt + column;

  auto fetch = [&](int i) {
    E *k = k_tiles + i % 2 * KEYS * ROW<D>, *v = v_tiles + i % 2 * KEYS * ROW<D>;
    if (i < prefix_blocks) {
      copy_rows<E, D>(k, KEYS, prefix_k, i * KEYS, a.prefix_k_row, s.num_prefix - i * KEYS);
      copy_rows<E, D>(v, KEYS, prefix_v, i * KEYS, a.prefix_v_row, s.num_prefix - i * KEYS);
    } else {
      const int key = (i - prefix_blocks) * KEYS;
      copy_rows<E, D>(k, KEYS, static_cast<const E*>(a.k) + column, s.start + key, a.k_row, s.length - key);
      copy_rows<E, D>(v, KEYS, static_cast<const E*>(a.v) + column, s.start + key, a.v_row, s.length - key);
    }
    commit();
  };
  copy_rows<E, D>(q_tile, QUERIES, static_cast<const E*>(a.q) + column, s.start + first, a.q_row, s.length - first);
  fetch(0);

  const int c2 = b * a.N + n, mine = warp() * 16;
  const Draw prefix_draw(a, c2, philox::PREFIX_PROB, a.threshold), token_draw(a, c2, philox::TOKEN_PROB, a.threshold);
  const float scale2 = a.scale * LOG2E;
  uint32_t q[D / 16][4];
  Row<E, D> row;
  for (int i = 0; i < blocks; ++i) {
    if (i + 1 < blocks) fetch(i + 1);
    else commit();
    wait<1>();
    sync();
    E *k = k_tiles + i % 2 * KEYS * ROW<D>, *v = v_tiles + i % 2 * KEYS * ROW<D>;
    if (i < prefix_blocks && a.prefix_threshold) {
      drop_prefix<E, D>(k, i * KEYS, KEYS, Draw(a, c2, philox::PREFIX_K, a.prefix_threshold));
      drop_prefix<E, D>(v, i * KEYS, KEYS, Draw(a, c2, philox::PREFIX_V, a.prefix_threshold));
      sync();
    }
    if (i == 0)
#pragma unroll
      for (int d = 0; d < D / 16; ++d) load_matrices(q[d], q_tile + mine * ROW<D> + d * 16 + left_at(ROW<D>));
    if (i < prefix_blocks)
      row.attend(q, k, v, s.num_prefix - i * KEYS, scale2 * a.prefix_scale, a.prefix_scale, prefix_draw, first + mine, i * KEYS);
    else
      row.attend(q, k, v, s.length - (i - prefix_blocks) * KEYS, scale2, 1, token_draw, first + mine, (i - prefix_blocks) * KEYS);
    sync();  // before the next copy lands where this block's keys are
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = row.sum[half];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const float inverse = (a.threshold ? a.keep_scale : 1.0f) / sum;
    const int in_warp = lane() / 4 + half * 8, query = first + mine + in_warp;
    E* const staged = q_tile + (mine + in_warp) * ROW<D> + lane() % 4 * 2;
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
      store_pair<E>(staged + d * 8, row.out[d][half * 2] * inverse, row.out[d][half * 2 + 1] * inverse);
    if (lane() % 4 == 0 && query < s.length)
      a.lse[static_cast<int64_t>(n) * a.T + s.start + query] = (row.largest[half] + logarithm_2(sum)) * LN2;
  }
  sync_warp();
  store_rows<E, D>(static_cast<E*>(a.out) + column, s.start + first + mine, out_row, s.length - first - mine,
                   q_tile + mine * ROW<D>, 16);
}

template <class E, int D>
int forward(const Attention& a, void* stream) {
  const unsigned tiles = ceil_div(a.longest, QUERIES);
  const dim3 grid{tiles, static_cast<unsigned>(a.N), static_cast<unsigned>(a.B + 1)};
  return launch(forward_kernel<E, D>, grid, FORWARD_THREADS, FORWARD_SHARED<D>, stream, a);
}

template <class E>
int forward_of(const Attention& a, void* stream) {
  switch (a.D) {
    case 32: return forward<E, 32>(a, stream);
    case 64: return forward<E, 64>(a, stream);
    case 80: return forward<E, 80>(a, stream);
    case 96: return forward<E, 96>(a, stream);
    case 128: return forward<E, 128>(a, stream);
    default: return INVALID_VALUE;
  }
}

}  // namespace ptv2::cuda

int ptv2_cuda_prefix_attention_fwd(const ptv2::cuda::Attention* a, void* stream) {
  using namespace ptv2::cuda;
  return a->element == Element::bf16 ? forward_of<Bf16>(*a, stream) : forward_of<Fp16>(*a, stream);
}
