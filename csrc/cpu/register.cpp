// The only file that sees at::Tensor: it checks, allocates, fills the structs of params.h, and tells the dispatcher. The
// schemas are Python's (ptv2_engine/ops), which must have been imported before this library is loaded.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "ptv2/philox.h"

namespace ptv2 {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

DType dtype_of(const char* op, const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op, ": dtype ", x.scalar_type(),
              " has no native kernel (has float32, bfloat16); use use_backend(\"reference\").");
  return x.scalar_type() == at::kFloat ? DType::f32 : DType::bf16;
}

void check_like(const char* op, const char* name, const Tensor& x, const Tensor& model) {
  TORCH_CHECK(x.sizes() == model.sizes() && x.scalar_type() == model.scalar_type() && x.is_contiguous(), op, ": ", name, " ",
              x.sizes(), " ", x.scalar_type(), " must be contiguous, ", model.sizes(), " and ", model.scalar_type(), ".");
}

Tensor vector_f32(const char* op, const char* name, const Tensor& x, int64_t size) {
  TORCH_CHECK(x.dim() == 1 && x.size(0) == size, op, ": ", name, " ", x.sizes(), " must be [", size, "].");
  return x.to(at::kFloat).contiguous();
}

Dropout dropout_of(const char* op, double p, const OptTensor& seed, int64_t site) {
  TORCH_CHECK(p >= 0.0 && p < 1.0, op, ": drop probability ", p, " is outside [0, 1).");
  if (p == 0.0) return {};
  TORCH_CHECK(seed.has_value() && seed->scalar_type() == at::kLong && seed->numel() == 1 && seed->device().is_cpu(), op,
              ": dropout needs a seed, an int64 tensor [1] on the CPU.");
  return {true, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), static_cast<uint32_t>(site), philox::threshold(p),
          static_cast<float>(1.0 / (1.0 - p))};
}

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

std::tuple<Tensor, Tensor, Tensor> add_norm_fwd_op(const Tensor& x_TH, const Tensor& residual_TH, const Tensor& weight_H,
                                                   const Tensor& bias_H, double eps, double dropout_p, const OptTensor& seed,
                                                   int64_t site, bool save) {
  const char* op = "add_norm";
  TORCH_CHECK(x_TH.dim() == 2, op, ": x ", x_TH.sizes(), " must be [T, H].");
  check_like(op, "x", x_TH, x_TH);
  check_like(op, "residual", residual_TH, x_TH);
  const Tensor weight = vector_f32(op, "weight", weight_H, x_TH.size(1)), bias = vector_f32(op, "bias", bias_H, x_TH.size(1));
  const int64_t T = x_TH.size(0), H = x_TH.size(1);
  Tensor y = at::empty({T, H}, x_TH.options()), xhat, rstd;
  xhat = save ? at::empty({T, H}, x_TH.options()) : at::empty({0}, x_TH.options());
  rstd = at::empty({save ? T : 0}, x_TH.options().dtype(at::kFloat));
  add_norm_fwd({dtype_of(op, x_TH), x_TH.const_data_ptr(), residual_TH.const_data_ptr(), weight.const_data_ptr<float>(),
                bias.const_data_ptr<float>(), y.mutable_data_ptr(), save ? xhat.mutable_data_ptr() : nullptr,
                save ? rstd.mutable_data_ptr<float>() : nullptr, T, H, static_cast<float>(eps),
                dropout_of(op, dropout_p, seed, site)});
  return {y, xhat, rstd};
}

std::tuple<Tensor, Tensor> add_norm_bwd_op(const Tensor& dy_TH, const Tensor& xhat_TH, const Tensor& rstd_T,
                                           const Tensor& weight_H, double dropout_p, const OptTensor& seed, int64_t site) {
  const char* op = "add_norm backward";
  TORCH_CHECK(dy_TH.dim() == 2, op, ": dy ", dy_TH.sizes(), " must be [T, H].");
  check_like(op, "dy", dy_TH, dy_TH);
  check_like(op, "xhat", xhat_TH, dy_TH);
  const int64_t T = dy_TH.size(0), H = dy_TH.size(1);
  const Tensor weight = vector_f32(op, "weight", weight_H, H), rstd = vector_f32(op, "rstd", rstd_T, T);
  const Dropout drop = dropout_of(op, dropout_p, seed, site);
  Tensor dresidual = at::empty({T, H}, dy_TH.options());
  Tensor dx = drop.on ? at::empty({T, H}, dy_TH.options()) : at::empty({0}, dy_TH.options());
  add_norm_bwd({dtype_of(op, dy_TH), dy_TH.const_data_ptr(), xhat_TH.const_data_ptr(), rstd.const_data_ptr<float>(),
                weight.const_data_ptr<float>(), dresidual.mutable_data_ptr(), drop.on ? dx.mutable_data_ptr() : nullptr, T, H,
                drop});
  return {dresidual, dx};
}

