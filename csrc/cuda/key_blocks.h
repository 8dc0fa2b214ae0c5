// A sequence's keys as a kernel that owns queries meets them: block after block, the prefix's first.
#pragma once

#include "tile.h"

namespace ptv2::cuda {

// Which queries a block owns: tile `tile` of sequence b, or, where b is B, a share of the rows past the last sequence. The
// grid's x counts tiles of the longest sequence for B + 1 sequences, its y heads: y and z have no room for many sequences.
struct QueryTile {
  int tiles, tile, b;
  PTV2_DEVICE QueryTile(const Attention& a, int queries)
      : tiles(ceil_div(a.longest, queries)), tile(block_x() % tiles), b(block_x() / tiles) {}
};
inline dim3 query_grid(const Attention& a, int queries) {
  return dim3{static_cast<unsigned>(ceil_div(a.longest, queries)) * (a.B + 1), static_cast<unsigned>(a.N), 1};
}

// A block of keys that a row meets: `count` exist from column `first` on; its scores count scale2, its values value_scale.
struct Keys {
  int first, count;
  float scale2, value_scale;
  Draw draw;  // of the probabilities
};

// The blocks of keys of a sequence, SIZE each: the prefix's, then its own.
template <int SIZE>
struct KeyBlocks {
  const Attention& a;
  const Sequence& s;
  int c2, prefix_blocks, count;
  PTV2_DEVICE KeyBlocks(const Attention& a, const Sequence& s, int b, int n)
      : a(a), s(s), c2(b * a.N + n), prefix_blocks(ceil_div(s.num_prefix, SIZE)),
        count(prefix_blocks + ceil_div(s.length, SIZE)) {}
  PTV2_DEVICE bool prefix(int i) const { return i < prefix_blocks; }
  PTV2_DEVICE Keys at(int i) const {
    const bool in_prefix = prefix(i);
    const int first = (in_prefix ? i : i - prefix_blocks) * SIZE;
    const float value_scale = in_prefix ? a.prefix_scale : 1.0f;
    return {first, (in_prefix ? s.num_prefix : s.length) - first, a.scale * LOG2E * value_scale, value_scale,
            Draw(a, c2, in_prefix ? philox::PREFIX_PROB : philox::TOKEN_PROB, a.threshold)};
  }
  // Starts copying the keys (or values) of block i of head columns column.. into a tile.
  template <class E, int D, class Layout = Padded<D>>
  PTV2_DEVICE void copy(E* tile, int i, bool values, int column) const {
    if (prefix(i)) {
      const int64_t prompt = s.prompt * (values ? a.prefix_v_prompt : a.prefix_k_prompt);
      copy_rows<E, D, Layout>(tile, SIZE, static_cast<const E*>(values ? a.prefix_v : a.prefix_k) + prompt + column, i * SIZE,
                              values ? a.prefix_v_row : a.prefix_k_row, s.num_prefix - i * SIZE);
    } else {
      const int key = (i - prefix_blocks) * SIZE;
      copy_rows<E, D, Layout>(tile, SIZE, static_cast<const E*>(values ? a.v : a.k) + column, s.start + key,
                              values ? a.v_row : a.k_row, s.length - key);
    }
  }
  // Takes from a tile of the prefix what this sequence's own dropout takes.
  template <class E, int D, class Layout = Padded<D>>
  PTV2_DEVICE void drop(E* tile, int i, bool values) const {
    const auto stream = values ? philox::PREFIX_V : philox::PREFIX_K;
    drop_prefix<E, D, Layout>(tile, i * SIZE, SIZE, Draw(a, c2, stream, a.prefix_threshold));
  }
};

}  // namespace ptv2::cuda
