// The relative score terms of disentangled_attention, made inside the tiles of prefix_attention:
//   score_ij += q_i . rel_k[slot(i - j)] + scale k_j . rel_q[slot(i - j)]        (q comes scaled)
#pragma once

#include "attention_tile.h"

namespace ptv2 {

// One thread's tables, laid out by distance, once a task. A band product of a few queries with rel_k, or of a few keys with
// rel_q, has a column for every distance that occurs; what row r needs of it is a run, and the next row's starts one column
// earlier. So a query reads its run with unaligned loads, and W keys read theirs and turn them around in registers.
struct RelativeScores {
  static constexpr int64_t QUERIES = 4 * MR, KEYS = W == 16 ? 16 : 24;  // rows of a band: many waste columns, few waste loads

  int64_t D, head, ld, tile_ld, band_ld, zero;  // zero: the row of distance 0
  float scale;
  float *k_t, *q_t;  // [D, ld] rel_k by falling distance, rel_q by rising distance; null without that table
  float *k, *q;      // the same as rows [distances, head], for the gradients
  float* band;

  void carve(Carver& c, const PrefixAttentionParams& p, const Tile& tile, bool gradients);
  void load_tables(const PrefixAttentionParams& p, const Chunk& chunk, int64_t n);  // for the chunk's longest sequence
  // s [M, S] += the relative scores of queries i0 .. i0 + M: q [M, head] scaled, keys_t [D, S] of the sequence's tokens.
  void add_scores(float* s, const float* query, const float* keys_t, int64_t i0, int64_t M, int64_t S) const;
  // From ds [M, S]: dq [M, head] (unscaled, as the content's), dk [S, head].
  void add_gradients(const float* ds, float* dq, float* dk, int64_t i0, int64_t M, int64_t S) const;
};

}  // namespace ptv2
