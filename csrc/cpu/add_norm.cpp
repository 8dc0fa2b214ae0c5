// y = LayerNorm(dropout(x) + residual) * weight + bias, one row at a time: the row stays in L1 between its passes, so memory
// sees 2 reads and 2 writes forward (y, xhat), 2 reads and 1 write backward (2 with dropout); the sum of a pre-LN residual
// stream is one write more forward, and its gradient one read more backward.
#include "kernels.h"
#include "philox_simd.h"
#include "rows.h"

namespace ptv2 {
namespace {

template <class T> void fwd(const AddNormParams& p) {
  const int64_t H = p.H;
  parallel_ranges(p.T, 1 + 32768 / (H + 1), [&](int64_t first, int64_t last) {
    float* row = thread_scratch(2 * H + KEEP_SLACK);
    float* keep = row + H;
    for (int64_t t = first; t < last; ++t) {
      const T* x = static_cast<const T*>(p.x_TH) + t * H;
      const T* residual = static_cast<const T*>(p.residual_TH) + t * H;
      if (p.dropout.on) {
        keep_row(keep, H, static_cast<uint32_t>(t), 0, philox::HIDDEN, p.dropout);
        for_vectors(H, [&](int64_t i, auto n) {
          store_at(row, i, load_at(x, i, n) * load_at(keep, i, n) + load_at(residual, i, n), n);
        });
      } else {
        for_vectors(H, [&](int64_t i, auto n) { store_at(row, i, load_at(x, i, n) + load_at(residual, i, n), n); });
      }
      if (p.sum_TH) {
        T* total = static_cast<T*>(p.sum_TH) + t * H;
        for_vectors(H, [&](int64_t i, auto n) { store_at(total, i, load_at(row, i, n), n); });
      }
      const Moments m = moments(row, H, p.eps);
      T* y = static_cast<T*>(p.y_TH) + t * H;
      T* xhat = p.xhat_TH ? static_cast<T*>(p.xhat_TH) + t * H : nullptr;
      if (xhat) p.rstd_T[t] = m.rstd;
      for_vectors(H, [&](int64_t i, auto n) {
        const f32v hat = (load_at(row, i, n) - m.mean) * m.rstd;
        if (xhat) store_at(xhat, i, hat, n);
        store_at(y, i, hat * load_at(p.weight_H, i, n) + load_at(p.bias_H, i, n), n);
      });
    }
  });
}

// With g = dy * weight: dresidual = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum; dx is its dropout.
template <class T> void bwd(const AddNormBwdParams& p) {
  const int64_t H = p.H;
  parallel_ranges(p.T, 1 + 32768 / (H + 1), [&](int64_t first, int64_t last) {
    float* keep = thread_scratch(H + KEEP_SLACK);
    for (int64_t t = first; t < last; ++t) {
      const T* dy = static_cast<const T*>(p.dy_TH) + t * H;
      const T* xhat = static_cast<const T*>(p.xhat_TH) + t * H;
      f32v sum_g{}, sum_gx{};
      for_vectors(H, [&](int64_t i, auto n) {
        const f32v g = load_at(dy, i, n) * load_at(p.weight_H, i, n);
        sum_g += g;
        sum_gx += g * load_at(xhat, i, n);
      });
      const float mean_g = sum(sum_g) / static_cast<float>(H), mean_gx = sum(sum_gx) / static_cast<float>(H);
      const float rstd = p.rstd_T[t];
      const T* dsum = p.dsum_TH ? static_cast<const T*>(p.dsum_TH) + t * H : nullptr;
      T* dresidual = static_cast<T*>(p.dresidual_TH) + t * H;
      T* dx = p.dx_TH ? static_cast<T*>(p.dx_TH) + t * H : nullptr;
      if (dx) keep_row(keep, H, static_cast<uint32_t>(t), 0, philox::HIDDEN, p.dropout);
      for_vectors(H, [&](int64_t i, auto n) {
        const f32v g = load_at(dy, i, n) * load_at(p.weight_H, i, n);
        f32v d = (g - mean_g - load_at(xhat, i, n) * mean_gx) * rstd;
        if (dsum) d += load_at(dsum, i, n);
        store_at(dresidual, i, d, n);
        if (dx) store_at(dx, i, d * load_at(keep, i, n), n);
      });
    }
  });
}

}  // namespace

void add_norm_fwd(const AddNormParams& p) { p.dtype == DType::f32 ? fwd<float>(p) : fwd<bf16>(p); }
void add_norm_bwd(const AddNormBwdParams& p) { p.dtype == DType::f32 ? bwd<float>(p) : bwd<bf16>(p); }

}  // namespace ptv2
