// Prefix attention, backward: one sweep over the queries makes dq, dk, dv and the prefix's gradient.
//
// A block owns a head and a share of the sequences, which it meets in packs of neighbours. All keys of a pack and its prefix lie
// in shared memory, cut into strips of 16 of one sequence each; a warp owns STRIPS of them with dK and dV in registers. The
// pack's queries stream by in tiles of QUERIES, and a strip leaves out the tiles in which its sequence has none:
//     S^T = K Q^T, dP^T = V dO^T             (a strip's keys as rows, the tile's queries as columns)
//     delta = column sums of P * dP          over all strips, through shared memory: neither the output nor its product with
//                                            dO is read, and no kernel has to run first
//     dV += P^T dO, dK += dS^T Q             in registers
//     dQ  = dS K                             dS^T of all strips through shared memory, written once
// While a tile is worked on, the next one arrives, the first of the next pack with that pack's keys.
// The prefix's strips keep their sums from pack to pack, so its gradient costs neither a second read of q and dO nor a
// partial sum for each sequence: one partial a group, added in a fixed order by reduce_kernel. No atomics anywhere.
// HBM: q, k, v, dO read and dq, dk, dv written once.
//
// LONG rows, whose keys do not fit one block: prefix_attention_dq.cu has made delta and dq before, and a block owns every
// groups-th piece of a sequence's keys. Each piece sees all queries; the prefix's strips, which lie beside every piece, take the
// query tiles by turns, so that each tile counts once for them too.
#pragma once

#include "steps.h"

namespace ptv2::cuda {

template <int D, int STRIPS>
struct SweepShape {
  static constexpr int QUERIES = STRIPS == 1 && D <= 64 ? 32 : 16;
  static constexpr int WARPS = STRIPS == 1 && D <= 64 ? 12 : 8;  // with 168 registers a thread, or 255
  static constexpr int PROBS_ROW = QUERIES + 8;
  // Bytes; sm_80 has 163 KiB, which limits two strips a warp to 15 of tokens (sweep_of).
  static constexpr int shared(int prefix_strips, int token_strips, int warps) {
    const int keys = 16 * (prefix_strips + 2 * token_strips), probs = 16 * (prefix_strips + token_strips);
    return 2 * (2 * keys * ROW<D> + 4 * QUERIES * ROW<D> + probs * PROBS_ROW) + 4 * warps * QUERIES +
           2 * token_strips * static_cast<int>(sizeof(Owner));
  }
};

// The partial sums of one strip of the prefix: dK, dV [16, D] to the group's rows in memory, which only this warp touches.
template <int D, bool ADD>
PTV2_DEVICE void store_partial(const Attention& a, int prompt, int n, int first, const float (&dk)[D / 8][4],
                               const float (&dv)[D / 8][4], int c2) {
  const int64_t row = static_cast<int64_t>(a.N) * D, all = static_cast<int64_t>(a.groups) * a.K * a.P * row;
  float* const base = a.partial + (static_cast<int64_t>(block_x()) * a.K + prompt) * a.P * row + n * D;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int p = first + lane() / 4 + half * 8;
    if (p >= a.P) continue;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      const int column = d * 8 + lane() % 4 * 2;
      uint32_t keep_k = 3, keep_v = 3;
      if (ADD && a.prefix_threshold) {
        keep_k = Draw(a, c2, philox::PREFIX_K, a.prefix_threshold).kept(column / 4, p) >> column % 4;
        keep_v = Draw(a, c2, philox::PREFIX_V, a.prefix_threshold).kept(column / 4, p) >> column % 4;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float *const k = base + p * row + column + i, *const v = k + all;
        const float new_k = keep_k >> i & 1 ? dk[d][half * 2 + i] * a.scale : 0.0f;
        const float new_v = keep_v >> i & 1 ? dv[d][half * 2 + i] * a.prefix_scale : 0.0f;
        *k = ADD ? *k + new_k : new_k;
        *v = ADD ? *v + new_v : new_v;
      }
    }
  }
}

