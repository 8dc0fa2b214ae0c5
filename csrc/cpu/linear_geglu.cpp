// The elementwise part of linear_geglu: h = gelu(a) * gate with a and gate the halves of a row of z, and its backward, which
// takes both from z again. A row is read and written once.
#include "gelu.h"
#include "kernels.h"
#include "rows.h"

namespace ptv2 {
namespace {

int64_t grain(const GegluParams& p) { return 1 + 8192 / (p.F + 1); }

template <class T> void fwd(const GegluParams& p) {
  parallel_ranges(p.T, grain(p), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const T *a = static_cast<const T*>(p.z_TG) + t * 2 * p.F, *gate = a + p.F;
      T* h = static_cast<T*>(p.out) + t * p.F;
      for_vectors(p.F, [&](int64_t i, auto n) {
        store_at(h, i, gelu_erf<false>(load_at(a, i, n)).value * load_at(gate, i, n), n);
      });
    }
  });
}

template <class T> void bwd(const GegluParams& p) {
  parallel_ranges(p.T, grain(p), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const T *a = static_cast<const T*>(p.z_TG) + t * 2 * p.F, *gate = a + p.F;
      const T* dh = static_cast<const T*>(p.dh_TF) + t * p.F;
      T *da = static_cast<T*>(p.out) + t * 2 * p.F, *dgate = da + p.F;
      for_vectors(p.F, [&](int64_t i, auto n) {
        const Gelu g = gelu_erf<true>(load_at(a, i, n));
        const f32v d = load_at(dh, i, n);
        store_at(da, i, d * load_at(gate, i, n) * g.derivative, n);
        store_at(dgate, i, d * g.value, n);
      });
    }
  });
}

}  // namespace

void geglu_fwd(const GegluParams& p) { p.dtype == DType::f32 ? fwd<float>(p) : fwd<bf16>(p); }
void geglu_bwd(const GegluParams& p) { p.dtype == DType::f32 ? bwd<float>(p) : bwd<bf16>(p); }

}  // namespace ptv2
