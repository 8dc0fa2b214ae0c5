// What register.cpp calls, and how kernels use threads. Kernels see raw pointers only, so that they compile in seconds.
#pragma once

#include <cstdint>

#include "ptv2/params.h"

namespace ptv2 {

int64_t embedding(const EmbeddingParams& p);  // -1, or the first token whose id lies outside its table
void add_norm_fwd(const AddNormParams& p);
void add_norm_bwd(const AddNormBwdParams& p);
void renorm(const RenormParams& p);
void gelu_fwd(const GeluParams& p);
void gelu_bwd(const GeluBwdParams& p);
void geglu_fwd(const GegluParams& p);
void geglu_bwd(const GegluParams& p);
void rotary(const RotaryParams& p);
void dropout(const DropoutParams& p);
void dequantise(const DequantiseParams& p);
void prefix_attention_fwd(const PrefixAttentionParams& p);  // disentangled_attention too, when p.slots is given
void prefix_attention_bwd(const PrefixAttentionBwdParams& p);

// parallel.cpp: at::parallel_for behind a torch-free face.
using TaskFn = void (*)(const void* closure, int64_t first, int64_t last);
void run_ranges(int64_t count, int64_t grain, const void* closure, TaskFn fn);  // contiguous ranges, one a thread
void run_tasks(int64_t count, const void* closure, TaskFn fn);                  // one index at a time to whichever thread is free

template <class F> void parallel_ranges(int64_t count, int64_t grain, const F& f) {
  run_ranges(count, grain, &f, [](const void* g, int64_t a, int64_t b) { (*static_cast<const F*>(g))(a, b); });
}
template <class F> void parallel_tasks(int64_t count, const F& f) {
  run_tasks(count, &f, [](const void* g, int64_t a, int64_t) { (*static_cast<const F*>(g))(a); });
}

// Aligned floats that stay with the thread between calls; grows to the largest request of the thread.
float* thread_scratch(int64_t floats);

}  // namespace ptv2