template <bool LONG, int QUERIES, bool SEVERAL>
struct StepOf {
  using Type = Pack<QUERIES, SEVERAL>;
};
template <int QUERIES, bool SEVERAL>
struct StepOf<true, QUERIES, SEVERAL> {
  using Type = Piece<QUERIES>;
};

template <class E, int D, int STRIPS, bool LONG>
struct Sweep {
  using Shape = SweepShape<D, STRIPS>;
  static constexpr int QUERIES = Shape::QUERIES, TILES = QUERIES / 8, PROBS_ROW = Shape::PROBS_ROW;
  static constexpr bool SEVERAL = !LONG && STRIPS == 1;  // sequences a pack
  using Step = typename StepOf<LONG, QUERIES, SEVERAL>::Type;

  const Attention& a;
  const int n = block_y(), w = warp(), warps = num_threads() / 32;
  PTV2_DEVICE int column() const { return n * D; }
  PTV2_DEVICE int64_t row() const { return static_cast<int64_t>(a.N) * D; }
  const int prefix_strips = ceil_div(a.P, 16), token_strips = warps * STRIPS - prefix_strips;
  PTV2_DEVICE bool need_tokens() const { return a.dqkv != nullptr; }
  PTV2_DEVICE bool need_prefix() const { return a.partial != nullptr; }
  E* const prefix_k = reinterpret_cast<E*>(shared_memory());
  E* const prefix_v = prefix_k + prefix_strips * 16 * ROW<D>;
  E* const token_k = prefix_v + prefix_strips * 16 * ROW<D>;  // [2, keys, D], then the values: two packs' of each
  E* const q_tiles = token_k + 4 * token_strips * 16 * ROW<D>;
  E* const do_tiles = q_tiles + 2 * QUERIES * ROW<D>;
  E* const ds_tile = do_tiles + 2 * QUERIES * ROW<D>;  // [all keys, QUERIES]
  float* const delta_parts = reinterpret_cast<float*>(ds_tile + (prefix_strips + token_strips) * 16 * PROBS_ROW);  // of each warp
  Owner* const owners = reinterpret_cast<Owner*>(delta_parts + warps * QUERIES);  // [2, token_strips]
  float dk[STRIPS][D / 8][4] = {}, dv[STRIPS][D / 8][4] = {};
  // A dropped probability is negative until products() has seen it.
  float probs[STRIPS][TILES][4], dprobs[STRIPS][TILES][4];

  PTV2_DEVICE explicit Sweep(const Attention& a) : a(a) {}

  // Where the tokens' gradients are not wanted, only the prefix meets the queries, each of which then lies beside one piece.
  PTV2_DEVICE bool turns() const { return LONG && !need_tokens(); }

  // A strip of 16 keys at hand, of which `count` exist: of sequence b from its `first` on, or of the prefix. Of one that does not
  // meet the tile's queries nothing is read or written.
  struct Strip {
    bool prefix, meets;
    int b, start, first, count;
    E *k, *v;
    float value_scale;
  };
  PTV2_DEVICE Strip strip(int index, const Step& step, int stage) const {
    const int tokens = token_strips * 16 * ROW<D>;
    if (index < prefix_strips) {
      E* const k = prefix_k + index * 16 * ROW<D>;
      const int count = step.of.num_prefix - index * 16;
      bool meets = count > 0;
      if constexpr (LONG) meets = meets && step.its_turn(token_strips);
      return {true, meets, step.b, step.of.start, index * 16, count, k, k + prefix_strips * 16 * ROW<D>, a.prefix_scale};
    }
    const int token_strip = index - prefix_strips;
    E* const k = token_k + stage * tokens + token_strip * 16 * ROW<D>;
    Owner owner;
    bool meets = !turns();
    if constexpr (SEVERAL) {
      owner = owners[stage * token_strips + token_strip];
      const int from = owner.start - step.of.start - step.first;  // in the tile
      meets = from < QUERIES && from + owner.length > 0;
    } else {
      owner = step.owner(a, token_strips, token_strip);
    }
    const int count = owner.length - owner.first;
    return {false, meets && count > 0, owner.b, owner.start, owner.first, count, k, k + 2 * tokens, 1.0f};
  }

