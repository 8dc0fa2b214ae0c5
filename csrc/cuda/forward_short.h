// Prefix attention, forward, of rows of up to 64 tokens: a block owns a head and a share of the tokens, which it meets in packs
// of neighbouring sequences (steps.h), four strips of 16 queries, one a warp. The prefix stays in shared memory from pack to
// pack, and the next pack arrives while this one is worked on. Sequences of 20 tokens, alone in a block, would leave half idle.
#pragma once

#include "forward_row.h"
#include "steps.h"

namespace ptv2::cuda {

template <class E, int D>
struct ShortForward {
  static constexpr int STRIPS = 4, ROWS = STRIPS * 16, TILE = ROWS * ROW<D>;
  using Step = Pack<1 << 30, true>;  // a pack's queries are one tile

  const Attention& a;
  const int n = block_y(), column = n * D, w = warp(), prefix_rows = ceil_div(a.P, 16) * 16;
  E* const prefix_k = reinterpret_cast<E*>(shared_memory());
  E* const prefix_v = prefix_k + prefix_rows * ROW<D>;
  E* const tiles = prefix_v + prefix_rows * ROW<D>;  // queries, keys, values; two packs deep
  Owner* const owners = reinterpret_cast<Owner*>(tiles + 6 * TILE);

  static constexpr int shared(int prefix_rows) {
    return (2 * prefix_rows * ROW<D> + 6 * TILE) * 2 + 2 * STRIPS * static_cast<int>(sizeof(Owner));
  }

  PTV2_DEVICE explicit ShortForward(const Attention& a) : a(a) {}

  // Starts copying a pack. All threads meet here.
  PTV2_DEVICE void fetch(const Step& step, int stage) {
    Owner* const mine = owners + stage * STRIPS;
    list_owners(a, step, mine, STRIPS);
    for_pieces<D>(mine, STRIPS, [&](int at, int d, int64_t token, bool valid) {
      E* const to = tiles + stage * 3 * TILE + at * ROW<D> + d;
      copy16(to, static_cast<const E*>(a.q) + token * a.q_row + column + d, valid);
      copy16(to + TILE, static_cast<const E*>(a.k) + token * a.k_row + column + d, valid);
      copy16(to + 2 * TILE, static_cast<const E*>(a.v) + token * a.v_row + column + d, valid);
    });
  }

  // This warp's strip of queries over the prefix and its sequence.
  PTV2_DEVICE void attend_strip(const Owner& owner, int stage) {
    E* const mine = tiles + stage * 3 * TILE + w * 16 * ROW<D>;
    const E* const k = mine + TILE - owner.first * ROW<D>;  // where the sequence begins in the pack
    const Sequence s = sequence(a, owner.b);
    const KeyBlocks<KEYS> blocks(a, s, owner.b, n);
    uint32_t q[D / 16][4];
#pragma unroll
    for (int d = 0; d < D / 16; ++d) load_matrices(q[d], mine + d * 16 + left_at(ROW<D>));
    ForwardRow<E, D> row;
    for (int i = 0; i < blocks.prefix_blocks; ++i)
      attend(row, q, prefix_k + i * KEYS * ROW<D>, prefix_v + i * KEYS * ROW<D>, blocks.at(i), owner.first);
    attend(row, q, k, k + TILE, blocks.at(blocks.prefix_blocks), owner.first);
    row.store(a, s, n, owner.first, mine);
  }

  PTV2_DEVICE void run() {
    Step step(a, block_x(), STRIPS, false);
    int held = -1, stage = 0;  // the prompt in shared memory; where this pack lies
    if (!step.done(a)) fetch(step, stage);
    while (!step.done(a)) {
      const bool fresh = prefix_rows > 0 && (held != step.of.prompt || a.prefix_threshold);
      if (fresh) copy_prefix<E, D>(a, prefix_k, prefix_v, prefix_rows, step.of, column);
      held = step.of.prompt;
      commit();
      wait<0>();
      sync();
      if (fresh && a.prefix_threshold) drop_whole_prefix<E, D>(a, prefix_k, prefix_v, prefix_rows, step.b * a.N + n);
      step.advance(a, STRIPS, false);
      if (!step.done(a)) fetch(step, 1 - stage);
      const Owner owner = owners[stage * STRIPS + w];
      if (owner.length > 0) attend_strip(owner, stage);
      sync();  // before another prefix lands
      stage = 1 - stage;
    }
  }
};

template <class E, int D>
PTV2_KERNEL(128, D <= 96 ? 3 : 2) short_forward_kernel(const Attention a) {
  if (block_x() == a.groups) return zero_rest<E, D>(a, 0, 1);
  ShortForward<E, D>(a).run();
}

template <class E, int D>
int forward_short(const Attention& a, void* stream) {
  const dim3 grid{static_cast<unsigned>(a.groups + 1), static_cast<unsigned>(a.N), 1};
  return launch(short_forward_kernel<E, D>, grid, 128, ShortForward<E, D>::shared(ceil_div(a.P, 16) * 16), stream, a);
}

}  // namespace ptv2::cuda
