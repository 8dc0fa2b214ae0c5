// x = dropout(LayerNorm(word[id] + position[pos] + type[tt])): the rows are gathered, summed in fp32 and normalised in one go.
#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "philox_simd.h"
#include "rows.h"

namespace ptv2 {
namespace {

template <class T> int64_t run(const EmbeddingParams& p) {
  const int64_t E = p.E;
  std::atomic<int64_t> bad{p.T};
  parallel_ranges(p.T, 1 + 32768 / (E + 1), [&](int64_t first, int64_t last) {
    float* row = thread_scratch(2 * E + KEEP_SLACK);
    float* keep = row + E;
    for (int64_t t = first; t < last; ++t) {
      const int64_t word = p.word_ids_T[t], position = p.position_ME ? p.position_ids_T[t] : 0;
      const int64_t type = p.type_UE && p.token_type_ids_T ? p.token_type_ids_T[t] : 0;
      if (word < 0 || word >= p.V || (p.position_ME && (position < 0 || position >= p.M)) ||
          (p.type_UE && (type < 0 || type >= p.U))) {
        for (int64_t seen = bad.load(); t < seen && !bad.compare_exchange_weak(seen, t);) {}
        return;
      }
      const T* a = static_cast<const T*>(p.word_VE) + word * E;
      const T* b = p.position_ME ? static_cast<const T*>(p.position_ME) + position * E : nullptr;
      const T* c = p.type_UE ? static_cast<const T*>(p.type_UE) + type * E : nullptr;
      for_vectors(E, [&](int64_t i, auto n) {
        f32v x = load_at(a, i, n);
        if (b) x += load_at(b, i, n);
        if (c) x += load_at(c, i, n);
        store_at(row, i, x, n);
      });
      const Moments m = moments(row, E, p.eps);
      T* out = static_cast<T*>(p.x_TE) + t * E;
      if (p.dropout.on) keep_row(keep, E, static_cast<uint32_t>(t), 0, philox::HIDDEN, p.dropout);
      for_vectors(E, [&](int64_t i, auto n) {
        f32v y = (load_at(row, i, n) - m.mean) * m.rstd * load_at(p.weight_E, i, n) + load_at(p.bias_E, i, n);
        if (p.dropout.on) y *= load_at(keep, i, n);
        store_at(out, i, y, n);
      });
    }
  });
  return bad == p.T ? -1 : bad.load();
}

}  // namespace

int64_t embedding(const EmbeddingParams& p) { return p.dtype == DType::f32 ? run<float>(p) : run<bf16>(p); }

}  // namespace ptv2
