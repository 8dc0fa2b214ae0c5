// What forward and backward of the attention ops share: the layout of one thread's scratch, and how a head's keys and values
// get into it. Columns of a score row are [prefix rows ; tokens], P' + S of them, padded to whole vectors.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "kernels.h"
#include "philox_simd.h"
#include "rows.h"

namespace ptv2 {

struct Tile {
  int64_t keys;        // columns of the longest row, padded
  int64_t ld;          // floats between the rows of [D, keys] and [block, keys] buffers
  int64_t head;        // D padded to whole vectors: floats between the rows of [keys, D] buffers
  int64_t block;       // query rows a block
  int64_t keep_block;  // floats of a keep row

  // Query rows a block: about 256 KiB of scores, so that long rows still fit the second-level cache.
  explicit Tile(const PrefixAttentionParams& p)
      : keys(round_up(p.P + round_up(p.longest, W), W)), ld(keys + W), head(round_up(p.D, W)),
        block(std::clamp<int64_t>((1 << 16) / ld / 6 * 6, 6, 96)), keep_block(keys + KEEP_SLACK + W) {
    block = std::min(block, std::max<int64_t>(p.longest, 1));
  }
};

// Cuts aligned buffers off one allocation; with base == nullptr it only adds sizes up.
struct Carver {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* at = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return at;
  }
};

// row(i) of a matrix whose rows lie at a constant distance.
template <class T> struct Strided {
  const T* base;
  int64_t stride;
  PTV2_INLINE const T* operator()(int64_t i) const { return base + i * stride; }
};
template <class T> Strided(const T*, int64_t) -> Strided<T>;

// to [count, head] <- rows row(i) of D elements (times keep, a factor an element, when given); columns D .. head become zero.
template <class Row>
inline void copy_rows(float* to, const Row& row, int64_t count, int64_t D, int64_t head, float scale,
                      const float* keep = nullptr) {
  for (int64_t i = 0; i < count; ++i) {
    const auto* from = row(i);
    for_vectors(D, [&](int64_t d, auto n) {
      f32v x = load_at(from, d, n) * scale;
      if (keep) x *= load_at(keep + i * head, d, n);
      store(to + i * head + d, x);
    });
    for (int64_t d = round_up(D, W); d < head; d += W) store(to + i * head + d, f32v{});
  }
}

// to [D, ld] columns 0 .. count <- the same rows transposed. Writes up to W - 1 columns past count (zeros).
template <class Row>
inline void copy_transposed(float* to, int64_t ld, const Row& row, int64_t count, int64_t D, int64_t head,
                            const float* keep = nullptr) {
  for (int64_t i0 = 0; i0 < count; i0 += W)
    for_vectors(D, [&](int64_t d, auto n) {
      f32v rows[W];
      for (int i = 0; i < W; ++i) {
        if (i0 + i < count) {
          rows[i] = load_at(row(i0 + i), d, n);
          if (keep) rows[i] *= load_at(keep + (i0 + i) * head, d, n);
        } else {
          rows[i] = f32v{};
        }
      }
      transpose(rows);
      for (int i = 0; i < n; ++i) store(to + (d + i) * ld + i0, rows[i]);
    });
}

// The dropout factors of one sequence's prefix keys or values, [P', head].
inline void prefix_keep(float* keep, int64_t prefix, int64_t D, int64_t head, uint32_t c2, philox::Stream stream,
                        const Dropout& drop) {
  for (int64_t i = 0; i < prefix; ++i) keep_row(keep + i * head, D, static_cast<uint32_t>(i), c2, stream, drop);
}

// The keys that some query of a block sees, as columns of its scores: keys [0, first), then keys [from, from + second). What
// lies between is neither multiplied nor stored. Without key ranges, all keys.
struct Columns {
  int64_t first, from = 0, second = 0;
  int64_t count() const { return first + second; }

  static Columns seen_by(const PrefixAttentionParams& p, int64_t b, int64_t t, int64_t M, int64_t prefix, int64_t S) {
    if (!p.key_range_T2) return {prefix + S};
    const int64_t context = std::clamp<int64_t>(p.context_B[b], 0, S);
    int64_t low = S, high = context;
    for (const int32_t* range = p.key_range_T2 + 2 * t; range < p.key_range_T2 + 2 * (t + M); range += 2) {
      const int64_t lo = std::max<int64_t>(range[0], 0), hi = std::min<int64_t>(range[1], S);
      if (lo < hi) low = std::min(low, lo), high = std::max(high, hi);
    }
    low = low / 4 * 4;  // a Philox counter draws four columns
    if (low <= context || high == context) return {prefix + high};
    return {prefix + context, prefix + low, high - low};
  }