Tensor gelu_op(const Tensor& z_TF, std::string_view approximate, bool save) {
  const char* op = "gelu_";
  TORCH_CHECK(approximate == "none" || approximate == "tanh", op, ": approximate '", approximate,
              "' must be 'none' or 'tanh'.");
  check_like(op, "z", z_TF, z_TF);
  const DType dtype = dtype_of(op, z_TF);
  const auto code = z_TF.options().dtype(at::kByte);
  Tensor derivative = !save ? at::empty({0}, code) : at::empty(z_TF.sizes(), dtype == DType::f32 ? z_TF.options() : code);
  gelu_fwd({dtype, z_TF.mutable_data_ptr(), save ? derivative.mutable_data_ptr() : nullptr, z_TF.numel(), approximate == "tanh"});
  return derivative;
}

Tensor gelu_bwd_op(const Tensor& dh_TF, const Tensor& derivative_TF) {
  const char* op = "gelu backward";
  const DType dtype = dtype_of(op, dh_TF);
  check_like(op, "dh", dh_TF, dh_TF);
  TORCH_CHECK(derivative_TF.sizes() == dh_TF.sizes() && derivative_TF.is_contiguous() &&
                  derivative_TF.scalar_type() == (dtype == DType::f32 ? at::kFloat : at::kByte),
              op, ": derivative ", derivative_TF.sizes(), " ", derivative_TF.scalar_type(), " does not belong to dh ",
              dh_TF.sizes(), " ", dh_TF.scalar_type(), ".");
  Tensor dz = at::empty(dh_TF.sizes(), dh_TF.options());
  gelu_bwd({dtype, dh_TF.const_data_ptr(), derivative_TF.const_data_ptr(), dz.mutable_data_ptr(), dh_TF.numel()});
  return dz;
}

// Checked parameters of one attention call with the memory they point to.
struct Attention {
  PrefixAttentionParams p{};
  Tensor cu_seqlens;
  std::vector<int32_t> prompt_lengths, order;
  std::vector<Chunk> chunks;
  int64_t end = 0;  // tokens that belong to a sequence
};

std::vector<int32_t> integers(const char* op, const char* name, const OptTensor& x, int64_t size, int64_t fill, int64_t below) {
  std::vector<int32_t> values(static_cast<size_t>(size), static_cast<int32_t>(fill));
  if (!x) return values;
  TORCH_CHECK(x->dim() == 1 && x->size(0) == size && (x->scalar_type() == at::kInt || x->scalar_type() == at::kLong), op, ": ",
              name, " ", x->sizes(), " ", x->scalar_type(), " must be int32 or int64 [", size, "].");
  const Tensor plain = x->to(at::kLong).contiguous();
  for (int64_t i = 0; i < size; ++i) {
    const int64_t value = plain.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(value >= 0 && value < below, op, ": ", name, "[", i, "] = ", value, " is outside [0, ", below - 1, "].");
    values[static_cast<size_t>(i)] = static_cast<int32_t>(value);
  }
  return values;
}

// Sequences grouped by prompt and cut into runs of about equal cost: enough of them to keep many cores busy over N heads,
// few enough that their partial gradients stay small. It looks at the batch only, so results do not depend on threads.
void plan(Attention& a, const std::vector<int32_t>& prompt_ids) {
  constexpr int64_t RUNS = 16;
  const int64_t B = a.p.B;
  a.order.resize(static_cast<size_t>(B));
  std::iota(a.order.begin(), a.order.end(), 0);
  std::stable_sort(a.order.begin(), a.order.end(), [&](int32_t x, int32_t y) { return prompt_ids[x] < prompt_ids[y]; });
  const auto cost = [&](int32_t b) {
    const int64_t S = a.p.cu_seqlens[b + 1] - a.p.cu_seqlens[b];
    return S * (S + a.prompt_lengths[static_cast<size_t>(prompt_ids[b])] + 16);
  };
  int64_t total = 0, run = 0;
  for (int32_t b : a.order) total += cost(b);
  const int64_t share = total / RUNS + 1;
  for (int64_t i = 0; i < B; ++i) {
    const int32_t b = a.order[static_cast<size_t>(i)], prompt = prompt_ids[b];
    if (a.chunks.empty() || a.chunks.back().prompt != prompt || run + cost(b) / 2 > share) {
      a.chunks.push_back({prompt, static_cast<int32_t>(i), static_cast<int32_t>(i)});
      run = 0;
    }
    a.chunks.back().last = static_cast<int32_t>(i + 1);
    run += cost(b);
  }
  a.p.order_B = a.order.data(), a.p.chunks = a.chunks.data(), a.p.num_chunks = static_cast<int64_t>(a.chunks.size());
}