  // Starts copying the keys and values of a pack or piece. All threads meet here.
  PTV2_DEVICE void fetch_keys(const Step& step, int stage) {
    if (turns()) return;
    const int tokens = token_strips * 16 * ROW<D>;
    if constexpr (!SEVERAL) {
      E* const k = token_k + stage * tokens;
      const Owner owner = step.owner(a, token_strips, 0);
      const int rows = token_strips * 16, count = owner.length - owner.first;
      copy_rows<E, D>(k, rows, static_cast<const E*>(a.k) + column(), owner.start + owner.first, a.k_row, count);
      copy_rows<E, D>(k + 2 * tokens, rows, static_cast<const E*>(a.v) + column(), owner.start + owner.first, a.v_row, count);
      return;
    }
    Owner* const mine = owners + stage * token_strips;
    list_owners(a, step, mine, token_strips);
    for_pieces<D>(mine, token_strips, [&](int at, int d, int64_t token, bool valid) {
      E* const to = token_k + stage * tokens + at * ROW<D> + d;
      copy16(to, static_cast<const E*>(a.k) + token * a.k_row + column() + d, valid);
      copy16(to + 2 * tokens, static_cast<const E*>(a.v) + token * a.v_row + column() + d, valid);
    });
  }

  PTV2_DEVICE void fetch_queries(const Step& step, int parity) {
    const int at = parity * QUERIES * ROW<D>, count = step.of.length - step.first;
    copy_rows<E, D>(q_tiles + at, QUERIES, static_cast<const E*>(a.q) + column(), step.of.start + step.first, a.q_row, count);
    copy_rows<E, D>(do_tiles + at, QUERIES, static_cast<const E*>(a.dout) + column(), step.of.start + step.first, row(), count);
  }

  // Of query `lane`: its sequence, the log-sum-exp in base 2, and delta where it is known. Past the end lse
  // is +inf, no probability.
  struct Statistics {
    int b = 0;
    float lse2 = INFINITY, delta = 0;
  };
  PTV2_DEVICE Statistics fetch_statistics(const Step& step) const {
    const int query = step.first + lane();
    if (lane() >= QUERIES || query >= step.of.length) return {};
    const int token = step.of.start + query;
    const int64_t at = static_cast<int64_t>(n) * a.T + token;
    const int b = step.sequence_of(a, token);
    return {b, a.lse[at] * LOG2E, LONG ? a.delta[at] : 0};
  }

  // Which of a fragment's numbers are kept: rows are a strip's keys, columns the tile's queries column...
  PTV2_DEVICE uint32_t kept(const Strip& keys, const Step& step, const Statistics& statistics, int column_at) const {
    const int mine = column_at + column_of_draw();
    int b = keys.b, start = keys.start;
    if (SEVERAL && keys.prefix) b = shuffle(statistics.b, mine), start = a.cu_seqlens[b];
    const int place = step.of.start + step.first + mine - start;
    const Draw draw(a, b * a.N + n, keys.prefix ? philox::PREFIX_PROB : philox::TOKEN_PROB, a.threshold);
    return kept_by_keys(draw, keys.first, place);
  }

