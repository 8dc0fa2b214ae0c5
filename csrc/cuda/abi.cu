// The parts of the interface that no kernel needs.
#include "abi.h"
#include "device.h"

const char* ptv2_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
int ptv2_cuda_arguments_size() { return sizeof(ptv2::cuda::Attention); }
