// What forward and backward of prefix_attention share: the layout of one thread's scratch, and how a head's keys and values
// get into it. Columns of a score row are [prefix rows ; tokens], P' + S of them, padded to whole vectors.
#pragma once

#include <algorithm>

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

// to [count, head] <- from [count, D] (times keep, a factor an element, when given); columns D .. head become zero.
template <class T>
inline void copy_rows(float* to, const T* from, int64_t from_row, int64_t count, int64_t D, int64_t head, float scale,
                      const float* keep = nullptr) {
  for (int64_t i = 0; i < count; ++i) {
    for_vectors(D, [&](int64_t d, auto n) {
      f32v x = load_at(from + i * from_row, d, n) * scale;
      if (keep) x *= load_at(keep + i * head, d, n);
      store(to + i * head + d, x);
    });
    for (int64_t d = round_up(D, W); d < head; d += W) store(to + i * head + d, f32v{});
  }
}

// to [D, ld] columns 0 .. count <- from [count, D] transposed. Writes up to W - 1 columns past count (zeros).
template <class T>
inline void copy_transposed(float* to, int64_t ld, const T* from, int64_t from_row, int64_t count, int64_t D, int64_t head,
                            const float* keep = nullptr) {
  for (int64_t i0 = 0; i0 < count; i0 += W)
    for_vectors(D, [&](int64_t d, auto n) {
      f32v rows[W];
      for (int i = 0; i < W; ++i) {
        if (i0 + i < count) {
          rows[i] = load_at(from + (i0 + i) * from_row, d, n);
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

// The dropout factors of one row of probabilities, prefix columns then tokens (their counters start anew).
inline void row_keep(float* keep, int64_t prefix, int64_t tokens, uint32_t row, uint32_t c2, const Dropout& drop) {
  if (prefix > 0) keep_row(keep, prefix, row, c2, philox::PREFIX_PROB, drop);
  keep_row(keep + prefix, tokens, row, c2, philox::TOKEN_PROB, drop);
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