  // P^T and dP^T of this warp's strips; this warp's part of delta to shared memory.
  PTV2_DEVICE void probabilities(const Step& step, int stage, const E* q, const E* dout, const Statistics& statistics) {
    float sums[TILES][2] = {};
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) {
      const Strip keys = strip(w * STRIPS + s, step, stage);
      if (!keys.meets) continue;
#pragma unroll
      for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) probs[s][j][i] = dprobs[s][j][i] = 0;
      multiply_rows<E, D, TILES>(probs[s], keys.k, q);
      multiply_rows<E, D, TILES>(dprobs[s], keys.v, dout);
      const float scale2 = a.scale * LOG2E * keys.value_scale;
      // no probability where the query is another sequence's
      const float lse2 = !SEVERAL || keys.prefix || statistics.b == keys.b ? statistics.lse2 : INFINITY;
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        const uint32_t bits = a.threshold ? kept(keys, step, statistics, j * 8) : 0x1111u;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float lse = shuffle(lse2, j * 8 + lane() % 4 * 2 + i);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float &prob = probs[s][j][half * 2 + i], &dprob = dprobs[s][j][half * 2 + i];
            const bool keep = bits >> 4 * (half * 2 + i) & 1;
            prob = lane() / 4 + half * 8 < keys.count ? power_of_2(prob * scale2 - lse) : 0.0f;
            dprob *= keep ? keys.value_scale * a.keep_scale : 0.0f;
            if (!LONG) sums[j][i] += prob * dprob;
            prob = keep ? prob : -prob;
          }
        }
      }
    }
    if constexpr (!LONG) share_delta(sums);
  }

  // Column sums of this warp's rows to shared memory.
  PTV2_DEVICE void share_delta(float (&sums)[TILES][2]) {
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) sums[j][i] += shuffle_xor(sums[j][i], mask);
        if (lane() / 4 == 0) delta_parts[w * QUERIES + j * 8 + lane() * 2 + i] = sums[j][i];
      }
  }

  // delta of query `lane` from all warps' parts.
  PTV2_DEVICE float sum_of_parts() const {
    float delta = 0;
    for (int other = 0; other < warps; ++other) delta += delta_parts[other * QUERIES + lane() % QUERIES];
    return delta;
  }

  // dV and dK of this warp's strips, and, unless dq is made elsewhere, their dS^T to shared memory.
  PTV2_DEVICE void products(const Step& step, int stage, const E* q, const E* dout, float delta) {
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) {
      const int index = w * STRIPS + s;
      const Strip keys = strip(index, step, stage);
      if (!keys.meets) continue;
#pragma unroll
      for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float mean = shuffle(delta, j * 8 + lane() % 4 * 2 + i);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float &prob = probs[s][j][half * 2 + i], &dprob = dprobs[s][j][half * 2 + i];
            dprob = fabsf(prob) * (dprob - mean) * keys.value_scale;
            prob = fmaxf(prob, 0.0f) * a.keep_scale;
          }
        }
      if (keys.prefix ? need_prefix() : need_tokens()) {
#pragma unroll
        for (int j = 0; j < TILES / 2; ++j) {
          uint32_t left[4];
          as_left<E>(left, probs[s][2 * j], probs[s][2 * j + 1]);
          multiply_fragment<E, D>(dv[s], left, dout + j * 16 * ROW<D>);
          as_left<E>(left, dprobs[s][2 * j], dprobs[s][2 * j + 1]);
          multiply_fragment<E, D>(dk[s], left, q + j * 16 * ROW<D>);
        }
      }
      if (LONG) continue;
      E* const ds = ds_tile + (index * 16 + lane() / 4) * PROBS_ROW + lane() % 4 * 2;
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        store_pair<E>(ds + j * 8, dprobs[s][j][0], dprobs[s][j][1]);
        store_pair<E>(ds + 8 * PROBS_ROW + j * 8, dprobs[s][j][2], dprobs[s][j][3]);
      }
    }
  }

  // dQ = dS K, dealt out to the warps in pieces of 16 queries and 16 columns.
  PTV2_DEVICE void store_dq(const Step& step, int stage) {
    for (int unit = w; unit < QUERIES / 16 * (D / 16); unit += warps) {
      const int tile = unit / (D / 16) * 16, d = unit % (D / 16) * 16;
      float dq[2][4] = {};
      for (int index = 0; index < prefix_strips + token_strips; ++index) {
        const Strip keys = strip(index, step, stage);
        if (!keys.meets) continue;
        uint32_t left[4], right[4];
        load_matrices_transposed(left, ds_tile + index * 16 * PROBS_ROW + tile + left_transposed_at(PROBS_ROW));
        load_matrices_transposed(right, keys.k + d + right_transposed_at(ROW<D>));
        multiply<E>(dq[0], left, right[0], right[1]);
        multiply<E>(dq[1], left, right[2], right[3]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = step.first + tile + lane() / 4 + half * 8;
        if (query >= step.of.length) continue;
        const int64_t token = step.of.start + query;
        E* const to = static_cast<E*>(a.dqkv) + token * 3 * row() + column() + d + lane() % 4 * 2;
        store_pair<E>(to, dq[0][half * 2] * a.scale, dq[0][half * 2 + 1] * a.scale);
        store_pair<E>(to + 8, dq[1][half * 2] * a.scale, dq[1][half * 2 + 1] * a.scale);
      }
    }
  }

  // dK and dV of a token strip, staged where its keys and values were.
  PTV2_DEVICE void store_tokens(const Strip& keys, int s) {
    const int at = lane() / 4 * ROW<D> + lane() % 4 * 2;
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int to = at + half * 8 * ROW<D> + d * 8;
        store_pair<E>(keys.k + to, dk[s][d][half * 2] * a.scale, dk[s][d][half * 2 + 1] * a.scale);
        store_pair<E>(keys.v + to, dv[s][d][half * 2], dv[s][d][half * 2 + 1]);
      }
    sync_warp();
    E* const to = static_cast<E*>(a.dqkv) + row() + column();
    store_rows<E, D>(to, keys.start + keys.first, 3 * row(), keys.count, keys.k, 16);
    store_rows<E, D>(to + row(), keys.start + keys.first, 3 * row(), keys.count, keys.v, 16);
  }

  // What a pack or piece leaves behind: its tokens' gradients, and the prefix's where the next one has other masks or may have
  // another prompt.
  PTV2_DEVICE void finish(const Step& step, int stage, bool add_up) {
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) {
      const Strip keys = strip(w * STRIPS + s, step, stage);
      if (keys.count <= 0 || (keys.prefix ? !need_prefix() || !add_up : !need_tokens())) continue;
      if (keys.prefix) store_partial<D, true>(a, step.of.prompt, n, keys.first, dk[s], dv[s], step.b * a.N + n);
      else store_tokens(keys, s);
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) dk[s][d][i] = dv[s][d][i] = 0;
    }
  }

  // This group's partial rows of a prompt: zeros, or the sums of all its sequences.
  PTV2_DEVICE void store_prefix(int prompt) {
#pragma unroll
    for (int s = 0; s < STRIPS; ++s)
      if (w * STRIPS + s < prefix_strips) store_partial<D, false>(a, prompt, n, (w * STRIPS + s) * 16, dk[s], dv[s], 0);
  }

  PTV2_DEVICE void run() {
    const bool add_up = a.prefix_threshold != 0 || a.K > 1;
    if (need_prefix() && add_up)
      for (int prompt = 0; prompt < a.K; ++prompt) store_prefix(prompt);
    Step step(a, block_x(), token_strips, turns());
    int held = -1, parity = 0, stage = 0;  // the prompt in shared memory; where this tile and these keys lie
    bool fresh = true;                     // the first tile of a pack or piece
    Statistics statistics;
    if (!step.done(a)) {
      fetch_keys(step, stage);
      fetch_queries(step, parity);
      statistics = fetch_statistics(step);
    }
    while (!step.done(a)) {
      if (fresh && prefix_strips > 0 && (held != step.of.prompt || a.prefix_threshold)) {
        copy_prefix<E, D>(a, prefix_k, prefix_v, prefix_strips * 16, step.of, column());
        held = step.of.prompt;
      }
      commit();
      wait<0>();
      sync();
      Step next = step;
      const bool last = next.advance(a, token_strips, turns()), more = !next.done(a);
      Statistics next_statistics;
      if (more) {
        if (last) fetch_keys(next, 1 - stage);
        fetch_queries(next, 1 - parity);
        next_statistics = fetch_statistics(next);
      }
      if (fresh && a.prefix_threshold) {
        drop_whole_prefix<E, D>(a, prefix_k, prefix_v, prefix_strips * 16, step.b * a.N + n);
      }
      const E *const q = q_tiles + parity * QUERIES * ROW<D>, *const dout = do_tiles + parity * QUERIES * ROW<D>;
      probabilities(step, stage, q, dout, statistics);
      if (!LONG) {
        sync();
        statistics.delta = sum_of_parts();
      }
      products(step, stage, q, dout, statistics.delta);
      sync();
      if (!LONG && need_tokens()) store_dq(step, stage);
      if (last) {
        if (!LONG) sync();  // dQ has read the keys, in whose place the gradients are staged
        finish(step, stage, add_up);
        stage = 1 - stage;
      }
      parity = 1 - parity, statistics = next_statistics, fresh = last;
      step.go(next);
      if (more) step.reread(a);  // it is at hand, and would take registers
    }
    if (need_prefix() && !add_up) store_prefix(0);
  }
};

