// Prefix attention, backward of long rows, first kernel: delta and dq. A block owns (64 queries, head) of a sequence as the
// forward does, and streams the keys. delta = rowsum(dO * O) where the output was kept; else a first pass over the keys sums
// P * dP, two products more instead of 2D bytes a token and head kept from forward to backward.
#include "dispatch.h"
#include "key_blocks.h"

namespace ptv2::cuda {

template <int D>
struct QueryShape {
  static constexpr int QUERIES = 64, THREADS = 128, KEYS = D <= 64 ? 64 : 32;
  static constexpr int SHARED = (2 * QUERIES + 4 * KEYS) * ROW<D> * 2;
};

template <class E, int D>
struct QueryRow {
  static constexpr int KEYS = QueryShape<D>::KEYS;
  float dq[D / 8][4] = {};
  float delta[2] = {0, 0}, lse2[2];  // of rows lane / 4 and 8 below; +inf past the end, where nothing then has a probability

  // P and dP of this warp's 16 queries and a block of keys.
  PTV2_DEVICE void probabilities(float (&probs)[KEYS / 8][4], float (&dprobs)[KEYS / 8][4], const E* q, const E* dout, const E* k,
                                 const E* v, const Keys& keys, float keep_scale, int query) const {
    multiply_rows<E, D, KEYS / 8>(probs, q, k, keys.count);
    multiply_rows<E, D, KEYS / 8>(dprobs, dout, v, keys.count);
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
      const uint32_t bits = keys.draw.threshold ? kept_by_queries(keys.draw, query, keys.first + j * 8) : 15u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool exists = j * 8 + lane() % 4 * 2 + i % 2 < keys.count;
        probs[j][i] = exists ? power_of_2(probs[j][i] * keys.scale2 - lse2[i / 2]) : 0.0f;
        dprobs[j][i] *= bits >> i & 1 ? keep_scale * keys.value_scale : 0.0f;
      }
    }
  }

  PTV2_DEVICE void add_delta(const float (&probs)[KEYS / 8][4], const float (&dprobs)[KEYS / 8][4]) {
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) delta[i / 2] += probs[j][i] * dprobs[j][i];
  }

  PTV2_DEVICE void add_dq(const float (&probs)[KEYS / 8][4], float (&dprobs)[KEYS / 8][4], const E* k, const Keys& keys) {
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) dprobs[j][i] = probs[j][i] * (dprobs[j][i] - delta[i / 2]) * keys.value_scale;
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j)
      if (j * 16 < keys.count) {
        uint32_t ds[4];
        as_left<E>(ds, dprobs[2 * j], dprobs[2 * j + 1]);
        multiply_fragment<E, D>(dq, ds, k + j * 16 * ROW<D>);
      }
  }

  // Both rows' sums over the four lanes that share them.
  PTV2_DEVICE void complete_delta() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[half] += shuffle_xor(delta[half], 1);
      delta[half] += shuffle_xor(delta[half], 2);
    }
  }

  // This lane's share of rowsum(dO * O), dO from the tile and O from memory.
  PTV2_DEVICE void delta_of(const E* dout, const E* out, int64_t row, int count) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = lane() / 4 + half * 8;
      if (query >= count) continue;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        const int column = d * 8 + lane() % 4 * 2;
        float low, high, out_low, out_high;
        unpack<E>(*reinterpret_cast<const uint32_t*>(dout + query * ROW<D> + column), low, high);
        unpack<E>(*reinterpret_cast<const uint32_t*>(out + query * row + column), out_low, out_high);
        delta[half] += low * out_low + high * out_high;
      }
    }
  }
};