void fill(Attention& a, const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& prefix_k,
          const OptTensor& prefix_v, const Tensor& cu_seqlens, const OptTensor& prompt_ids, const OptTensor& prompt_lengths,
          double scale, double dropout_p, double prefix_dropout_p, const OptTensor& seed, int64_t site) {
  PrefixAttentionParams& p = a.p;
  p.dtype = dtype_of(op, q);
  TORCH_CHECK(q.dim() == 3, op, ": q ", q.sizes(), " must be [T, N, D].");
  p.T = q.size(0), p.N = q.size(1), p.D = q.size(2);
  TORCH_CHECK(p.D % 8 == 0 && p.D <= 256, op, ": head dim ", p.D, " (has multiples of 8 up to 256).");
  const auto rows = [&](const char* name, const Tensor& x) {
    TORCH_CHECK(x.sizes() == q.sizes() && x.scalar_type() == q.scalar_type() && x.stride(2) == 1 && x.stride(1) == p.D, op, ": ",
                name, " ", x.sizes(), " ", x.scalar_type(), " with strides ", x.strides(), " must be ", q.sizes(), " ",
                q.scalar_type(), " with contiguous rows; any row stride will do.");
    return x.stride(0);
  };
  p.q_row = rows("q", q), p.k_row = rows("k", k), p.v_row = rows("v", v);
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();

  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.scalar_type() == at::kInt && cu_seqlens.size(0) >= 1, op, ": cu_seqlens ",
              cu_seqlens.sizes(), " ", cu_seqlens.scalar_type(), " must be int32 [B+1].");
  a.cu_seqlens = cu_seqlens.contiguous();
  p.cu_seqlens = a.cu_seqlens.const_data_ptr<int32_t>(), p.B = cu_seqlens.size(0) - 1;
  TORCH_CHECK(p.cu_seqlens[0] == 0 && p.cu_seqlens[p.B] <= p.T, op, ": cu_seqlens runs from ", p.cu_seqlens[0], " to ",
              p.cu_seqlens[p.B], ", but must start at 0 and end within the ", p.T, " tokens.");
  for (int64_t b = 0; b < p.B; ++b) {
    TORCH_CHECK(p.cu_seqlens[b] <= p.cu_seqlens[b + 1], op, ": cu_seqlens falls from ", p.cu_seqlens[b], " to ",
                p.cu_seqlens[b + 1], " at sequence ", b, ".");
    p.longest = std::max<int64_t>(p.longest, p.cu_seqlens[b + 1] - p.cu_seqlens[b]);
  }
  a.end = p.cu_seqlens[p.B];

  p.K = 1;
  if (prefix_k && prefix_k->size(1) > 0) {
    const auto check = [&](const char* name, const Tensor& x) {
      TORCH_CHECK(x.dim() == 4 && x.sizes() == prefix_k->sizes() && x.size(2) == p.N && x.size(3) == p.D &&
                      x.scalar_type() == q.scalar_type() && x.stride(3) == 1 && x.stride(2) == p.D,
                  op, ": ", name, " ", x.sizes(), " ", x.scalar_type(), " must be [K, P, ", p.N, ", ", p.D, "] ", q.scalar_type(),
                  " with N and D contiguous.");
    };
    TORCH_CHECK(prefix_v.has_value(), op, ": only prefix_k was given; pass both, or None for both.");
    check("prefix_k", *prefix_k), check("prefix_v", *prefix_v);
    p.K = prefix_k->size(0), p.P = prefix_k->size(1);
    p.prefix_k = prefix_k->const_data_ptr(), p.prefix_k_prompt = prefix_k->stride(0), p.prefix_k_row = prefix_k->stride(1);
    p.prefix_v = prefix_v->const_data_ptr(), p.prefix_v_prompt = prefix_v->stride(0), p.prefix_v_row = prefix_v->stride(1);
    p.prefix_dropout = dropout_of(op, prefix_dropout_p, seed, site);
  }
  // Without a prefix, prompt ids and lengths have no meaning and are not looked at.
  a.prompt_lengths = integers(op, "prompt_lengths", p.P > 0 ? prompt_lengths : OptTensor{}, p.K, p.P, p.P + 1);
  p.prompt_lengths = a.prompt_lengths.data();
  p.scale = static_cast<float>(scale), p.dropout = dropout_of(op, dropout_p, seed, site);
  plan(a, integers(op, "prompt_ids", p.P > 0 ? prompt_ids : OptTensor{}, p.B, 0, p.K));
}