template <class E, int D, int STRIPS, bool LONG>
PTV2_KERNEL(32 * (SweepShape<D, STRIPS>::WARPS), 1) sweep_kernel(const Attention a) {
  if (block_x() < a.groups) {
    Sweep<E, D, STRIPS, LONG>(a).run();
  } else if (a.dqkv != nullptr) {  // rows past the last sequence
    const int64_t row = static_cast<int64_t>(a.N) * D;
    for (int part = LONG; part < 3; ++part)
      zero_rows<E, D>(static_cast<E*>(a.dqkv) + part * row + block_y() * D, a.cu_seqlens[a.B], a.T, 3 * row, 0, 1);
  }
}

template <class E, int D, int STRIPS, bool LONG>
int sweep(const Attention& a, void* stream) {
  using Shape = SweepShape<D, STRIPS>;
  const int prefix = ceil_div(a.P, 16), longest = ceil_div(a.longest, 16), room = Shape::WARPS * STRIPS - prefix;
  int wanted = room;
  if (!LONG) wanted = room < 8 || longest > 8 ? longest : 8;  // short rows share a pack of 128 tokens
  const int warps = ceil_div(prefix + wanted, STRIPS), tokens = warps * STRIPS - prefix;
  const dim3 grid{static_cast<unsigned>(a.groups + 1), static_cast<unsigned>(a.N), 1};
  return launch(sweep_kernel<E, D, STRIPS, LONG>, grid, warps * 32, Shape::shared(prefix, tokens, warps), stream, a);
}

template <class E, int D, int STRIPS>
int long_rows(const Attention& a, void* stream) {
  if (const int code = query_gradients(a, stream)) return code;
  if (a.dqkv == nullptr && a.partial == nullptr) return SUCCESS;
  return sweep<E, D, STRIPS, true>(a, stream);
}

// One strip a warp while the warps suffice; two where the accumulators of two fit the registers.
template <class E, int D>
int sweep_of(const Attention& a, void* stream) {
  constexpr int ONE = SweepShape<D, 1>::WARPS, TWO = D <= 64 ? 2 * SweepShape<D, 2>::WARPS : 0;
  const int prefix = ceil_div(a.P, 16), strips = prefix + ceil_div(a.longest, 16);
  if (strips <= ONE) return sweep<E, D, 1, false>(a, stream);
  if constexpr (TWO > 0) {
    if (strips <= (prefix == 0 ? 14 : TWO)) return sweep<E, D, 2, false>(a, stream);
    if (prefix > ONE / 2 && prefix < TWO) return long_rows<E, D, 2>(a, stream);
  }
  return prefix < ONE ? long_rows<E, D, 1>(a, stream) : INVALID_VALUE;
}

}  // namespace ptv2::cuda
