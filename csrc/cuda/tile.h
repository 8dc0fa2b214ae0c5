// What the attention kernels share: rows in shared memory, fragments of tensor core products, dropout bits in their layout.
//
// Scores live in base 2: scale2 = scale * log2(e), so exp2 needs no multiplication. A fragment is the accumulator of one m16n8k16
// product: with g = lane / 4 and t = lane % 4 its four numbers are (row g, columns 2t and 2t + 1), (row g + 8, the same columns).
#pragma once

#include "abi.h"
#include "device.h"
#include "ptv2/philox.h"

namespace ptv2::cuda {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float NOTHING = -1.0e30f;  // a finite start of a running maximum: a block without a valid key makes no inf - inf

// Elements of a row in shared memory. The 16 bytes of padding spread eight rows' pieces of 16 bytes over all banks.
template <int D>
constexpr int ROW = D + 8;

// Where an element of a tile of such rows lies.
template <int D>
struct Padded {
  PTV2_DEVICE static int at(int row, int column) { return row * ROW<D> + column; }
};

PTV2_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What the kernels get: a layer without a prefix may come with the prompts' lengths, which then count for nothing.
inline Attention without_stray_lengths(Attention a) {
  if (a.P == 0) a.prompt_lengths = nullptr;
  return a;
}

struct Sequence {
  int start, length, prompt, num_prefix;
};

PTV2_DEVICE Sequence sequence(const Attention& a, int b) {
  const int start = a.cu_seqlens[b], prompt = a.prompt_ids != nullptr ? a.prompt_ids[b] : 0;
  return {start, a.cu_seqlens[b + 1] - start, prompt, a.prompt_lengths != nullptr ? a.prompt_lengths[prompt] : a.P};
}

// Starts copying rows first.. of `from`, of which `count` exist, to `rows` rows of shared memory; the others become zero.
template <class E, int D, class Layout = Padded<D>>
PTV2_DEVICE void copy_rows(E* to, int rows, const void* from, int64_t first, int64_t stride, int count) {
  const E* source = static_cast<const E*>(from) + first * stride;
#pragma unroll 2  // more would take registers for addresses
  for (int i = thread(); i < rows * (D / 8); i += num_threads()) {
    const int row = i / (D / 8), column = i % (D / 8) * 8;
    const bool valid = row < count;
    copy16(to + Layout::at(row, column), source + (valid ? row * stride + column : 0), valid);
  }
}

// Rows first.. of this lane's warp, staged in shared memory, to global memory, 16 bytes at a time.
template <class E, int D>
PTV2_DEVICE void store_rows(void* to, int64_t first, int64_t stride, int count, const E* from, int rows) {
  struct alignas(16) Piece {
    uint32_t word[4];
  };
  E* target = static_cast<E*>(to) + first * stride;
  for (int i = lane(); i < rows * (D / 8); i += 32) {
    const int row = i / (D / 8), column = i % (D / 8) * 8;
    if (row < count)
      *reinterpret_cast<Piece*>(target + row * stride + column) = *reinterpret_cast<const Piece*>(from + row * ROW<D> + column);
  }
}

// Rows first..last - 1 of one head become zero, dealt out to `blocks` blocks of which this is `block`.
template <class E, int D>
PTV2_DEVICE void zero_rows(void* to, int64_t first, int64_t last, int64_t stride, int block, int blocks) {
  for (int64_t i = first * (D / 2) + block * num_threads() + thread(); i < last * (D / 2); i += blocks * num_threads())
    *reinterpret_cast<uint32_t*>(static_cast<E*>(to) + i / (D / 2) * stride + i % (D / 2) * 2) = 0;
}

// Two neighbours of a fragment to memory in the elements' type.
template <class E>
PTV2_DEVICE void store_pair(E* to, float low, float high) { *reinterpret_cast<uint32_t*>(to) = pack<E>(low, high); }

// Where this lane's row lies for load_matrices: of a [16, 16] left factor; of [16 columns, 16] and, transposed, [16, 16 columns]
// right factors; of a left factor that lies transposed.
PTV2_DEVICE int left_at(int row) { return lane() % 16 * row + lane() / 16 * 8; }
PTV2_DEVICE int right_at(int row) { return (lane() / 16 * 8 + lane() % 8) * row + lane() / 8 % 2 * 8; }
PTV2_DEVICE int right_transposed_at(int row) { return left_at(row); }
PTV2_DEVICE int left_transposed_at(int row) { return right_at(row); }

// sums [16, 8 * COLUMNS] += left (16 rows of `left`, D columns) times right^T (8 * COLUMNS rows of `right`, of which `count`
// exist: pieces of 16 that have none are left out).
template <class E, int D, int COLUMNS>
PTV2_DEVICE void multiply_rows(float (&sums)[COLUMNS][4], const E* left, const E* right, int count = 8 * COLUMNS) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[4];
    load_matrices(a, left + k * 16 + left_at(ROW<D>));
#pragma unroll
    for (int j = 0; j < COLUMNS / 2; ++j) {
      if (j * 16 >= count) continue;
      uint32_t b[4];
      load_matrices(b, right + j * 16 * ROW<D> + k * 16 + right_at(ROW<D>));
      multiply<E>(sums[2 * j], a, b[0], b[1]);
      multiply<E>(sums[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// sums [16, D] += left [16, 16] (a fragment's registers) times 16 rows of `right`.
template <class E, int D>
PTV2_DEVICE void multiply_fragment(float (&sums)[D / 8][4], const uint32_t (&left)[4], const E* right) {
#pragma unroll
  for (int d = 0; d < D / 16; ++d) {
    uint32_t b[4];
    load_matrices_transposed(b, right + d * 16 + right_transposed_at(ROW<D>));
    multiply<E>(sums[2 * d], left, b[0], b[1]);
    multiply<E>(sums[2 * d + 1], left, b[2], b[3]);
  }
}

// Two neighbouring accumulators [16, 8] as one left factor [16, 16].
template <class E>
PTV2_DEVICE void as_left(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = pack<E>(low[0], low[1]), a[1] = pack<E>(low[2], low[3]);
  a[2] = pack<E>(high[0], high[1]), a[3] = pack<E>(high[2], high[3]);
}

// The generator of one (sequence, head) and stream: its counters beside the element's (ops/_philox.py).
struct Draw {
  uint64_t seed;
  uint32_t c2, c3, threshold;
  PTV2_DEVICE Draw(const Attention& a, int sequence_head, philox::Stream stream, uint32_t threshold)
      : seed(threshold ? static_cast<uint64_t>(*a.seed) : 0), c2(sequence_head), c3(a.site * philox::NUM_STREAMS + stream),
        threshold(threshold) {}
  // Bit i: whether element (row, 4 * group + i) is kept.
  PTV2_DEVICE uint32_t kept(int group, int row) const {
    const philox::Words words = philox::words(group, row, c2, c3, seed);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(words.w[i] >= threshold) << i;
    return bits;
  }
};

// Bits of a fragment whose rows are queries row.. and whose columns are keys column.. (multiples of 8). Two lanes share the
// counters of both their rows: each makes one and hands over two bits.
PTV2_DEVICE uint32_t kept_by_queries(const Draw& draw, int row, int column) {
  const int g = lane() / 4, t = lane() % 4;
  const uint32_t mine = draw.kept(column / 4 + t / 2, row + g + t % 2 * 8), other = shuffle_xor(mine, 1);
  return t % 2 ? (other >> 2) | (mine >> 2) << 2 : (mine & 3) | (other & 3) << 2;
}

// The column, of a fragment whose rows are keys, whose counter this lane makes in kept_by_keys.
PTV2_DEVICE int column_of_draw() { return lane() % 4 * 2 + lane() / 4 % 2; }

// Bits 0, 4, 8 and 12: the numbers of a fragment whose rows are keys row... `query` is the place, in its sequence, of the query
// of column_of_draw(), and the draw that query's. Four lanes share the counters of all four numbers, so each makes one.
PTV2_DEVICE uint32_t kept_by_keys(const Draw& draw, int row, int query) {
  const int g = lane() / 4, t = lane() % 4, m = g % 4;
  const uint32_t mine = draw.kept(row / 4 + m / 2 * 2 + g / 4, query);
  uint32_t of_word = 0;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const uint32_t all = ballot(mine >> word & 1);
    if (m == word) of_word = all;
  }
  return of_word >> t >> g / 4 * 16;
}

// Zeroes what a sequence's own dropout takes from `rows` prefix rows first.. in shared memory.
template <class E, int D, class Layout = Padded<D>>
PTV2_DEVICE void drop_prefix(E* tile, int first, int rows, const Draw& draw) {
  for (int i = thread(); i < rows * (D / 4); i += num_threads()) {
    const int row = i / (D / 4), group = i % (D / 4);
    const uint32_t bits = draw.kept(group, first + row);
    auto* pair = reinterpret_cast<uint32_t*>(tile + Layout::at(row, group * 4));
    pair[0] &= (bits & 1 ? 0xFFFFu : 0u) | (bits & 2 ? 0xFFFF0000u : 0u);
    pair[1] &= (bits & 4 ? 0xFFFFu : 0u) | (bits & 8 ? 0xFFFF0000u : 0u);
  }
}

// Starts copying a sequence's whole prefix of one head to `rows` rows of keys and of values in shared memory.
template <class E, int D>
PTV2_DEVICE void copy_prefix(const Attention& a, E* k, E* v, int rows, const Sequence& of, int column) {
  copy_rows<E, D>(k, rows, static_cast<const E*>(a.prefix_k) + of.prompt * a.prefix_k_prompt + column, 0, a.prefix_k_row,
                  of.num_prefix);
  copy_rows<E, D>(v, rows, static_cast<const E*>(a.prefix_v) + of.prompt * a.prefix_v_prompt + column, 0, a.prefix_v_row,
                  of.num_prefix);
}

// Takes the dropout of one (sequence, head) from a whole prefix. All threads meet here.
template <class E, int D>
PTV2_DEVICE void drop_whole_prefix(const Attention& a, E* k, E* v, int rows, int c2) {
  drop_prefix<E, D>(k, 0, rows, Draw(a, c2, philox::PREFIX_K, a.prefix_threshold));
  drop_prefix<E, D>(v, 0, rows, Draw(a, c2, philox::PREFIX_V, a.prefix_threshold));
  sync();
}

}  // namespace ptv2::cuda
