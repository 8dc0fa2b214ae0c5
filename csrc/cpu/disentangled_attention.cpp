// disentangled_attention runs as prefix_attention, which calls in here when it is given slots. Of the products with the tables
// no more is ever stored than one band of QUERIES x (S + QUERIES) or KEYS x (M + KEYS) floats.
#include "disentangled_attention.h"

namespace ptv2 {
namespace {

// to, to_t <- rows slots[distance(i)] of one head of a table, whichever is not null.
template <class T, class Distance>
void copy_table(float* to, float* to_t, int64_t ld, const PrefixAttentionParams& p, const void* table, int64_t n, int64_t count,
                int64_t head, const Distance& distance) {
  const auto row = [&](int64_t i) { return at<T>(table, (p.slots[distance(i)] * p.N + n) * p.D); };
  copy_transposed(to_t, ld, row, count, p.D, head);
  if (to) copy_rows(to, row, count, p.D, head, 1.0f);
}

template <class T>
void copy_tables(const RelativeScores& r, const PrefixAttentionParams& p, int64_t n, int64_t zero) {
  const int64_t count = 2 * zero + 1;
  if (r.k_t) copy_table<T>(r.k, r.k_t, r.ld, p, p.rel_k_RND, n, count, r.head, [=](int64_t i) { return zero - i; });
  if (r.q_t) copy_table<T>(r.q, r.q_t, r.ld, p, p.rel_q_RND, n, count, r.head, [=](int64_t i) { return i - zero; });
}

}  // namespace

void RelativeScores::carve(Carver& c, const PrefixAttentionParams& p, const Tile& tile, bool gradients) {
  D = p.D, head = tile.head, tile_ld = tile.ld, scale = p.scale;
  ld = round_up(2 * p.longest, W) + W;
  band_ld = round_up(p.longest, W) + round_up(QUERIES, W) + W;
  const auto table = [&](const void* wanted, int64_t floats) { return wanted ? c.take(floats) : nullptr; };
  k_t = table(p.rel_k_RND, D * ld), q_t = table(p.rel_q_RND, D * ld);
  k = gradients ? table(p.rel_k_RND, 2 * p.longest * head) : nullptr;
  q = gradients ? table(p.rel_q_RND, 2 * p.longest * head) : nullptr;
  band = c.take(QUERIES * band_ld);
}

void RelativeScores::load_tables(const PrefixAttentionParams& p, const Chunk& chunk, int64_t n) {
  int64_t longest = 0;
  for (int64_t i = chunk.first; i < chunk.last; ++i) {
    const int32_t b = p.order_B[i];
    longest = std::max<int64_t>(longest, p.cu_seqlens[b + 1] - p.cu_seqlens[b]);
  }
  if (longest == 0) return;
  zero = longest - 1;
  p.dtype == DType::f32 ? copy_tables<float>(*this, p, n, zero) : copy_tables<bf16>(*this, p, n, zero);
}

void RelativeScores::add_scores(float* s, const float* query, const float* keys_t, int64_t i0, int64_t M, int64_t S) const {
  for (int64_t r0 = 0; k_t && r0 < M; r0 += QUERIES) {
    const int64_t rows = std::min(QUERIES, M - r0);
    gemm<false>(rows, S + rows - 1, D, query + r0 * head, head, 1, k_t + zero - (i0 + r0 + rows - 1), ld, band, band_ld);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = s + (r0 + r) * tile_ld;
      const float* run = band + r * band_ld + rows - 1 - r;
      for (int64_t j = 0; j < S; j += W) store(to + j, load(to + j) + load(run + j));
    }
  }
  for (int64_t j0 = 0; q_t && j0 < S; j0 += KEYS) {
    const int64_t keys = std::min(KEYS, S - j0);
    gemm<false>(keys, M + keys - 1, D, keys_t + j0, 1, tile_ld, q_t + zero + i0 - (j0 + keys - 1), ld, band, band_ld);
    for (int64_t c0 = 0; c0 < keys; c0 += W) {
      for (int64_t r0 = 0; r0 < M; r0 += W) {
        f32v turned[W];
        for (int64_t c = 0; c < W; ++c)
          turned[c] = c0 + c < keys ? load(band + (c0 + c) * band_ld + keys - 1 - (c0 + c) + r0) : f32v{};
        transpose(turned);
        for (int64_t r = 0; r < std::min<int64_t>(W, M - r0); ++r) {
          float* to = s + (r0 + r) * tile_ld + j0 + c0;
          store(to, load(to) + turned[r] * scale);
        }
      }
    }
  }
}

void RelativeScores::add_gradients(const float* ds, float* dq, float* dk, int64_t i0, int64_t M, int64_t S) const {
  for (int64_t r0 = 0; k && r0 < M; r0 += QUERIES) {
    const int64_t rows = std::min(QUERIES, M - r0);
    for (int64_t r = 0; r < rows; ++r) {
      float *to = band + r * band_ld, *run = to + rows - 1 - r;
      std::fill(to, run, 0.0f);
      std::copy_n(ds + (r0 + r) * tile_ld, S, run);
      std::fill(run + S, to + S + rows - 1, 0.0f);
    }
    gemm<true>(rows, D, S + rows - 1, band, band_ld, 1, k + (zero - (i0 + r0 + rows - 1)) * head, head, dq + r0 * head, head);
  }
  for (int64_t j0 = 0; q && j0 < S; j0 += KEYS) {
    const int64_t keys = std::min(KEYS, S - j0);
    for (int64_t c0 = 0; c0 < keys; c0 += W) {
      for (int64_t r0 = 0; r0 < M; r0 += W) {
        f32v turned[W];
        for (int64_t r = 0; r < W; ++r) turned[r] = r0 + r < M ? load(ds + (r0 + r) * tile_ld + j0 + c0) * scale : f32v{};
        transpose(turned);
        for (int64_t c = 0; c < std::min<int64_t>(W, keys - c0); ++c)
          store(band + (c0 + c) * band_ld + keys - 1 - (c0 + c) + r0, turned[c]);
      }
    }
    for (int64_t c = 0; c < keys; ++c) {
      float *to = band + c * band_ld, *run = to + keys - 1 - c;
      std::fill(to, run, 0.0f);
      std::fill(run + M, to + M + keys - 1, 0.0f);
    }
    gemm<true>(keys, D, M + keys - 1, band, band_ld, 1, q + (zero + i0 - (j0 + keys - 1)) * head, head, dk + j0 * head, head);
  }
}

}  // namespace ptv2
