// What the files that see at::Tensor share: they check, allocate, fill the structs of params.h, and tell the dispatcher. The
// schemas are Python's (ptv2_engine/ops), which must have been imported before this library is loaded.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "kernels.h"
#include "ptv2/philox.h"

namespace ptv2 {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline DType dtype_of(const char* op, const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op, ": dtype ", x.scalar_type(),
              " has no native kernel (has float32, bfloat16); use use_backend(\"reference\").");
  return x.scalar_type() == at::kFloat ? DType::f32 : DType::bf16;
}

inline void check_like(const char* op, const char* name, const Tensor& x, const Tensor& model) {
  TORCH_CHECK(x.sizes() == model.sizes() && x.scalar_type() == model.scalar_type() && x.is_contiguous(), op, ": ", name, " ",
              x.sizes(), " ", x.scalar_type(), " must be contiguous, ", model.sizes(), " and ", model.scalar_type(), ".");
}

inline Tensor vector_f32(const char* op, const char* name, const Tensor& x, int64_t size) {
  TORCH_CHECK(x.dim() == 1 && x.size(0) == size, op, ": ", name, " ", x.sizes(), " must be [", size, "].");
  return x.to(at::kFloat).contiguous();
}

inline Dropout dropout_of(const char* op, double p, const OptTensor& seed, int64_t site) {
  TORCH_CHECK(p >= 0.0 && p < 1.0, op, ": drop probability ", p, " is outside [0, 1).");
  if (p == 0.0) return {};
  TORCH_CHECK(seed.has_value() && seed->scalar_type() == at::kLong && seed->numel() == 1 && seed->device().is_cpu(), op,
              ": dropout needs a seed, an int64 tensor [1] on the CPU.");
  return {true, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), static_cast<uint32_t>(site), philox::threshold(p),
          static_cast<float>(1.0 / (1.0 - p))};
}

}  // namespace ptv2
