// Backward of prefix_attention, and of disentangled_attention with its terms, in one pass over the scores. Whole rows are on
// chip, so delta = rowsum(P * dP) needs no saved output, and with the log-sum-exp the probabilities need no second softmax:
//   P = exp(S - lse)    dP = mask * (dO V^T)    dS = P * (dP - delta)
//   dQ = scale dS K     dK = dS^T (scale Q)     dV = (mask * P)^T dO
// The prefix's gradient is summed over the task's sequences, then over the chunks of its prompt in their order: neither
// depends on which thread ran what. Without need_tokens only the prefix's rows of dK and dV are computed.
#include "attention_tile.h"
#include "disentangled_attention.h"

namespace ptv2 {
namespace {

struct Buffers {
  float *kt, *vt, *k, *q, *dout, *s, *dp, *dq, *dk, *dv, *keep, *keep_k, *keep_v, *sum_k, *sum_v;
  RelativeScores relative;
};

int64_t carve(Buffers& f, float* base, const PrefixAttentionBwdParams& b, const Tile& tile) {
  const PrefixAttentionParams& p = b.fwd;
  const int64_t head = tile.head, ld = tile.ld;
  Carver c{base};
  f.kt = c.take(p.D * ld), f.vt = c.take(p.D * ld), f.k = c.take(b.dqkv_T3ND ? tile.keys * head : 0);
  f.q = c.take(tile.block * head), f.dout = c.take(tile.block * head), f.dq = c.take(tile.block * head);
  f.s = c.take(tile.block * ld), f.dp = c.take(tile.block * ld);
  f.dk = c.take(tile.keys * head), f.dv = c.take(tile.keys * head), f.keep = c.take(tile.keep_block);
  const int64_t masks = p.prefix_dropout.on ? p.P * head + KEEP_SLACK : 0;
  f.keep_k = c.take(masks), f.keep_v = c.take(masks), f.sum_k = c.take(masks), f.sum_v = c.take(masks);
  if (p.slots) f.relative.carve(c, p, tile, b.dqkv_T3ND != nullptr);
  return c.used;
}

// s: scores -> (dropped) probabilities; dp -> dS. One row of `columns` entries.
template <bool HIDDEN> PTV2_INLINE void row_bwd(float* s, float* dp, float* keep, int64_t columns, float lse) {
  fill_tail(s, columns, -__builtin_inff());
  fill_tail(dp, columns, 0.0f);
  f32v total{};
  if (keep) {
    fill_tail(keep, columns, 0.0f);
    for (int64_t j = 0; j < columns; j += W) {
      const f32v prob = exp_score<HIDDEN>(load(s + j), lse), d = load(dp + j) * load(keep + j);
      store(s + j, prob);
      store(dp + j, d);
      total += prob * d;
    }
  } else {
    for (int64_t j = 0; j < columns; j += W) {
      const f32v prob = exp_score<HIDDEN>(load(s + j), lse);
      store(s + j, prob);
      total += prob * load(dp + j);
    }
  }
  const float delta = sum(total);
  for (int64_t j = 0; j < columns; j += W) {
    const f32v prob = load(s + j);
    store(dp + j, prob * (load(dp + j) - delta));
    if (keep) store(s + j, prob * load(keep + j));
  }
}

template <class T>
PTV2_INLINE void write_rows(T* to, int64_t row, const float* from, int64_t count, int64_t D, int64_t head, float scale) {
  for (int64_t i = 0; i < count; ++i)
    for_vectors(D, [&](int64_t d, auto n) { store_at(to + i * row, d, load(from + i * head + d) * scale, n); });
}

template <class T> void run_task(const PrefixAttentionBwdParams& bwd, const Tile& tile, int64_t task) {
  const PrefixAttentionParams& p = bwd.fwd;
  const bool tokens = bwd.dqkv_T3ND != nullptr, want_prefix = bwd.partial_k != nullptr, prefix_drop = p.prefix_dropout.on;
  const int64_t D = p.D, ND = p.N * D, head = tile.head, ld = tile.ld;
  const Chunk chunk = p.chunks[task / p.N];
  const int64_t n = task % p.N, prefix = p.prefix_k ? p.prompt_lengths[chunk.prompt] : 0;
  Buffers f{};
  carve(f, thread_scratch(carve(f, nullptr, bwd, tile)), bwd, tile);

  const T* prefix_k = at<T>(p.prefix_k, chunk.prompt * p.prefix_k_prompt + n * D);
  const T* prefix_v = at<T>(p.prefix_v, chunk.prompt * p.prefix_v_prompt + n * D);
  const auto load_prefix = [&](uint32_t c2) {
    if (prefix_drop) {
      prefix_keep(f.keep_k, prefix, D, head, c2, philox::PREFIX_K, p.prefix_dropout);
      prefix_keep(f.keep_v, prefix, D, head, c2, philox::PREFIX_V, p.prefix_dropout);
    }
    copy_transposed(f.kt, ld, Strided{prefix_k, p.prefix_k_row}, prefix, D, head, prefix_drop ? f.keep_k : nullptr);
    copy_transposed(f.vt, ld, Strided{prefix_v, p.prefix_v_row}, prefix, D, head, prefix_drop ? f.keep_v : nullptr);
    if (tokens) copy_rows(f.k, Strided{prefix_k, p.prefix_k_row}, prefix, D, head, 1.0f, prefix_drop ? f.keep_k : nullptr);
  };
  if (!prefix_drop) load_prefix(0);
  if (p.slots) f.relative.load_tables(p, chunk, n);
  std::fill_n(f.dk, prefix * head, 0.0f);
  std::fill_n(f.dv, prefix * head, 0.0f);
  if (prefix_drop) std::fill_n(f.sum_k, prefix * head, 0.0f), std::fill_n(f.sum_v, prefix * head, 0.0f);

  for (int64_t at_b = chunk.first; at_b < chunk.last; ++at_b) {
    const int64_t b = p.order_B[at_b], start = p.cu_seqlens[b], S = p.cu_seqlens[b + 1] - start;
    const uint32_t c2 = static_cast<uint32_t>(b * p.N + n);
    if (S == 0) continue;
    if (prefix_drop) load_prefix(c2);
    const T *k = at<T>(p.k, start * p.k_row + n * D), *v = at<T>(p.v, start * p.v_row + n * D);
    copy_transposed(f.kt + prefix, ld, Strided{k, p.k_row}, S, D, head);
    copy_transposed(f.vt + prefix, ld, Strided{v, p.v_row}, S, D, head);
    if (tokens) {
      copy_rows(f.k + prefix * head, Strided{k, p.k_row}, S, D, head, 1.0f);
      std::fill_n(f.dk + prefix * head, S * head, 0.0f);
      std::fill_n(f.dv + prefix * head, S * head, 0.0f);
    }
    const int64_t wanted = want_prefix ? 0 : prefix, limit = tokens ? prefix + S : prefix;  // rows of dK, dV to compute
    const Upcoming next(p, chunk, at_b, n);
    for (int64_t i0 = 0; i0 < S; i0 += tile.block) {
      const int64_t M = std::min(tile.block, S - i0), t = start + i0;
      const Columns columns = Columns::seen_by(p, b, t, M, prefix, S);
      copy_rows(f.q, Strided{at<T>(p.q, t * p.q_row + n * D), p.q_row}, M, D, head, p.scale);
      copy_rows(f.dout, Strided{at<T>(bwd.dout_TND, t * ND + n * D), ND}, M, D, head, 1.0f);
      columns.product(M, D, f.q, head, f.kt, f.s, ld);
      if (p.slots) f.relative.add_scores(f.s + prefix, f.q, f.kt + prefix, i0, M, S);
      columns.product(M, D, f.dout, head, f.vt, f.dp, ld);
      for (int64_t i = 0; i < M; ++i) {
        next.fetch<T>(p.k, p.k_row, i0 + i, D);
        next.fetch<T>(p.v, p.v_row, i0 + i, D);
        next.fetch<T>(p.q, p.q_row, i0 + i, D);
        next.fetch<T>(bwd.dout_TND, ND, i0 + i, D);
        float *s = f.s + i * ld, *dp = f.dp + i * ld, *keep = p.dropout.on ? f.keep : nullptr;
        if (keep) row_keep(keep, prefix, columns, static_cast<uint32_t>(i0 + i), c2, p.dropout);
        const float lse = p.lse_NT[n * p.T + t + i];
        if (p.key_range_T2) {
          Visible(p, b, t + i, prefix, S, columns).hide_others(s, columns.count());
          row_bwd<true>(s, dp, keep, columns.count(), lse);
        } else {
          row_bwd<false>(s, dp, keep, columns.count(), lse);
        }
      }
      columns.scatter(M, D, f.s, ld, f.dout, f.dv, head, wanted, limit);
      columns.scatter(M, D, f.dp, ld, f.q, f.dk, head, wanted, limit);
      if (tokens) {
        columns.reduce(M, D, f.dp, ld, f.k, f.dq, head);
        if (p.slots) f.relative.add_gradients(f.dp + prefix, f.dq, f.dk + prefix * head, i0, M, S);
        write_rows(static_cast<T*>(bwd.dqkv_T3ND) + t * 3 * ND + n * D, 3 * ND, f.dq, M, D, head, p.scale);
      }
    }
    if (tokens) {
      T* dk = static_cast<T*>(bwd.dqkv_T3ND) + (start * 3 + 1) * ND + n * D;
      write_rows(dk, 3 * ND, f.dk + prefix * head, S, D, head, 1.0f);
      write_rows(dk + ND, 3 * ND, f.dv + prefix * head, S, D, head, 1.0f);
    }
    if (prefix_drop && want_prefix) {
      for (int64_t i = 0; i < prefix * head; i += W) {
        // Lanes past D hold factors of other elements; their gradients are zero, as those of Q and dO are.
        store(f.sum_k + i, load(f.sum_k + i) + load(f.dk + i) * load(f.keep_k + i));
        store(f.sum_v + i, load(f.sum_v + i) + load(f.dv + i) * load(f.keep_v + i));
      }
      std::fill_n(f.dk, prefix * head, 0.0f);
      std::fill_n(f.dv, prefix * head, 0.0f);
    }
  }
  if (want_prefix) {
    const int64_t offset = (task / p.N) * p.P * ND + n * D;
    write_rows(bwd.partial_k + offset, ND, prefix_drop ? f.sum_k : f.dk, prefix, D, head, 1.0f);
    write_rows(bwd.partial_v + offset, ND, prefix_drop ? f.sum_v : f.dv, prefix, D, head, 1.0f);
  }
}

// dprefix[k, row] = sum over the chunks of prompt k, in their order; zero past the prompt's length and for unused prompts.
void reduce(const PrefixAttentionBwdParams& bwd) {
  const PrefixAttentionParams& p = bwd.fwd;
  const int64_t ND = p.N * p.D;
  parallel_ranges(p.K * p.P, 1 + 16384 / ND, [&](int64_t first, int64_t last) {
    for (int64_t at_row = first; at_row < last; ++at_row) {
      const int64_t prompt = at_row / p.P, row = at_row % p.P;
      float *dk = bwd.dprefix_k + at_row * ND, *dv = bwd.dprefix_v + at_row * ND;
      std::fill_n(dk, ND, 0.0f);
      std::fill_n(dv, ND, 0.0f);
      if (row >= p.prompt_lengths[prompt]) continue;
      for (int64_t c = 0; c < p.num_chunks; ++c) {
        if (p.chunks[c].prompt != prompt) continue;
        const float *k = bwd.partial_k + (c * p.P + row) * ND, *v = bwd.partial_v + (c * p.P + row) * ND;
        for_vectors(ND, [&](int64_t i, auto n) {
          store_at(dk, i, load_at(dk, i, n) + load_at(k, i, n), n);
          store_at(dv, i, load_at(dv, i, n) + load_at(v, i, n), n);
        });
      }
    }
  });
}

}  // namespace

void prefix_attention_bwd(const PrefixAttentionBwdParams& bwd) {
  const PrefixAttentionParams& p = bwd.fwd;
  const Tile tile(p);
  parallel_tasks(p.num_chunks * p.N, [&](int64_t task) {
    p.dtype == DType::f32 ? run_task<float>(bwd, tile, task) : run_task<bf16>(bwd, tile, task);
  });
  if (bwd.partial_k) reduce(bwd);
}

}  // namespace ptv2
