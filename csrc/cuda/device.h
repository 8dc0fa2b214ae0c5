// The instructions of sm_80 and later that the kernels use, each under a name. tests/cuda/emulator.h stands in for this file
// where there is no GPU: the same kernels, compiled by a C++ compiler, then run lane by lane on the CPU.
#pragma once

#ifdef PTV2_EMULATE
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#define PTV2_DEVICE __device__ __forceinline__
// A kernel of at most `threads` a block, compiled so that `blocks` of them fit a multiprocessor's registers.
#define PTV2_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace ptv2::cuda {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

PTV2_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
PTV2_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

PTV2_DEVICE int thread() { return threadIdx.x; }
PTV2_DEVICE int lane() { return threadIdx.x % 32; }
// The same in all lanes, and known to be: branches on it are uniform.
PTV2_DEVICE int warp() { return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0); }
PTV2_DEVICE int num_threads() { return blockDim.x; }
PTV2_DEVICE int block_x() { return blockIdx.x; }
PTV2_DEVICE int block_y() { return blockIdx.y; }

PTV2_DEVICE void sync() { __syncthreads(); }
PTV2_DEVICE void sync_warp() { __syncwarp(); }
template <class X>
PTV2_DEVICE X shuffle(X x, int from) { return __shfl_sync(0xFFFFFFFFu, x, from); }
template <class X>
PTV2_DEVICE X shuffle_xor(X x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
PTV2_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xFFFFFFFFu, x); }

// 16 bytes from global to shared memory behind the threads' backs (cp.async); zeros where valid is false, and nothing is read.
PTV2_DEVICE void copy16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0));
}
PTV2_DEVICE void commit() { asm volatile("cp.async.commit_group;\n"); }
// Until at most N of this thread's committed groups are still on their way.
template <int N>
PTV2_DEVICE void wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory"); }

// Four 8 x 8 matrices of 16-bit elements: lane i names row i % 8 of matrix i / 8; each lane gets of each matrix elements
// (lane / 4, 2 (lane % 4)) and the next one; transposed, elements (2 (lane % 4), lane / 4) and the one below.
PTV2_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
PTV2_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8]: 16-bit factors, fp32 sums.
template <class E>
PTV2_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define PTV2_MULTIPLY(E, name)                                                                                            \
  template <>                                                                                                             \
  PTV2_DEVICE void multiply<E>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "       \
                 "{%8, %9}, {%0, %1, %2, %3};\n"                                                                          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                         \
  }
PTV2_MULTIPLY(Bf16, "bf16")
PTV2_MULTIPLY(Fp16, "f16")
#undef PTV2_MULTIPLY

// Two fp32 numbers rounded to nearest even, low in the low half.
template <class E>
PTV2_DEVICE uint32_t pack(float low, float high);
template <>
PTV2_DEVICE uint32_t pack<Bf16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
PTV2_DEVICE uint32_t pack<Fp16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <class E>
PTV2_DEVICE void unpack(uint32_t packed, float& low, float& high);
template <>
PTV2_DEVICE void unpack<Bf16>(uint32_t packed, float& low, float& high) {
  low = __uint_as_float(packed << 16), high = __uint_as_float(packed & 0xFFFF0000u);
}
template <>
PTV2_DEVICE void unpack<Fp16>(uint32_t packed, float& low, float& high) {
  asm("{\n.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}\n"
      : "=f"(low), "=f"(high) : "r"(packed));
}

PTV2_DEVICE float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
PTV2_DEVICE float logarithm_2(float x) { return __log2f(x); }

using Stream = cudaStream_t;
constexpr int SUCCESS = cudaSuccess, INVALID_VALUE = cudaErrorInvalidValue;

template <class Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes, void* stream, const Arguments& arguments) {
  if (shared_bytes > 48 * 1024)
    if (const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
      return code;
  kernel<<<grid, threads, shared_bytes, static_cast<Stream>(stream)>>>(arguments);
  return cudaGetLastError();
}

}  // namespace ptv2::cuda

#endif