std::tuple<Tensor, Tensor> prefix_attention_fwd_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& prefix_k,
                                                   const OptTensor& prefix_v, const Tensor& cu_seqlens, int64_t /*max_seqlen*/,
                                                   const OptTensor& prompt_ids, const OptTensor& prompt_lengths, double scale,
                                                   double dropout_p, double prefix_dropout_p, const OptTensor& seed,
                                                   int64_t site) {
  Attention a;
  fill(a, "prefix_attention", q, k, v, prefix_k, prefix_v, cu_seqlens, prompt_ids, prompt_lengths, scale, dropout_p,
       prefix_dropout_p, seed, site);
  Tensor out = at::empty(q.sizes(), q.options()), lse = at::empty({a.p.N, a.p.T}, q.options().dtype(at::kFloat));
  if (a.end < a.p.T) out.slice(0, a.end).zero_(), lse.slice(1, a.end).zero_();
  a.p.out_TND = out.mutable_data_ptr(), a.p.lse_NT = lse.mutable_data_ptr<float>();
  prefix_attention_fwd(a.p);
  return {out, lse};
}

// out_TND is not needed: whole rows are at hand, so delta is summed from P * dP.
std::tuple<Tensor, Tensor, Tensor> prefix_attention_bwd_op(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& prefix_k, const OptTensor& prefix_v,
    const OptTensor& /*out_TND*/, const Tensor& lse, const Tensor& cu_seqlens, int64_t /*max_seqlen*/,
    const OptTensor& prompt_ids, const OptTensor& prompt_lengths, double scale, double dropout_p, double prefix_dropout_p,
    const OptTensor& seed, int64_t site, bool need_tokens, bool need_prefix) {
  const char* op = "prefix_attention backward";
  Attention a;
  fill(a, op, q, k, v, prefix_k, prefix_v, cu_seqlens, prompt_ids, prompt_lengths, scale, dropout_p, prefix_dropout_p, seed,
       site);
  check_like(op, "dout", dout, dout);
  TORCH_CHECK(dout.sizes() == q.sizes() && dout.scalar_type() == q.scalar_type(), op, ": dout ", dout.sizes(), " ",
              dout.scalar_type(), " must be ", q.sizes(), " ", q.scalar_type(), ".");
  const PrefixAttentionParams& p = a.p;
  TORCH_CHECK(lse.dim() == 2 && lse.size(0) == p.N && lse.size(1) == p.T && lse.is_contiguous() &&
                  lse.scalar_type() == at::kFloat,
              op, ": lse ", lse.sizes(), " must be contiguous float32 [", p.N, ", ", p.T, "].");
  a.p.lse_NT = const_cast<float*>(lse.const_data_ptr<float>());
  const auto f32 = q.options().dtype(at::kFloat);
  Tensor dqkv = need_tokens ? at::empty({p.T, 3, p.N, p.D}, q.options()) : at::empty({0}, q.options());
  if (need_tokens && a.end < p.T) dqkv.slice(0, a.end).zero_();
  const bool has_prefix = prefix_k.has_value() && need_prefix;
  Tensor dprefix_k = has_prefix ? at::empty(prefix_k->sizes(), f32) : at::empty({0}, f32);
  Tensor dprefix_v = has_prefix ? at::empty(prefix_k->sizes(), f32) : at::empty({0}, f32);
  const bool sums = has_prefix && p.P > 0;
  Tensor partial = sums ? at::empty({2, p.num_chunks, p.P, p.N, p.D}, f32) : Tensor();
  PrefixAttentionBwdParams bwd{};
  bwd.fwd = a.p, bwd.dout_TND = dout.const_data_ptr();
  bwd.dqkv_T3ND = need_tokens ? dqkv.mutable_data_ptr() : nullptr;
  if (sums) {
    bwd.partial_k = partial.mutable_data_ptr<float>(), bwd.partial_v = bwd.partial_k + partial.numel() / 2;
    bwd.dprefix_k = dprefix_k.mutable_data_ptr<float>(), bwd.dprefix_v = dprefix_v.mutable_data_ptr<float>();
  }
  if (need_tokens || sums) prefix_attention_bwd(bwd);
  return {dqkv, dprefix_k, dprefix_v};
}

TORCH_LIBRARY_IMPL(ptv2, CPU, m) {
  m.impl("embedding", embedding_op);
  m.impl("add_norm_fwd", add_norm_fwd_op);
  m.impl("add_norm_bwd", add_norm_bwd_op);
  m.impl("gelu_", gelu_op);
  m.impl("gelu_bwd", gelu_bwd_op);
  m.impl("prefix_attention_fwd", prefix_attention_fwd_op);
  m.impl("prefix_attention_bwd", prefix_attention_bwd_op);
}

}  // namespace
}  // namespace ptv2
