// Prefix attention, forward, of long rows on sm_90a: as prefix_attention_fwd.cu, with two warpgroups of 64 queries a block whose
// products are wgmma's. Queries and probabilities are left factors in registers, so that each product reads one factor only
// from shared memory: keys as they lie, values transposed. Long rows are bound by products, whose full rate mma.sync misses.
#include "device_sm90.h"
#include "forward_row.h"

namespace ptv2::cuda {

constexpr int GROUPS = 2, WIDE_QUERIES = 64 * GROUPS, WIDE_THREADS = 128 * GROUPS, ALIGNMENT = 1024;

template <int D>
constexpr int WIDE_SHARED = (4 * KEYS * D + WIDE_QUERIES * ROW<D>) * 2 + ALIGNMENT;

// One step of a warpgroup's 64 queries over a block of keys.
template <class E, int D>
PTV2_DEVICE void attend_wide(ForwardRow<E, D>& row, const uint32_t (&q)[D / 16][4], const E* k, const E* v, const Keys& keys,
                             int query) {
  constexpr int PANEL = Swizzled<KEYS>::PANEL * 2;  // bytes
  float scores[KEYS / 8][4];
  group_begin();
#pragma unroll
  for (int d = 0; d < D / 16; ++d)
    group_multiply<E, 0>(scores, q[d], descriptor(shared_address(k) + d / 4 * PANEL + d % 4 * 32, 16, 1024), d > 0);
  group_end();
  row.soften(scores, keys, query);
  uint32_t probs[KEYS / 16][4];
#pragma unroll
  for (int j = 0; j < KEYS / 16; ++j) as_left<E>(probs[j], scores[2 * j], scores[2 * j + 1]);
  group_begin();
#pragma unroll
  for (int j = 0; j < KEYS / 16; ++j)
    group_multiply<E, 1>(row.out, probs[j], descriptor(shared_address(v) + j * 16 * 128, PANEL, 1024), true);
  group_end();
}

template <class E, int D>
PTV2_KERNEL(WIDE_THREADS, D == 64 ? 2 : 1) wide_forward_kernel(const Attention a) {
  using Tile = Swizzled<KEYS>;
  const QueryTile tile_of(a, WIDE_QUERIES);
  const int n = block_y(), b = tile_of.b, column = n * D, first = tile_of.tile * WIDE_QUERIES;
  if (b == a.B) return zero_rest<E, D>(a, tile_of.tile, tile_of.tiles);
  const Sequence s = sequence(a, b);
  if (first >= s.length) return;

  unsigned char* const memory = shared_memory();
  E* const tiles = reinterpret_cast<E*>(memory + (ALIGNMENT - shared_address(memory) % ALIGNMENT) % ALIGNMENT);
  E* const q_tile = tiles + 4 * KEYS * D;
  const KeyBlocks<KEYS> blocks(a, s, b, n);
  auto tile = [&](int i, bool values) { return tiles + (i % 2 * 2 + values) * KEYS * D; };  // two deep
  auto fetch = [&](int i) {
    for (int values = 0; values < 2; ++values) blocks.template copy<E, D, Tile>(tile(i, values), i, values, column);
    commit();
  };
  copy_rows<E, D>(q_tile, WIDE_QUERIES, static_cast<const E*>(a.q) + column, s.start + first, a.q_row, s.length - first);
  fetch(0);

  const int query = first + warp() * 16, group_query = first + warp() / 4 * 64;
  E* const mine = q_tile + warp() * 16 * ROW<D>;
  uint32_t q[D / 16][4];
  ForwardRow<E, D> row;
  for (int i = 0; i < blocks.count; ++i) {
    if (i + 1 < blocks.count) fetch(i + 1);
    else commit();
    wait<1>();
    if (blocks.prefix(i) && a.prefix_threshold) {
      sync();
      blocks.template drop<E, D, Tile>(tile(i, false), i, false);
      blocks.template drop<E, D, Tile>(tile(i, true), i, true);
    }
    publish();
    sync();
    if (group_query < s.length) {  // a product takes all four warps of a group
      if (i == 0)
#pragma unroll
        for (int d = 0; d < D / 16; ++d) load_matrices(q[d], mine + d * 16 + left_at(ROW<D>));
      attend_wide(row, q, tile(i, false), tile(i, true), blocks.at(i), query);
    }
    sync();  // before the next copy lands where this block's keys are
  }
  if (query < s.length) row.store(a, s, n, query, mine);
}

template <class E, int D>
int forward_wide(const Attention& a, void* stream) {
  return launch(wide_forward_kernel<E, D>, query_grid(a, WIDE_QUERIES), WIDE_THREADS, WIDE_SHARED<D>, stream, a);
}

int forward_wide(const Attention& a, void* stream) {
  const bool bf16 = a.element == Element::bf16;
  if (a.D == 64) return bf16 ? forward_wide<Bf16, 64>(a, stream) : forward_wide<Fp16, 64>(a, stream);
  if (a.D == 128) return bf16 ? forward_wide<Bf16, 128>(a, stream) : forward_wide<Fp16, 128>(a, stream);
  return INVALID_VALUE;
}

}  // namespace ptv2::cuda
