// The block of both forward kernels for rows of any length: QUERIES queries and a head of a sequence, a warp 16 of them with all
// their columns in registers, over key blocks that arrive two deep by cp.async, the prefix's first. Products says how queries
// meet a block of keys: QUERIES, GROUP (warps that multiply together), Layout (of keys in shared memory), ALIGNMENT (of them),
// attend(), and publish() for products that do not see what was copied by themselves.
#pragma once

#include "forward_row.h"

namespace ptv2::cuda {

// Bytes: keys and values two deep, then the queries.
template <int D, class Products>
constexpr int BLOCK_SHARED = (4 * KEYS * Products::ROW_ELEMENTS + Products::QUERIES * ROW<D>) * 2 + Products::ALIGNMENT;

template <class E, int D, class Products>
PTV2_DEVICE void forward_block(const Attention& a) {
  constexpr int QUERIES = Products::QUERIES, TILE = KEYS * Products::ROW_ELEMENTS;
  using Layout = typename Products::Layout;
  const QueryTile tile_of(a, QUERIES);
  const int n = block_y(), b = tile_of.b, column = n * D, first = tile_of.tile * QUERIES;
  if (b == a.B) return zero_rest<E, D>(a, tile_of.tile, tile_of.tiles);
  const Sequence s = sequence(a, b);
  if (first >= s.length) return;

  E* const tiles = reinterpret_cast<E*>(Products::aligned(shared_memory()));  // keys, values; two deep
  E* const q_tile = tiles + 4 * TILE;
  const KeyBlocks<KEYS> blocks(a, s, b, n);
  auto tile = [&](int i, bool values) { return tiles + (i % 2 * 2 + values) * TILE; };
  auto fetch = [&](int i) {
    for (int values = 0; values < 2; ++values) blocks.template copy<E, D, Layout>(tile(i, values), i, values, column);
    commit();
  };
  copy_rows<E, D>(q_tile, QUERIES, static_cast<const E*>(a.q) + column, s.start + first, a.q_row, s.length - first);
  fetch(0);

  const int query = first + warp() * 16, group_query = first + warp() / Products::GROUP * Products::GROUP * 16;
  E* const mine = q_tile + warp() * 16 * ROW<D>;
  uint32_t q[D / 16][4];
  ForwardRow<E, D> row;
  for (int i = 0; i < blocks.count; ++i) {
    if (i + 1 < blocks.count) fetch(i + 1);
    else commit();
    wait<1>();
    if (blocks.prefix(i) && a.prefix_threshold) {
      sync();
      blocks.template drop<E, D, Layout>(tile(i, false), i, false);
      blocks.template drop<E, D, Layout>(tile(i, true), i, true);
    }
    Products::publish();
    sync();
    if (group_query < s.length) {  // warps past the end have nothing to do but to copy
      if (i == 0)
#pragma unroll
        for (int d = 0; d < D / 16; ++d) load_matrices(q[d], mine + d * 16 + left_at(ROW<D>));
      Products::attend(row, q, tile(i, false), tile(i, true), blocks.at(i), query);
    }
    sync();  // before the next copy lands where this block's keys are
  }
  if (query < s.length) row.store(a, s, n, query, mine);
}

}  // namespace ptv2::cuda
