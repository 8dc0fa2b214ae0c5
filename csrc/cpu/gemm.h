// Small fp32 matrix products for tiles that lie in L1 and L2: C [M, N] = (C +) A [M, K] B [K, N].
// A has two strides, so that A and A^T are the same code. B and C rows are padded to whole vectors: no masks anywhere.
#pragma once

#include "simd.h"

namespace ptv2 {

// MR x NV vectors of C stay in registers over the whole of K: 6 x 4 of 32 registers with AVX-512, 6 x 2 of 16 otherwise.
constexpr int MR = 6;
constexpr int NV = W == 16 ? 4 : 2;

template <int M, int N, bool ADD>
inline void micro(int64_t K, const float* A, int64_t row, int64_t col, const float* B, int64_t ldb, float* C, int64_t ldc) {
  f32v acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[m][n] = ADD ? load(C + m * ldc + n * W) : f32v{};
  for (int64_t k = 0; k < K; ++k) {
    f32v b[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) b[n] = load(B + k * ldb + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const f32v a = broadcast(A[m * row + k * col]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] += a * b[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(C + m * ldc + n * W, acc[m][n]);
}

template <int N, bool ADD, int M = MR>
inline void rows(int m, int64_t K, const float* A, int64_t row, int64_t col, const float* B, int64_t ldb, float* C,
                 int64_t ldc) {
  if (m == M) return micro<M, N, ADD>(K, A, row, col, B, ldb, C, ldc);
  if constexpr (M > 1) rows<N, ADD, M - 1>(m, K, A, row, col, B, ldb, C, ldc);
}

template <bool ADD, int N = NV>
inline void panel(int n, int64_t M, int64_t K, const float* A, int64_t row, int64_t col, const float* B, int64_t ldb, float* C,
                  int64_t ldc) {
  if (n == N) {
    for (int64_t m = 0; m < M; m += MR)
      rows<N, ADD>(static_cast<int>(M - m < MR ? M - m : MR), K, A + m * row, row, col, B, ldb, C + m * ldc, ldc);
    return;
  }
  if constexpr (N > 1) panel<ADD, N - 1>(n, M, K, A, row, col, B, ldb, C, ldc);
}

// N is rounded up to whole vectors. A [M, K] has element strides (row, col).
template <bool ADD>
inline void gemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t row, int64_t col, const float* B, int64_t ldb,
                 float* C, int64_t ldc) {
  for (int64_t n = 0; n < N; n += NV * W) {
    const int64_t left = (N - n + W - 1) / W;
    panel<ADD>(static_cast<int>(left < NV ? left : NV), M, K, A, row, col, B + n, ldb, C + n, ldc);
  }
}

}  // namespace ptv2
