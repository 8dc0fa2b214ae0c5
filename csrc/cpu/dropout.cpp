// y = x * keep / (1 - p), a row at a time: x is read and y written once, the row's mask stays in cache.
#include "kernels.h"
#include "philox_simd.h"
#include "rows.h"

namespace ptv2 {
namespace {

template <class T> void run(const DropoutParams& p) {
  parallel_ranges(p.T, 1 + 32768 / (p.H + 1), [&](int64_t first, int64_t last) {
    float* keep = thread_scratch(p.H + KEEP_SLACK);
    for (int64_t t = first; t < last; ++t) {
      const T* x = static_cast<const T*>(p.x_TH) + t * p.H;
      T* y = static_cast<T*>(p.y_TH) + t * p.H;
      keep_row(keep, p.H, static_cast<uint32_t>(t), 0, philox::HIDDEN, p.dropout);
      for_vectors(p.H, [&](int64_t i, auto n) { store_at(y, i, load_at(x, i, n) * load_at(keep, i, n), n); });
    }
  });
}

}  // namespace

void dropout(const DropoutParams& p) { p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace ptv2
