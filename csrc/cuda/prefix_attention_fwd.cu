// Prefix attention, forward: forward_block.h with mma.sync, a warp by itself.
//
// HBM: q, k, v read once where a sequence fits one query tile (again from L2 for each further one), out and lse written once.
// Rows of up to 64 tokens: forward_short.h.
#include "dispatch.h"
#include "forward_block.h"
#include "forward_short.h"

namespace ptv2::cuda {

// Four warps, each by itself.
template <class E, int D>
struct WarpProducts {
  using Layout = Padded<D>;
  static constexpr int QUERIES = 64, THREADS = 128, GROUP = 1, ROW_ELEMENTS = ROW<D>, ALIGNMENT = 0;
  PTV2_DEVICE static unsigned char* aligned(unsigned char* memory) { return memory; }
  PTV2_DEVICE static void publish() {}
  PTV2_DEVICE static void attend(ForwardRow<E, D>& row, const uint32_t (&q)[D / 16][4], const E* k, const E* v, const Keys& keys,
                                 int query) {
    cuda::attend(row, q, k, v, keys, query);
  }
};

template <class E, int D>
PTV2_KERNEL((WarpProducts<E, D>::THREADS), D <= 96 ? 3 : 2) forward_kernel(const Attention a) {
  forward_block<E, D, WarpProducts<E, D>>(a);
}

template <class E, int D>
int forward(const Attention& a, void* stream) {
  if (a.longest <= KEYS) return forward_short<E, D>(a, stream);
  using Products = WarpProducts<E, D>;
  return launch(forward_kernel<E, D>, query_grid(a, Products::QUERIES), Products::THREADS, BLOCK_SHARED<D, Products>, stream, a);
}

}  // namespace ptv2::cuda

int ptv2_cuda_prefix_attention_fwd(const ptv2::cuda::Attention* arguments, void* stream) {
  using namespace ptv2::cuda;
  const Attention a = without_stray_lengths(*arguments);
  if (a.wide) return forward_wide(a, stream);
  return dispatch(a, [&](auto element, auto D) { return forward<decltype(element), D>(a, stream); });
}
