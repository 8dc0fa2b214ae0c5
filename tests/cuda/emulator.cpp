// The CUDA sources as one library of a C++ compiler, behind the same C interface; device memory is the host's.
#define PTV2_EMULATOR_MAIN
#include "../../csrc/cuda/prefix_attention_bwd.cu"
#include "../../csrc/cuda/prefix_attention_dq.cu"
#include "../../csrc/cuda/prefix_attention_fwd.cu"
#include "../../csrc/cuda/prefix_attention_fwd_sm90.cu"

const char* ptv2_cuda_error(int code) {
  return code == ptv2::cuda::FAILED ? ptv2::cuda::emulator::block.failure : code == 0 ? "no error" : "invalid argument";
}
int ptv2_cuda_arguments_size() { return sizeof(ptv2::cuda::Attention); }