  // c [M, count] <- a [M, D] times the columns of bt [D, ld].
  void product(int64_t M, int64_t D, const float* a, int64_t head, const float* bt, float* c, int64_t ld) const {
    gemm<false>(M, first, D, a, head, 1, bt, ld, c, ld);
    if (second) gemm<false>(M, second, D, a, head, 1, bt + from, ld, c + first, ld);
  }
  // c [M, D] <- s [M, count] times the keys' rows of b [keys, head].
  void reduce(int64_t M, int64_t D, const float* s, int64_t ld, const float* b, float* c, int64_t head) const {
    gemm<false>(M, D, first, s, ld, 1, b, head, c, head);
    if (second) gemm<true>(M, D, second, s + first, ld, 1, b + from * head, head, c, head);
  }
  // c [keys, head] += s^T [count, M] times b [M, D], for keys [wanted, limit).
  void scatter(int64_t M, int64_t D, const float* s, int64_t ld, const float* b, float* c, int64_t head, int64_t wanted,
               int64_t limit) const {
    gemm<true>(std::min(first, limit) - wanted, D, M, s + wanted, 1, ld, b, head, c + wanted * head, head);
    if (second && from < limit) gemm<true>(second, D, M, s + first, 1, ld, b, head, c + from * head, head);
  }
};

// What one query sees: columns below `below` and those in [lo, hi).
struct Visible {
  int32_t below, lo, hi;

  Visible(const PrefixAttentionParams& p, int64_t b, int64_t t, int64_t prefix, int64_t S, const Columns& columns) {
    const auto column = [&](int64_t token) {
      const int64_t key = prefix + std::clamp<int64_t>(token, 0, S);
      return static_cast<int32_t>(columns.second ? key - columns.from + columns.first : key);
    };
    below = static_cast<int32_t>(prefix + std::clamp<int64_t>(p.context_B[b], 0, S));
    lo = column(p.key_range_T2[2 * t]), hi = column(p.key_range_T2[2 * t + 1]);
  }
  // Scores of other columns <- -inf.
  PTV2_INLINE void hide_others(float* s, int64_t columns) const {
    i32v lane{};
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (int64_t j = below / W * W; j < columns; j += W) {
      const i32v at = lane + static_cast<int32_t>(j);
      store(s + j, (at < below) | ((at >= lo) & (at < hi)) ? load(s + j) : broadcast(-__builtin_inff()));
    }
  }
};

// exp(s - top); with HIDDEN, exactly 0 where s is -inf (exp itself stops at its smallest result).
template <bool HIDDEN> PTV2_INLINE f32v exp_score(f32v s, float top) {
  const f32v e = exp(s - top);
  if constexpr (HIDDEN) return s == -__builtin_inff() ? f32v{} : e;
  return e;
}

// The dropout factors of one row of probabilities, prefix columns then tokens (their counters start anew).
inline void row_keep(float* keep, int64_t prefix, const Columns& columns, uint32_t row, uint32_t c2, const Dropout& drop) {
  if (prefix > 0) keep_row(keep, prefix, row, c2, philox::PREFIX_PROB, drop);
  keep_row(keep + prefix, columns.first - prefix, row, c2, philox::TOKEN_PROB, drop);
  if (columns.second) {
    keep_row(keep + columns.first, columns.second, row, c2, philox::TOKEN_PROB, drop, columns.from - prefix);
  }
}

// Where the rows that a task reads next lie, so that they travel while this sequence is computed. A row of one head is a few
// cache lines in a page of its own: the hardware does not see it coming.
struct Upcoming {
  int64_t start = 0, rows = 0, offset = 0;  // first token, tokens, n * D

  // After sequence at_b of the chunk for head n comes the chunk's next one, then its first for the next head.
  Upcoming(const PrefixAttentionParams& p, const Chunk& chunk, int64_t at_b, int64_t n) {
    const bool last = at_b + 1 == chunk.last;
    if (last && n + 1 == p.N) return;
    const int64_t b = p.order_B[last ? chunk.first : at_b + 1];
    start = p.cu_seqlens[b], rows = p.cu_seqlens[b + 1] - start, offset = (last ? n + 1 : n) * p.D;
  }
  // Row i, if there is one, of a matrix with this row stride.
  template <class T> PTV2_INLINE void fetch(const void* base, int64_t row_stride, int64_t i, int64_t D) const {
    if (i >= rows) return;
    const char* row = reinterpret_cast<const char*>(static_cast<const T*>(base) + (start + i) * row_stride + offset);
    for (int64_t byte = 0; byte < D * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(row + byte);
  }
};

// Columns past the row's end, up to whole vectors.
PTV2_INLINE void fill_tail(float* row, int64_t columns, float value) {
  for (int64_t j = columns; j < round_up(columns, W); ++j) row[j] = value;
}

template <class T> PTV2_INLINE const T* at(const void* p, int64_t offset) { return static_cast<const T*>(p) + offset; }

}  // namespace ptv2
