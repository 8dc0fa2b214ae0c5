// Prefix attention, forward, of long rows on sm_90a: forward_block.h with two warpgroups of 64 queries, whose products are
// wgmma's. Queries and probabilities are left factors in registers, so that each product reads one factor only
// from shared memory: keys as they lie, values transposed. Long rows are bound by products, whose full rate mma.sync misses.
#include "device_sm90.h"
#include "forward_block.h"

namespace ptv2::cuda {

// Two warpgroups of four warps, each of which multiplies together.
template <class E, int D>
struct GroupProducts {
  using Layout = Swizzled<KEYS>;
  static constexpr int QUERIES = 128, THREADS = 256, GROUP = 4, ROW_ELEMENTS = D, ALIGNMENT = 1024;
  PTV2_DEVICE static unsigned char* aligned(unsigned char* memory) {
    return memory + (ALIGNMENT - shared_address(memory) % ALIGNMENT) % ALIGNMENT;
  }
  PTV2_DEVICE static void publish() { cuda::publish(); }
  PTV2_DEVICE static void attend(ForwardRow<E, D>& row, const uint32_t (&q)[D / 16][4], const E* k, const E* v, const Keys& keys,
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
};

template <class E, int D>
PTV2_KERNEL((GroupProducts<E, D>::THREADS), D == 64 ? 2 : 1) wide_forward_kernel(const Attention a) {
  forward_block<E, D, GroupProducts<E, D>>(a);
}

template <class E, int D>
int forward_wide(const Attention& a, void* stream) {
  using Products = GroupProducts<E, D>;
  return launch(wide_forward_kernel<E, D>, query_grid(a, Products::QUERIES), Products::THREADS, BLOCK_SHARED<D, Products>, stream,
                a);
}

int forward_wide(const Attention& a, void* stream) {
  const bool bf16 = a.element == Element::bf16;
  if (a.D == 64) return bf16 ? forward_wide<Bf16, 64>(a, stream) : forward_wide<Fp16, 64>(a, stream);
  if (a.D == 128) return bf16 ? forward_wide<Bf16, 128>(a, stream) : forward_wide<Fp16, 128>(a, stream);
  return INVALID_VALUE;
}

}  // namespace ptv2::cuda
