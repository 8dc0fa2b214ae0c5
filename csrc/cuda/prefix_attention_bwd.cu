// Prefix attention, backward: its entry, and the sum of the partials. The sweeps themselves: sweep_instance.cu.
#include "dispatch.h"
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

#ifndef PTV2_EMULATE
#define PTV2_ELSEWHERE(D)                                             \
  extern template int sweep_of<Bf16, D>(const Attention&, void*);    \
  extern template int sweep_of<Fp16, D>(const Attention&, void*);
PTV2_ELSEWHERE(32)
PTV2_ELSEWHERE(64)
PTV2_ELSEWHERE(80)
PTV2_ELSEWHERE(96)
PTV2_ELSEWHERE(128)
#undef PTV2_ELSEWHERE
#endif

}  // namespace ptv2::cuda

int ptv2_cuda_prefix_attention_bwd(const ptv2::cuda::Attention* arguments, void* stream) {
  using namespace ptv2::cuda;
  const Attention a = without_stray_lengths(*arguments);
  const int code = dispatch(a, [&](auto element, auto D) { return sweep_of<decltype(element), D>(a, stream); });
  if (code != SUCCESS || a.partial == nullptr) return code;
  const int64_t size = static_cast<int64_t>(a.K) * a.P * a.N * a.D;
  return launch(reduce_kernel, dim3{static_cast<unsigned>((size + 255) / 256), 2, 1}, 256, 0, stream, a);
}
