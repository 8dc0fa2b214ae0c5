// Prefix attention, backward: its entry, the sum of the partials, and the sweeps of bf16.
#include "sweep.h"

namespace ptv2::cuda {

// dprefix = the groups' partials, added in their order. A grid of (elements, dK or dV).
PTV2_KERNEL(256, 1) reduce_kernel(const Attention a) {
  const int64_t size = static_cast<int64_t>(a.K) * a.P * a.N * a.D;
  const int64_t i = static_cast<int64_t>(block_x()) * num_threads() + thread();
  if (i >= size) return;
  const float* part = a.partial + block_y() * a.groups * size + i;
  float sum = 0;
  for (int g = 0; g < a.groups; ++g) sum += part[g * size];
  (block_y() == 0 ? a.dprefix_k : a.dprefix_v)[i] = sum;
}

extern template int backward_of<Fp16>(const Attention&, void*);
template int backward_of<Bf16>(const Attention&, void*);

}  // namespace ptv2::cuda

int ptv2_cuda_prefix_attention_bwd(const ptv2::cuda::Attention* a, void* stream) {
  using namespace ptv2::cuda;
  const int code = a->element == Element::bf16 ? backward_of<Bf16>(*a, stream) : backward_of<Fp16>(*a, stream);
  if (code != SUCCESS || a->partial == nullptr) return code;
  const int64_t size = static_cast<int64_t>(a->K) * a->P * a->N * a->D;
  return launch(reduce_kernel, dim3{static_cast<unsigned>((size + 255) / 256), 2, 1}, 256, 0, stream, *a);
}
