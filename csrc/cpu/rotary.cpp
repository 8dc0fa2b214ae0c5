// Rotary position embeddings on the queries and keys of a fused projection, in place: q and k are read and written once, v is
// not touched.
#include "kernels.h"
#include "rows.h"

namespace ptv2 {
namespace {

template <class T> void run(const RotaryParams& p) {
  const int64_t half = p.D / 2, heads = 2 * p.N;  // those of q and of k, one behind the other
  const float sign = p.inverse ? -1.0f : 1.0f;
  parallel_ranges(p.T, 1 + 16384 / (heads * p.D), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const float *cos = p.cos_sin_LD + p.positions_T[t] * p.D, *sin = cos + half;
      T* row = static_cast<T*>(p.qkv_T3ND) + t * 3 * p.N * p.D;
      for_vectors(half, [&](int64_t i, auto n) {
        const f32v c = load_at(cos, i, n), s = load_at(sin, i, n) * sign;
        for (T* x = row; x < row + heads * p.D; x += p.D) {
          const f32v x1 = load_at(x, i, n), x2 = load_at(x + half, i, n);
          store_at(x, i, x1 * c - x2 * s, n);
          store_at(x + half, i, x2 * c + x1 * s, n);
        }
      });
    }
  });
}

}  // namespace

void rotary(const RotaryParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace ptv2