template <class E, int D>
PTV2_KERNEL(QueryShape<D>::THREADS, 2) query_kernel(const Attention a) {
  constexpr int QUERIES = QueryShape<D>::QUERIES, KEYS = QueryShape<D>::KEYS;
  const QueryTile mine(a, QUERIES);
  const int n = block_y(), b = mine.b, column = n * D, first = mine.tile * QUERIES;
  const int64_t heads = static_cast<int64_t>(a.N) * D;
  if (b == a.B) {  // rows past the last sequence
    if (a.dqkv != nullptr)
      zero_rows<E, D>(static_cast<E*>(a.dqkv) + column, a.cu_seqlens[b], a.T, 3 * heads, mine.tile, mine.tiles);
    return;
  }
  const Sequence s = sequence(a, b);
  if (first >= s.length) return;

  E* const q_tile = reinterpret_cast<E*>(shared_memory());
  E* const do_tile = q_tile + QUERIES * ROW<D>;
  E* const tiles = do_tile + QUERIES * ROW<D>;  // keys, values; two deep
  const KeyBlocks<KEYS> blocks(a, s, b, n);
  auto tile = [&](int i, bool values) { return tiles + (i % 2 * 2 + values) * KEYS * ROW<D>; };
  const int delta_steps = a.out != nullptr ? 0 : blocks.count, steps = delta_steps + (a.dqkv != nullptr ? blocks.count : 0);
  auto fetch = [&](int step) {
    const int i = step < delta_steps ? step : step - delta_steps;
    for (int values = 0; values < 2; ++values) blocks.template copy<E, D>(tile(step, values), i, values, column);
  };
  copy_rows<E, D>(q_tile, QUERIES, static_cast<const E*>(a.q) + column, s.start + first, a.q_row, s.length - first);
  copy_rows<E, D>(do_tile, QUERIES, static_cast<const E*>(a.dout) + column, s.start + first, heads, s.length - first);
  if (steps > 0) fetch(0);
  commit();

  const int in_tile = warp() * 16, query = first + in_tile;
  const E *const q = q_tile + in_tile * ROW<D>, *const dout = do_tile + in_tile * ROW<D>;
  const int64_t stats = static_cast<int64_t>(n) * a.T + s.start + query;
  QueryRow<E, D> row;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int in_warp = lane() / 4 + half * 8;
    row.lse2[half] = query + in_warp < s.length ? a.lse[stats + in_warp] * LOG2E : INFINITY;
  }
  wait<0>();
  sync();
  if (delta_steps == 0) {
    row.delta_of(dout, static_cast<const E*>(a.out) + (s.start + query) * heads + column, heads, s.length - query);
    row.complete_delta();
  }
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) fetch(step + 1);
    commit();
    const int i = step < delta_steps ? step : step - delta_steps;
    if (blocks.prefix(i) && a.prefix_threshold) {
      blocks.template drop<E, D>(tile(step, false), i, false);
      blocks.template drop<E, D>(tile(step, true), i, true);
      sync();
    }
    if (query < s.length) {
      float probs[KEYS / 8][4] = {}, dprobs[KEYS / 8][4] = {};
      const Keys keys = blocks.at(i);
      row.probabilities(probs, dprobs, q, dout, tile(step, false), tile(step, true), keys, a.keep_scale, query);
      if (step < delta_steps) row.add_delta(probs, dprobs);
      else row.add_dq(probs, dprobs, tile(step, false), keys);
      if (step == delta_steps - 1) row.complete_delta();
    }
    wait<0>();
    sync();  // the next block has arrived everywhere, and this one's place is free
  }

  if (query >= s.length) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int in_warp = lane() / 4 + half * 8;
    if (lane() % 4 == 0 && query + in_warp < s.length) a.delta[stats + in_warp] = row.delta[half];
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
      store_pair<E>(q_tile + (in_tile + in_warp) * ROW<D> + d * 8 + lane() % 4 * 2, row.dq[d][half * 2] * a.scale,
                    row.dq[d][half * 2 + 1] * a.scale);
  }
  sync_warp();
  if (a.dqkv != nullptr)
    store_rows<E, D>(static_cast<E*>(a.dqkv) + column, s.start + query, 3 * heads, s.length - query, q, 16);
}

template <class E, int D>
int query_gradients(const Attention& a, void* stream) {
  using Shape = QueryShape<D>;
  return launch(query_kernel<E, D>, query_grid(a, Shape::QUERIES), Shape::THREADS, Shape::SHARED, stream, a);
}

int query_gradients(const Attention& a, void* stream) {
  return dispatch(a, [&](auto element, auto D) { return query_gradients<decltype(element), D>(a, stream); });
}

}  // namespace ptv2::cuda
