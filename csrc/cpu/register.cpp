// The ops that work on rows for the dispatcher.
#include <string_view>
#include <tuple>

#include "register.h"

namespace ptv2 {
namespace {

Tensor embedding_op(const Tensor& word_ids_T, const Tensor& position_ids_T, const OptTensor& token_type_ids_T,
                    const Tensor& word_VE, const OptTensor& position_ME, const OptTensor& type_UE, const Tensor& weight_E,
                    const Tensor& bias_E, double eps, double dropout_p, const OptTensor& seed, int64_t site) {
  const char* op = "embedding";
  EmbeddingParams p{};
  p.dtype = dtype_of(op, word_VE);
  p.T = word_ids_T.numel(), p.E = word_VE.size(1);
  const auto ids = [&](const char* name, const Tensor& x) {
    TORCH_CHECK(x.scalar_type() == at::kLong && x.dim() == 1 && x.size(0) == p.T, op, ": ", name, " ", x.sizes(), " ",
                x.scalar_type(), " must be int64 [", p.T, "].");
    return x.contiguous();
  };
  const auto table = [&](const char* name, const Tensor& x) {
    TORCH_CHECK(x.dim() == 2 && x.size(1) == p.E && x.scalar_type() == word_VE.scalar_type() && x.is_contiguous(), op, ": ",
                name, " ", x.sizes(), " ", x.scalar_type(), " must be contiguous [rows, ", p.E, "] ", word_VE.scalar_type(), ".");
    return x.const_data_ptr();
  };
  const Tensor words = ids("word_ids", word_ids_T), weight = vector_f32(op, "weight", weight_E, p.E);
  const Tensor bias = vector_f32(op, "bias", bias_E, p.E);
  Tensor positions, types, out = at::empty({p.T, p.E}, word_VE.options());
  p.word_ids_T = words.const_data_ptr<int64_t>(), p.word_VE = table("the word table", word_VE), p.V = word_VE.size(0);
  if (position_ME) {
    positions = ids("position_ids", position_ids_T);
    p.position_ids_T = positions.const_data_ptr<int64_t>();
    p.position_ME = table("the position table", *position_ME), p.M = position_ME->size(0);
  }
  if (type_UE) {
    p.type_UE = table("the token type table", *type_UE), p.U = type_UE->size(0);
    if (token_type_ids_T) types = ids("token_type_ids", *token_type_ids_T), p.token_type_ids_T = types.const_data_ptr<int64_t>();
  }
  p.weight_E = weight.const_data_ptr<float>(), p.bias_E = bias.const_data_ptr<float>(), p.x_TE = out.mutable_data_ptr();
  p.eps = static_cast<float>(eps), p.dropout = dropout_of(op, dropout_p, seed, site);
  const int64_t bad = embedding(p);
  TORCH_CHECK_INDEX(bad < 0, op, ": token ", bad, " has word id ", p.word_ids_T[bad], " of ", p.V, ", position ",
                    p.position_ME ? p.position_ids_T[bad] : 0, " of ", p.M, ", token type ",
                    p.token_type_ids_T ? p.token_type_ids_T[bad] : 0, " of ", p.U, ": an id lies outside its table.");
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_fwd_op(const Tensor& x_TH, const Tensor& residual_TH,
                                                                   const Tensor& weight_H, const Tensor& bias_H, double eps,
                                                                   double dropout_p, const OptTensor& seed, int64_t site,
                                                                   std::string_view keep, bool with_sum) {
  const char* op = "add_norm";
  TORCH_CHECK(x_TH.dim() == 2, op, ": x ", x_TH.sizes(), " must be [T, H].");
  TORCH_CHECK(keep == "none" || keep == "full" || keep == "int8", op, ": keep '", keep, "' must be 'none', 'full' or 'int8'.");
  check_like(op, "x", x_TH, x_TH);
  check_like(op, "residual", residual_TH, x_TH);
  const Tensor weight = vector_f32(op, "weight", weight_H, x_TH.size(1)), bias = vector_f32(op, "bias", bias_H, x_TH.size(1));
  const int64_t T = x_TH.size(0), H = x_TH.size(1);
  const bool save = keep != "none", codes = keep == "int8";
  const auto rows = [&](bool wanted, const at::TensorOptions& options) {
    return wanted ? at::empty({T, H}, options) : at::empty({0}, options);
  };
  const auto f32 = x_TH.options().dtype(at::kFloat);
  Tensor y = rows(true, x_TH.options()), xhat = rows(save, codes ? x_TH.options().dtype(at::kChar) : x_TH.options());
  Tensor total = rows(with_sum, x_TH.options()), rstd = at::empty({save ? T : 0}, f32);
  Tensor scales = codes ? at::empty({T, (H + XHAT_BLOCK - 1) / XHAT_BLOCK}, f32) : at::empty({0}, f32);
  add_norm_fwd({dtype_of(op, x_TH), x_TH.const_data_ptr(), residual_TH.const_data_ptr(), weight.const_data_ptr<float>(),
                bias.const_data_ptr<float>(), y.mutable_data_ptr(), save ? xhat.mutable_data_ptr() : nullptr,
                save ? rstd.mutable_data_ptr<float>() : nullptr, codes ? scales.mutable_data_ptr<float>() : nullptr,
                with_sum ? total.mutable_data_ptr() : nullptr, T, H, static_cast<float>(eps),
                dropout_of(op, dropout_p, seed, site)});
  return {y, xhat, rstd, scales, total};
}

// What add_norm saved, checked: x_hat like `like`, or int8 with scales.
void check_xhat(const char* op, const Tensor& xhat_TH, const OptTensor& scales, at::ScalarType dtype, int64_t T, int64_t H) {
  TORCH_CHECK(xhat_TH.dim() == 2 && xhat_TH.size(0) == T && xhat_TH.size(1) == H && xhat_TH.is_contiguous() &&
                  xhat_TH.scalar_type() == (scales ? at::kChar : dtype),
              op, ": xhat ", xhat_TH.sizes(), " ", xhat_TH.scalar_type(), " does not belong to [", T, ", ", H, "] ", dtype, ".");
  TORCH_CHECK(!scales || (scales->scalar_type() == at::kFloat && scales->is_contiguous() &&
                          scales->numel() == T * ((H + XHAT_BLOCK - 1) / XHAT_BLOCK)),
              op, ": scales must be contiguous float32 [T, ceil(H / ", XHAT_BLOCK, ")].");
}

std::tuple<Tensor, Tensor> add_norm_bwd_op(const Tensor& dy_TH, const OptTensor& dsum_TH, const Tensor& xhat_TH,
                                           const OptTensor& scales, const Tensor& rstd_T, const Tensor& weight_H,
                                           double dropout_p, const OptTensor& seed, int64_t site) {
  const char* op = "add_norm backward";
  TORCH_CHECK(dy_TH.dim() == 2, op, ": dy ", dy_TH.sizes(), " must be [T, H].");
  check_like(op, "dy", dy_TH, dy_TH);
  const int64_t T = dy_TH.size(0), H = dy_TH.size(1);
  check_xhat(op, xhat_TH, scales, dy_TH.scalar_type(), T, H);
  if (dsum_TH) check_like(op, "dsum", *dsum_TH, dy_TH);
  const Tensor weight = vector_f32(op, "weight", weight_H, H), rstd = vector_f32(op, "rstd", rstd_T, T);
  const Dropout drop = dropout_of(op, dropout_p, seed, site);
  Tensor dresidual = at::empty({T, H}, dy_TH.options());
  Tensor dx = drop.on ? at::empty({T, H}, dy_TH.options()) : at::empty({0}, dy_TH.options());
  add_norm_bwd({dtype_of(op, dy_TH), dy_TH.const_data_ptr(), dsum_TH ? dsum_TH->const_data_ptr() : nullptr,
                xhat_TH.const_data_ptr(), rstd.const_data_ptr<float>(), scales ? scales->const_data_ptr<float>() : nullptr,
                weight.const_data_ptr<float>(), dresidual.mutable_data_ptr(), drop.on ? dx.mutable_data_ptr() : nullptr, T, H,
                drop});
  return {dresidual, dx};
}

Tensor renorm_op(const Tensor& xhat_TH, const OptTensor& scales, const Tensor& weight_H, const Tensor& bias_H,
                 at::ScalarType dtype) {
  const char* op = "renorm";
  TORCH_CHECK(xhat_TH.dim() == 2, op, ": xhat ", xhat_TH.sizes(), " must be [T, H].");
  const int64_t T = xhat_TH.size(0), H = xhat_TH.size(1);
  check_xhat(op, xhat_TH, scales, dtype, T, H);
  const Tensor weight = vector_f32(op, "weight", weight_H, H), bias = vector_f32(op, "bias", bias_H, H);
  Tensor y = at::empty({T, H}, xhat_TH.options().dtype(dtype));
  renorm({dtype_of(op, y), xhat_TH.const_data_ptr(), scales ? scales->const_data_ptr<float>() : nullptr,
          weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), y.mutable_data_ptr(), T, H});
  return y;
}

// Shape and dtype of what gelu_ saves of z: its derivative, or codes of 8 bits, or four of 6 bits in three bytes.
std::vector<int64_t> derivative_sizes(const char* op, const Tensor& z, int64_t bits) {
  TORCH_CHECK(bits == 8 || bits == 6, op, ": bits ", bits, " must be 8 or 6.");
  if (bits == 8) return z.sizes().vec();
  TORCH_CHECK(z.dim() == 2 && z.size(1) % 4 == 0, op, ": 6 bits need [T, F] with F a multiple of 4, got ", z.sizes(), ".");
  return {z.size(0), 3, z.size(1) / 4};
}
at::ScalarType derivative_type(const Tensor& z, int64_t bits) {
  return bits == 8 && z.scalar_type() == at::kFloat ? at::kFloat : at::kByte;
}

Tensor gelu_op(const Tensor& z_TF, std::string_view approximate, bool save, int64_t bits) {
  const char* op = "gelu_";
  TORCH_CHECK(approximate == "none" || approximate == "tanh", op, ": approximate '", approximate,
              "' must be 'none' or 'tanh'.");
  check_like(op, "z", z_TF, z_TF);
  const DType dtype = dtype_of(op, z_TF);
  Tensor derivative = save ? at::empty(derivative_sizes(op, z_TF, bits), z_TF.options().dtype(derivative_type(z_TF, bits)))
                           : at::empty({0}, z_TF.options().dtype(at::kByte));
  gelu_fwd({dtype, z_TF.mutable_data_ptr(), save ? derivative.mutable_data_ptr() : nullptr, z_TF.numel(), approximate == "tanh",
            bits == 6 ? z_TF.size(1) / 4 : 0});
  return derivative;
}

Tensor gelu_bwd_op(const Tensor& dh_TF, const Tensor& derivative_TF, int64_t bits) {
  const char* op = "gelu backward";
  const DType dtype = dtype_of(op, dh_TF);
  check_like(op, "dh", dh_TF, dh_TF);
  TORCH_CHECK(derivative_TF.sizes().equals(derivative_sizes(op, dh_TF, bits)) && derivative_TF.is_contiguous() &&
                  derivative_TF.scalar_type() == derivative_type(dh_TF, bits),
              op, ": derivative ", derivative_TF.sizes(), " ", derivative_TF.scalar_type(), " does not belong to dh ",
              dh_TF.sizes(), " ", dh_TF.scalar_type(), " in ", bits, " bits.");
  Tensor dz = at::empty(dh_TF.sizes(), dh_TF.options());
  gelu_bwd({dtype, dh_TF.const_data_ptr(), derivative_TF.const_data_ptr(), dz.mutable_data_ptr(), dh_TF.numel(),
            bits == 6 ? dh_TF.size(1) / 4 : 0});
  return dz;
}

Tensor geglu_op(const Tensor& z_TG) {
  const char* op = "geglu";
  TORCH_CHECK(z_TG.dim() == 2 && z_TG.size(1) % 2 == 0, op, ": z ", z_TG.sizes(), " must be [T, 2F].");
  check_like(op, "z", z_TG, z_TG);
  const int64_t T = z_TG.size(0), F = z_TG.size(1) / 2;
  Tensor h = at::empty({T, F}, z_TG.options());
  geglu_fwd({dtype_of(op, z_TG), z_TG.const_data_ptr(), nullptr, h.mutable_data_ptr(), T, F});
  return h;
}

Tensor geglu_bwd_op(const Tensor& dh_TF, const Tensor& z_TG) {
  const char* op = "geglu backward";
  check_like(op, "dh", dh_TF, dh_TF);
  check_like(op, "z", z_TG, z_TG);
  TORCH_CHECK(dh_TF.dim() == 2 && z_TG.dim() == 2 && z_TG.size(0) == dh_TF.size(0) && z_TG.size(1) == 2 * dh_TF.size(1) &&
                  z_TG.scalar_type() == dh_TF.scalar_type(),
              op, ": z ", z_TG.sizes(), " ", z_TG.scalar_type(), " must be [T, 2F] for dh [T, F] ", dh_TF.sizes(), " ",
              dh_TF.scalar_type(), ".");
  Tensor dz = at::empty(z_TG.sizes(), z_TG.options());
  geglu_bwd({dtype_of(op, z_TG), z_TG.const_data_ptr(), dh_TF.const_data_ptr(), dz.mutable_data_ptr(), dh_TF.size(0),
             dh_TF.size(1)});
  return dz;
}

void rotary_op(const Tensor& qkv_T3ND, const Tensor& cos_sin_LD, const Tensor& positions_T, bool inverse) {
  const char* op = "rotary_";
  const DType dtype = dtype_of(op, qkv_T3ND);
  check_like(op, "qkv", qkv_T3ND, qkv_T3ND);
  TORCH_CHECK(qkv_T3ND.dim() == 4 && qkv_T3ND.size(1) == 3 && qkv_T3ND.size(3) % 2 == 0, op, ": qkv ", qkv_T3ND.sizes(),
              " must be [T, 3, N, D], D even.");
  const int64_t T = qkv_T3ND.size(0), N = qkv_T3ND.size(2), D = qkv_T3ND.size(3);
  TORCH_CHECK(cos_sin_LD.dim() == 2 && cos_sin_LD.size(1) == D && cos_sin_LD.scalar_type() == at::kFloat &&
                  cos_sin_LD.is_contiguous(),
              op, ": cos_sin ", cos_sin_LD.sizes(), " ", cos_sin_LD.scalar_type(), " must be contiguous float32 [L, ", D, "].");
  TORCH_CHECK(positions_T.dim() == 1 && positions_T.size(0) == T && positions_T.scalar_type() == at::kLong, op, ": positions ",
              positions_T.sizes(), " ", positions_T.scalar_type(), " must be int64 [", T, "].");
  const Tensor positions = positions_T.contiguous();
  const int64_t* position = positions.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < T; ++t) {
    TORCH_CHECK_INDEX(position[t] >= 0 && position[t] < cos_sin_LD.size(0), op, ": token ", t, " has position ", position[t],
                      " of ", cos_sin_LD.size(0), ".");
  }
  if (qkv_T3ND.numel() == 0) return;
  rotary({dtype, qkv_T3ND.mutable_data_ptr(), cos_sin_LD.const_data_ptr<float>(), position, T, N, D, inverse});
}

Tensor dropout_op(const Tensor& x_TH, double p, const Tensor& seed, int64_t site) {
  const char* op = "dropout";
  TORCH_CHECK(x_TH.dim() == 2, op, ": x ", x_TH.sizes(), " must be [T, H].");
  check_like(op, "x", x_TH, x_TH);
  const Dropout drop = dropout_of(op, p, seed, site);
  if (!drop.on) return x_TH.clone();
  Tensor y = at::empty(x_TH.sizes(), x_TH.options());
  dropout({dtype_of(op, x_TH), x_TH.const_data_ptr(), y.mutable_data_ptr(), x_TH.size(0), x_TH.size(1), drop});
  return y;
}

Tensor dequantise_op(const Tensor& codes, const Tensor& scales, std::string_view kind, int64_t rows, int64_t columns,
                     at::ScalarType dtype) {
  const char* op = "dequantise";
  TORCH_CHECK(kind == "int8" || kind == "fp8" || kind == "nf4", op, ": kind '", kind, "' must be 'int8', 'fp8' or 'nf4'.");
  const bool nf4 = kind == "nf4";
  const at::ScalarType stored = nf4 ? at::kByte : kind == "int8" ? at::kChar : at::kFloat8_e4m3fn;
  const int64_t count = rows * columns;
  TORCH_CHECK(rows >= 0 && columns >= 0 && (!nf4 || count % 64 == 0), op, ": ", kind, " weights cannot be [", rows, ", ",
              columns, "]", nf4 ? ", not a multiple of 64." : ".");
  TORCH_CHECK(codes.scalar_type() == stored && codes.numel() == (nf4 ? count / 2 : count) && codes.is_contiguous(), op,
              ": codes ", codes.sizes(), " ", codes.scalar_type(), " must be contiguous ", stored, " of a ", kind, " weight [",
              rows, ", ", columns, "].");
  const Tensor scale = vector_f32(op, "scales", scales, nf4 ? count / 64 : rows);
  Tensor out = at::empty({rows, columns}, codes.options().dtype(dtype));
  const Quantisation q = nf4 ? Quantisation::nf4 : kind == "int8" ? Quantisation::int8 : Quantisation::fp8;
  dequantise({dtype_of(op, out), q, codes.const_data_ptr(), scale.const_data_ptr<float>(), out.mutable_data_ptr(), rows,
              columns});
  return out;
}

TORCH_LIBRARY_IMPL(ptv2, CPU, m) {
  m.impl("embedding", embedding_op);
  m.impl("add_norm_fwd", add_norm_fwd_op);
  m.impl("add_norm_bwd", add_norm_bwd_op);
  m.impl("renorm", renorm_op);
  m.impl("gelu_", gelu_op);
  m.impl("gelu_bwd", gelu_bwd_op);
  m.impl("geglu_fwd", geglu_op);
  m.impl("geglu_bwd", geglu_bwd_op);
  m.impl("rotary_", rotary_op);
  m.impl("dropout", dropout_op);
  m.impl("dequantise", dequantise_op);
}

}  // namespace
}  // namespace ptv2
