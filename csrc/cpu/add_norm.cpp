// y = LayerNorm(dropout(x) + residual) * weight + bias, one row at a time: the row stays in L1 between its passes, so memory
// sees 2 reads and 2 writes forward (y, xhat), 2 reads and 1 write backward (2 with dropout); the sum of a pre-LN residual
// stream is one write more forward, and its gradient one read more backward. xhat in int8 halves its bytes.
#include <algorithm>

#include "kernels.h"
#include "philox_simd.h"
#include "rows.h"

namespace ptv2 {
namespace {

// x_hat as it is saved: in T, or as int8 codes with one scale for XHAT_BLOCK columns, the block's largest magnitude / 127.
PTV2_INLINE void put_code(int8_t* codes, int64_t i, f32v v, int n) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const u8v narrow = narrow8(bits_as<u32v>(v + ROUND));
  std::memcpy(codes + i, &narrow, n);
}
PTV2_INLINE f32v get_code(const int8_t* codes, int64_t i, int n) {
  u8v narrow{};
  std::memcpy(&narrow, codes + i, n);
  return __builtin_convertvector(bits_as<i32v>(widen8(narrow) << 24) >> 24, f32v);
}
PTV2_INLINE f32v saved(const float* xhat, const float*, int64_t i, std::integral_constant<int, W> n) { return load_at(xhat, i, n); }
PTV2_INLINE f32v saved(const float* xhat, const float*, int64_t i, int n) { return load_at(xhat, i, n); }
PTV2_INLINE f32v saved(const bf16* xhat, const float*, int64_t i, std::integral_constant<int, W> n) { return load_at(xhat, i, n); }
PTV2_INLINE f32v saved(const bf16* xhat, const float*, int64_t i, int n) { return load_at(xhat, i, n); }
PTV2_INLINE f32v saved(const int8_t* xhat, const float* scales, int64_t i, int n) {
  return get_code(xhat, i, n) * scales[i / XHAT_BLOCK];
}

int64_t blocks_of(int64_t H) { return (H + XHAT_BLOCK - 1) / XHAT_BLOCK; }

void quantise_row(const float* hat, int64_t H, int8_t* codes, float* scales) {
  for (int64_t first = 0; first < H; first += XHAT_BLOCK) {
    const int64_t count = std::min(XHAT_BLOCK, H - first);
    f32v largest{};
    for_vectors(count, [&](int64_t i, auto n) {
      const f32v v = load_at(hat, first + i, n);
      largest = max(largest, v < 0.0f ? -v : v);
    });
    const float top = max(largest), scale = top / 127.0f;
    scales[first / XHAT_BLOCK] = scale;
    const float inverse = scale > 0.0f ? 127.0f / top : 0.0f;
    for_vectors(count, [&](int64_t i, auto n) { put_code(codes, first + i, load_at(hat, first + i, n) * inverse, n); });
  }
}

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
      T* xhat = p.xhat_TH && !p.scales ? static_cast<T*>(p.xhat_TH) + t * H : nullptr;
      if (p.xhat_TH) p.rstd_T[t] = m.rstd;
      for_vectors(H, [&](int64_t i, auto n) {
        const f32v hat = (load_at(row, i, n) - m.mean) * m.rstd;
        if (xhat) store_at(xhat, i, hat, n);
        if (p.scales) store_at(row, i, hat, n);
        store_at(y, i, hat * load_at(p.weight_H, i, n) + load_at(p.bias_H, i, n), n);
      });
      if (p.scales) quantise_row(row, H, static_cast<int8_t*>(p.xhat_TH) + t * H, p.scales + t * blocks_of(H));
    }
  });
}

// With g = dy * weight: dresidual = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum; dx is its dropout.
template <class T, class X> void bwd(const AddNormBwdParams& p) {
  const int64_t H = p.H, blocks = p.scales ? blocks_of(H) : 0;
  parallel_ranges(p.T, 1 + 32768 / (H + 1), [&](int64_t first, int64_t last) {
    float* keep = thread_scratch(H + KEEP_SLACK);
    for (int64_t t = first; t < last; ++t) {
      const T* dy = static_cast<const T*>(p.dy_TH) + t * H;
      const X* xhat = static_cast<const X*>(p.xhat_TH) + t * H;
      const float* scales = p.scales + t * blocks;
      f32v sum_g{}, sum_gx{};
      for_vectors(H, [&](int64_t i, auto n) {
        const f32v g = load_at(dy, i, n) * load_at(p.weight_H, i, n);
        sum_g += g;
        sum_gx += g * saved(xhat, scales, i, n);
      });
      const float mean_g = sum(sum_g) / static_cast<float>(H), mean_gx = sum(sum_gx) / static_cast<float>(H);
      const float rstd = p.rstd_T[t];
      const T* dsum = p.dsum_TH ? static_cast<const T*>(p.dsum_TH) + t * H : nullptr;
      T* dresidual = static_cast<T*>(p.dresidual_TH) + t * H;
      T* dx = p.dx_TH ? static_cast<T*>(p.dx_TH) + t * H : nullptr;
      if (dx) keep_row(keep, H, static_cast<uint32_t>(t), 0, philox::HIDDEN, p.dropout);
      for_vectors(H, [&](int64_t i, auto n) {
        const f32v g = load_at(dy, i, n) * load_at(p.weight_H, i, n);
        f32v d = (g - mean_g - saved(xhat, scales, i, n) * mean_gx) * rstd;
        if (dsum) d += load_at(dsum, i, n);
        store_at(dresidual, i, d, n);
        if (dx) store_at(dx, i, d * load_at(keep, i, n), n);
      });
    }
  });
}

template <class T> void bwd(const AddNormBwdParams& p) { p.scales ? bwd<T, int8_t>(p) : bwd<T, T>(p); }

template <class T, class X> void again(const RenormParams& p) {
  const int64_t H = p.H, blocks = p.scales ? blocks_of(H) : 0;
  parallel_ranges(p.T, 1 + 32768 / (H + 1), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const X* xhat = static_cast<const X*>(p.xhat_TH) + t * H;
      const float* scales = p.scales + t * blocks;
      T* y = static_cast<T*>(p.y_TH) + t * H;
      for_vectors(H, [&](int64_t i, auto n) {
        store_at(y, i, saved(xhat, scales, i, n) * load_at(p.weight_H, i, n) + load_at(p.bias_H, i, n), n);
      });
    }
  });
}
template <class T> void again(const RenormParams& p) { p.scales ? again<T, int8_t>(p) : again<T, T>(p); }

}  // namespace

void add_norm_fwd(const AddNormParams& p) { p.dtype == DType::f32 ? fwd<float>(p) : fwd<bf16>(p); }
void add_norm_bwd(const AddNormBwdParams& p) { p.dtype == DType::f32 ? bwd<float>(p) : bwd<bf16>(p); }
void renorm(const RenormParams& p) { p.dtype == DType::f32 ? again<float>(p) : again<bf16>(p); }

}  // namespace ptv2
