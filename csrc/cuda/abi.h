// What the CUDA kernels are called with: plain pointers and a stream, no torch header, so that nvcc alone builds them.
// T tokens, B sequences, N heads, D head dim, P prompt rows, K prompts; strides in elements. Every pointer is device memory.
#pragma once

#include <cstdint>

namespace ptv2::cuda {

enum class Element : int32_t { bf16 = 0, fp16 = 1 };

// The same fields in the same order as ptv2_engine/_cuda.py's ctypes structure.
struct Attention {
  const void *q, *k, *v;                 // [T, N, D], N and D contiguous, rows and base aligned to 16 bytes
  const void *prefix_k, *prefix_v;       // [K, P, N, D], N and D contiguous; null: no prefix
  const int32_t* cu_seqlens;             // [B + 1]
  const int32_t* prompt_ids;             // [B]; null: prompt 0
  const int32_t* prompt_lengths;         // [K], rows in use; null: P
  const int64_t* seed;                   // [1]; null without dropout
  void* out;                             // [T, N, D]; backward: null, or what forward made
  float* lse;                            // [N, T], natural logarithm
  const void* dout;                      // [T, N, D]
  void* dqkv;                            // [T, 3, N, D]; null: the tokens' gradients are not wanted
  float* partial;                        // [2, groups, K, P, N, D]; null: the prefix's gradient is not wanted
  float *dprefix_k, *dprefix_v;          // [K, P, N, D]
  float* delta;                          // [N, T], rowsum(P * dP) of rows too long for one sweep

  int64_t q_row, k_row, v_row, prefix_k_prompt, prefix_k_row, prefix_v_prompt, prefix_v_row;
  int32_t T, B, N, D, P, K, longest, groups;
  float scale, keep_scale, prefix_scale;  // of the scores; 1 / (1 - p) of both dropouts
  uint32_t threshold, prefix_threshold;   // the smallest Philox word that is kept (ptv2/philox.h); 0: no dropout
  uint32_t site;
  Element element;
  int32_t wide;                           // 1: the forward of long rows, sm_90a only, D 64 or 128
};

int forward_wide(const Attention& arguments, void* stream);
int query_gradients(const Attention& arguments, void* stream);  // delta and dq of long rows

}  // namespace ptv2::cuda

#define PTV2_EXPORT __attribute__((visibility("default")))

// 0 or a cudaError_t, whose words ptv2_cuda_error gives. A shape that no instance takes is cudaErrorInvalidValue.
extern "C" {
PTV2_EXPORT int ptv2_cuda_prefix_attention_fwd(const ptv2::cuda::Attention* arguments, void* stream);
PTV2_EXPORT int ptv2_cuda_prefix_attention_bwd(const ptv2::cuda::Attention* arguments, void* stream);
PTV2_EXPORT const char* ptv2_cuda_error(int code);
PTV2_EXPORT int ptv2_cuda_arguments_size();
PTV2_EXPORT int ptv2_cuda_driver_version();   // 1000 * major + 10 * minor: the newest CUDA that the driver runs
PTV2_EXPORT int ptv2_cuda_runtime_version();  // the CUDA these kernels were built with
}
