// Forward of prefix_attention, and of disentangled_attention, whose terms are added to the scores. One task owns (chunk of
// sequences, head): it keeps the head's K^T and V, prefix included, in its thread's scratch and walks blocks of query rows.
// Rows are whole, so the softmax is exact; nothing of size S x S leaves the second-level cache. The prefix is read once a
// task, not once a sequence (unless it is dropped out).
#include "attention_tile.h"
#include "disentangled_attention.h"

namespace ptv2 {
namespace {

// s <- exp(s - max(s)) over `columns` entries; returns max and sum.
struct RowSum {
  float max, sum;
};
template <bool HIDDEN> PTV2_INLINE RowSum exp_row(float* s, int64_t columns) {
  fill_tail(s, columns, -__builtin_inff());
  f32v top = load(s);
  for (int64_t j = W; j < columns; j += W) top = max(load(s + j), top);
  const float m = max(top);
  f32v total{};
  for (int64_t j = 0; j < columns; j += W) {
    const f32v e = exp_score<HIDDEN>(load(s + j), m);
    store(s + j, e);
    total += e;
  }
  return {m, sum(total)};
}

template <class T> void run(const PrefixAttentionParams& p) {
  const Tile tile(p);
  const int64_t D = p.D, ND = p.N * p.D, head = tile.head, ld = tile.ld;
  parallel_tasks(p.num_chunks * p.N, [&](int64_t task) {
    const Chunk chunk = p.chunks[task / p.N];
    const int64_t n = task % p.N, prefix = p.prefix_k ? p.prompt_lengths[chunk.prompt] : 0;
    float *kt, *v, *q, *o, *s, *keep, *inverse;
    RelativeScores relative;
    const auto carve = [&](float* base) {
      Carver c{base};
      kt = c.take(D * ld), v = c.take(tile.keys * head), q = c.take(tile.block * head), o = c.take(tile.block * head);
      s = c.take(tile.block * ld), inverse = c.take(tile.block);
      keep = c.take(std::max(tile.keep_block, p.P * head + KEEP_SLACK));
      if (p.slots) relative.carve(c, p, tile, false);
      return c.used;
    };
    carve(thread_scratch(carve(nullptr)));

    const T* prefix_k = at<T>(p.prefix_k, chunk.prompt * p.prefix_k_prompt + n * D);
    const T* prefix_v = at<T>(p.prefix_v, chunk.prompt * p.prefix_v_prompt + n * D);
    const auto load_prefix = [&](const Dropout& drop, uint32_t c2) {
      if (drop.on) prefix_keep(keep, prefix, D, head, c2, philox::PREFIX_K, drop);
      copy_transposed(kt, ld, Strided{prefix_k, p.prefix_k_row}, prefix, D, head, drop.on ? keep : nullptr);
      if (drop.on) prefix_keep(keep, prefix, D, head, c2, philox::PREFIX_V, drop);
      copy_rows(v, Strided{prefix_v, p.prefix_v_row}, prefix, D, head, 1.0f, drop.on ? keep : nullptr);
    };
    if (!p.prefix_dropout.on) load_prefix(p.prefix_dropout, 0);
    if (p.slots) relative.load_tables(p, chunk, n);

    for (int64_t at_b = chunk.first; at_b < chunk.last; ++at_b) {
      const int64_t b = p.order_B[at_b], start = p.cu_seqlens[b], S = p.cu_seqlens[b + 1] - start;
      const uint32_t c2 = static_cast<uint32_t>(b * p.N + n);
      if (S == 0) continue;
      if (p.prefix_dropout.on) load_prefix(p.prefix_dropout, c2);
      copy_transposed(kt + prefix, ld, Strided{at<T>(p.k, start * p.k_row + n * D), p.k_row}, S, D, head);
      copy_rows(v + prefix * head, Strided{at<T>(p.v, start * p.v_row + n * D), p.v_row}, S, D, head, 1.0f);
      const Upcoming next(p, chunk, at_b, n);
      for (int64_t i0 = 0; i0 < S; i0 += tile.block) {
        const int64_t M = std::min(tile.block, S - i0);
        const Columns columns = Columns::seen_by(p, b, start + i0, M, prefix, S);
        const int64_t J = columns.count();
        copy_rows(q, Strided{at<T>(p.q, (start + i0) * p.q_row + n * D), p.q_row}, M, D, head, p.scale);
        columns.product(M, D, q, head, kt, s, ld);
        if (p.slots) relative.add_scores(s + prefix, q, kt + prefix, i0, M, S);
        for (int64_t i = 0; i < M; ++i) {
          float* row = s + i * ld;
          next.fetch<T>(p.k, p.k_row, i0 + i, D);
          next.fetch<T>(p.v, p.v_row, i0 + i, D);
          if (i0 == 0) next.fetch<T>(p.q, p.q_row, i, D);
          RowSum r;
          if (p.key_range_T2) {
            Visible(p, b, start + i0 + i, prefix, S, columns).hide_others(row, J);
            r = exp_row<true>(row, J);
          } else {
            r = exp_row<false>(row, J);
          }
          inverse[i] = 1.0f / r.sum;
          p.lse_NT[n * p.T + start + i0 + i] = r.max + __builtin_logf(r.sum);
          if (p.dropout.on) {
            row_keep(keep, prefix, columns, static_cast<uint32_t>(i0 + i), c2, p.dropout);
            for (int64_t j = 0; j < J; j += W) store(row + j, load(row + j) * load(keep + j));
          }
        }
        columns.reduce(M, D, s, ld, v, o, head);
        for (int64_t i = 0; i < M; ++i) {
          T* out = static_cast<T*>(p.out_TND) + (start + i0 + i) * ND + n * D;
          for_vectors(D, [&](int64_t d, auto lanes) { store_at(out, d, load(o + i * head + d) * inverse[i], lanes); });
        }
      }
    }
  });
}

}  // namespace

void prefix_attention_fwd(const PrefixAttentionParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace ptv2
