// The parts of the interface that no kernel needs.
#include "abi.h"
#include "device.h"

const char* ptv2_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
int ptv2_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
int ptv2_cuda_runtime_version() { return CUDART_VERSION; }
int ptv2_cuda_arguments_size() { return sizeof(ptv2::cuda::Attention); }
