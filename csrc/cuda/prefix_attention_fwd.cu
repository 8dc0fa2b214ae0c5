// Prefix attention, forward: one block owns (64 queries, head) of a sequence, a warp 16 of them with all their columns in
// registers. Key blocks arrive two deep by cp.async: first the prefix's, read from its one copy, then the sequence's own.
//
// HBM: q, k, v read once where a sequence fits one query tile (again from L2 for each further one), out and lse written once.
// Rows of up to 64 tokens: forward_short.h.
#include "dispatch.h"
#include "forward_short.h"

namespace ptv2::cuda {

constexpr int QUERIES = 64, FORWARD_THREADS = 128;

template <int D>
constexpr int FORWARD_SHARED = (QUERIES + 4 * KEYS) * ROW<D> * 2;

template <class E, int D>
PTV2_KERNEL(FORWARD_THREADS, D <= 96 ? 3 : 2) forward_kernel(const Attention a) {
  const QueryTile tile_of(a, QUERIES);
  const int n = block_y(), b = tile_of.b, column = n * D, first = tile_of.tile * QUERIES;
  if (b == a.B) return zero_rest<E, D>(a, tile_of.tile, tile_of.tiles);
  const Sequence s = sequence(a, b);
  if (first >= s.length) return;

  E* const q_tile = reinterpret_cast<E*>(shared_memory());
  E* const tiles = q_tile + QUERIES * ROW<D>;  // keys, values; two deep
  const KeyBlocks<KEYS> blocks(a, s, b, n);
  auto tile = [&](int i, bool values) { return tiles + (i % 2 * 2 + values) * KEYS * ROW<D>; };
  auto fetch = [&](int i) {
    for (int values = 0; values < 2; ++values) blocks.template copy<E, D>(tile(i, values), i, values, column);
    commit();
  };
  copy_rows<E, D>(q_tile, QUERIES, static_cast<const E*>(a.q) + column, s.start + first, a.q_row, s.length - first);
  fetch(0);

  const int query = first + warp() * 16;
  E* const mine = q_tile + warp() * 16 * ROW<D>;
  uint32_t q[D / 16][4];
  ForwardRow<E, D> row;
  for (int i = 0; i < blocks.count; ++i) {
    if (i + 1 < blocks.count) fetch(i + 1);
    else commit();
    wait<1>();
    sync();
    if (blocks.prefix(i) && a.prefix_threshold) {
      blocks.template drop<E, D>(tile(i, false), i, false);
      blocks.template drop<E, D>(tile(i, true), i, true);
      sync();
    }
    if (query < s.length) {  // a warp past the end has nothing to do but to copy
      if (i == 0)
#pragma unroll
        for (int d = 0; d < D / 16; ++d) load_matrices(q[d], mine + d * 16 + left_at(ROW<D>));
      attend(row, q, tile(i, false), tile(i, true), blocks.at(i), query);
    }
    sync();  // before the next copy lands where this block's keys are
  }
  if (query < s.length) row.store(a, s, n, query, mine);
}

template <class E, int D>
int forward(const Attention& a, void* stream) {
  if (a.longest <= KEYS) return forward_short<E, D>(a, stream);
  return launch(forward_kernel<E, D>, query_grid(a, QUERIES), FORWARD_THREADS, FORWARD_SHARED<D>, stream, a);
}

}  // namespace ptv2::cuda

int ptv2_cuda_prefix_attention_fwd(const ptv2::cuda::Attention* arguments, void* stream) {
  using namespace ptv2::cuda;
  const Attention a = without_stray_lengths(*arguments);
  if (a.wide) return forward_wide(a, stream);
  return dispatch(a, [&](auto element, auto D) { return forward<decltype(element), D>(a, stream); });
}
