// The arguments of every op as plain structs: pointers, sizes, strides in elements. No torch header below csrc/include.
// T tokens, B sequences, N heads, D head dim, P prompt rows, K prompts, H hidden, F ffn, E embedding size.
#pragma once

#include <cstdint>

namespace ptv2 {

enum class DType : int { f32 = 0, bf16 = 1 };

// Dropout with probability p at one call site: an element is kept when its Philox word is >= threshold (philox.h).
struct Dropout {
  bool on = false;
  uint64_t seed = 0;
  uint32_t site = 0;
  uint32_t threshold = 0;
  float scale = 1.0f;  // 1 / (1 - p)
};

struct EmbeddingParams {
  DType dtype;
  const int64_t* word_ids_T;
  const int64_t* position_ids_T;
  const int64_t* token_type_ids_T;  // null: row 0
  const void *word_VE, *position_ME, *type_UE;  // position, type: null when the family has no such table
  int64_t V, M, U;
  const float *weight_E, *bias_E;
  void* x_TE;
  int64_t T, E;
  float eps;
  Dropout dropout;
};

constexpr int64_t XHAT_BLOCK = 64;  // columns of an int8 x_hat that share a scale

struct AddNormParams {
  DType dtype;
  const void *x_TH, *residual_TH;
  const float *weight_H, *bias_H;
  void *y_TH, *xhat_TH;  // xhat, rstd: null when nothing is saved
  float *rstd_T, *scales;  // scales: [T, ceil(H / XHAT_BLOCK)] where xhat is int8, else null
  void* sum_TH;          // dropout(x) + residual; null when it is not wanted
  int64_t T, H;
  float eps;
  Dropout dropout;
};

struct AddNormBwdParams {
  DType dtype;
  const void *dy_TH, *dsum_TH, *xhat_TH;  // dsum: null when the sum had no other reader
  const float *rstd_T, *scales, *weight_H;
  void *dresidual_TH, *dx_TH;  // dx: null without dropout, where it equals dresidual
  int64_t T, H;
  Dropout dropout;
};

// y = xhat * weight + bias from what add_norm saved.
struct RenormParams {
  DType dtype;
  const void* xhat_TH;
  const float *scales, *weight_H, *bias_H;
  void* y_TH;
  int64_t T, H;
};

struct GeluParams {
  DType dtype;
  void* z;            // in place: z <- gelu(z)
  void* derivative;   // f32: float; bf16: uint8 code (gelu_code.h); null when nothing is saved
  int64_t count;
  bool tanh;
  int64_t quarter;    // 6 bits: F / 4, derivative is [T, 3, F / 4] bytes (gelu_code.h); 8 bits: 0
};

struct GeluBwdParams {
  DType dtype;
  const void *dh, *derivative;
  void* dz;
  int64_t count, quarter;
};

// h = gelu(z[:, :F]) * z[:, F:], gelu with erf.
struct GegluParams {
  DType dtype;
  const void* z_TG;   // G = 2F
  const void* dh_TF;  // backward only
  void* out;          // h [T, F], or dz [T, G]
  int64_t T, F;
};

// In place on the first two of three parts of a row: with x1, x2 the halves of a head, x1 <- x1 cos - x2 sin, x2 <- x2 cos +
// x1 sin. cos_sin row: cos [D / 2], then sin [D / 2].
struct RotaryParams {
  DType dtype;
  void* qkv_T3ND;
  const float* cos_sin_LD;
  const int64_t* positions_T;
  int64_t T, N, D;
  bool inverse;  // by the negative angle
};

struct DropoutParams {
  DType dtype;
  const void* x_TH;
  void* y_TH;
  int64_t T, H;
  Dropout dropout;
};

enum class Quantisation : int { int8 = 0, fp8 = 1, nf4 = 2 };

// A frozen weight [rows, columns] from its codes. int8, fp8 (e4m3fn): a byte a weight, a scale a row. nf4: two weights a byte,
// the first in the high nibble, a scale for every 64 of the flattened weight.
struct DequantiseParams {
  DType dtype;
  Quantisation kind;
  const void* codes;
  const float* scales;
  void* out;
  int64_t rows, columns;
};

// A run of sequences of one prompt, at positions [first, last) of PrefixAttentionParams::order_B: the unit that partial sums
// of the prefix's gradient belong to. The split depends on the batch alone, never on the number of threads.
struct Chunk {
  int32_t prompt, first, last;
};

struct PrefixAttentionParams {
  DType dtype;
  const void *q, *k, *v;                            // [T, N, D], N and D contiguous
  int64_t q_row, k_row, v_row;                      // row strides
  const void *prefix_k, *prefix_v;                  // [K, P, N, D] or null, N and D contiguous
  int64_t prefix_k_prompt, prefix_k_row, prefix_v_prompt, prefix_v_row;
  const int32_t* cu_seqlens;                        // [B + 1]
  const int32_t* prompt_lengths;                    // [K], rows in use
  const int32_t* order_B;                           // sequences in the chunks' order
  const Chunk* chunks;
  int64_t num_chunks, B, T, N, D, P, K, longest;    // longest: tokens of the longest sequence
  float scale;
  Dropout dropout, prefix_dropout;
  // Query t of sequence b sees the tokens below context_B[b] and those in [key_range[2t], key_range[2t + 1]), counted inside
  // its sequence and clipped to it. Null, both: all of them.
  const int32_t *context_B, *key_range_T2;
  // disentangled_attention only: tables [R, N, D], contiguous, each null when that term is absent, and the row of distance
  // i - j at slots[i - j], for all distances below `longest`. It has no key ranges.
  const void *rel_k_RND, *rel_q_RND;
  const int32_t* slots;
  void* out_TND;                                    // contiguous
  float* lse_NT;
};

struct PrefixAttentionBwdParams {
  PrefixAttentionParams fwd;  // out_TND is not used: delta comes from the row itself
  const void* dout_TND;       // contiguous
  void* dqkv_T3ND;            // null: the tokens' gradients are not wanted
  float* partial_k;           // [num_chunks, P, N, D] each; null: the prefix's gradient is not wanted
  float* partial_v;
  float *dprefix_k, *dprefix_v;  // [K, P, N, D]
};

}  // namespace ptv2
