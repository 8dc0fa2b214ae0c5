// In which order a block of the sweep meets keys and queries: Packs where rows are short, Pieces where they are long. A step is a
// tile of QUERIES queries, from `first` on, of the tokens `of` that lie side by side.
#pragma once

#include "tile.h"

namespace ptv2::cuda {

// Whose tokens a strip of 16 keys holds: those of sequence b from its `first` on. length 0: nobody's.
struct Owner {
  int b, first, start, length;
};

// The first sequence that starts at or behind a group's share of the tokens.
PTV2_DEVICE int first_of_group(const Attention& a, int group) {
  if (group >= a.groups) return a.B;
  const int64_t share = static_cast<int64_t>(a.cu_seqlens[a.B]) * group;
  int low = 0, high = a.B;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (static_cast<int64_t>(a.cu_seqlens[middle]) * a.groups < share) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Neighbouring sequences b..end - 1 of one prompt whose strips together fit the block; each group takes those that start in its
// share of the tokens, so that groups have about equal work. A sequence with prefix masks of its own is a pack by itself.
// With SEVERAL false too: rows of more than 128 tokens leave no room for neighbours, and their warps no registers.
template <int QUERIES, bool SEVERAL>
struct Pack {
  int b, end, behind, first = 0;
  Sequence of;  // start and length of all of them together

  PTV2_DEVICE Pack(const Attention& a, int group, int strips, bool)
      : b(first_of_group(a, group)), end(b), behind(first_of_group(a, group + 1)) {
    gather(a, strips);
  }
  PTV2_DEVICE bool done(const Attention&) const { return b >= behind; }
  // To the next tile. True: of another pack.
  PTV2_DEVICE bool advance(const Attention& a, int strips, bool) {
    if ((first += QUERIES) < of.length) return false;
    b = end, first = 0;
    gather(a, strips);
    return true;
  }
  // To where `next` is, but for what reread() brings.
  PTV2_DEVICE void go(const Pack& next) { b = next.b, end = next.end, first = next.first; }
  PTV2_DEVICE void reread(const Attention& a) {
    of = sequence(a, b);
    of.length = a.cu_seqlens[end] - of.start;
  }
  PTV2_DEVICE Owner owner(const Attention& a, int, int strip) const {
    Owner found = {b, strip * 16, of.start, of.length};
    if constexpr (SEVERAL) {
      for (int s = b; s < end; ++s) {
        found.b = s, found.start = a.cu_seqlens[s], found.length = a.cu_seqlens[s + 1] - found.start;
        const int strips = ceil_div(found.length, 16);
        if (strip < strips) return {s, strip * 16, found.start, found.length};
        strip -= strips;
      }
      return {-1, 0, 0, 0};
    }
    return found;
  }
  PTV2_DEVICE int sequence_of(const Attention& a, int token) const {
    int s = b;
    while (SEVERAL && a.cu_seqlens[s + 1] <= token) ++s;
    return s;
  }

 private:
  PTV2_DEVICE void gather(const Attention& a, int strips) {
    while (b < behind && a.cu_seqlens[b + 1] == a.cu_seqlens[b]) ++b;
    if (done(a)) return;
    of = sequence(a, b);
    int used = ceil_div(of.length, 16);
    for (end = b + 1; SEVERAL && end < behind && a.prefix_threshold == 0; ++end) {
      const Sequence more = sequence(a, end);
      used += ceil_div(more.length, 16);
      if (used > strips || more.prompt != of.prompt) break;
      of.length += more.length;
    }
  }
};

// Notes whose tokens a pack's strips hold. All threads meet here.
template <class Step>
PTV2_DEVICE void list_owners(const Attention& a, const Step& step, Owner* owners, int strips) {
  if (thread() < strips) owners[thread()] = step.owner(a, strips, thread());
  sync();
}

// f(row of the strips, column, token, whether there is one) for each piece of 8 columns, dealt out to the threads.
template <int D, class Function>
PTV2_DEVICE void for_pieces(const Owner* owners, int strips, Function f) {
  for (int i = thread(); i < strips * 16 * (D / 8); i += num_threads()) {
    const int at = i / (D / 8);
    const Owner owner = owners[at / 16];
    const int place = owner.first + at % 16;
    const bool valid = place < owner.length;
    f(at, i % (D / 8) * 8, static_cast<int64_t>(valid ? owner.start + place : 0), valid);
  }
}

// Piece `piece`, of `strips` strips, of the keys of sequence b. The pieces of all sequences are dealt out to the groups in turn.
template <int QUERIES>
struct Piece {
  int b, piece, first = 0;
  Sequence of;

  // turns: only the tiles that are this piece's when the pieces share out the tiles.
  PTV2_DEVICE Piece(const Attention& a, int group, int strips, bool turns) : b(0), piece(group) {
    if (!done(a)) of = sequence(a, 0);
    settle(a, strips, turns);
  }
  PTV2_DEVICE bool done(const Attention& a) const { return b >= a.B; }
  PTV2_DEVICE int pieces(int strips) const { return ceil_div(of.length, strips * 16); }
  PTV2_DEVICE bool its_turn(int strips) const { return first / QUERIES % pieces(strips) == piece; }
  PTV2_DEVICE bool advance(const Attention& a, int strips, bool turns) {
    first += turns ? QUERIES * pieces(strips) : QUERIES;
    if (first < of.length) return false;
    piece += a.groups;
    settle(a, strips, turns);
    return true;
  }
  PTV2_DEVICE void go(const Piece& next) { b = next.b, piece = next.piece, first = next.first; }
  PTV2_DEVICE void reread(const Attention& a) { of = sequence(a, b); }
  PTV2_DEVICE int sequence_of(const Attention&, int) const { return b; }
  PTV2_DEVICE Owner owner(const Attention&, int strips, int strip) const {
    const int first_key = (piece * strips + strip) * 16;
    return {b, first_key, of.start, of.length};
  }

 private:
  PTV2_DEVICE void settle(const Attention& a, int strips, bool turns) {
    while (!done(a) && piece >= pieces(strips)) {
      piece -= pieces(strips);
      if (++b < a.B) of = sequence(a, b);
    }
    first = turns ? piece * QUERIES : 0;
  }
};

}  // namespace ptv2::cuda
