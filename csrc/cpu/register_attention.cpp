// The attention ops for the dispatcher.
#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "register.h"

namespace ptv2 {
namespace {

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

void fill_ranges(Attention& a, const char* op, const OptTensor& context_B, const OptTensor& key_range_T2) {
  if (!context_B && !key_range_T2) return;
  const auto fits = [](const OptTensor& x, at::IntArrayRef sizes) {
    return x.has_value() && x->sizes() == sizes && x->scalar_type() == at::kInt && x->is_contiguous();
  };
  TORCH_CHECK(fits(context_B, {a.p.B}) && fits(key_range_T2, {a.p.T, 2}), op, ": context and key_range must both be given, ",
              "contiguous int32 [", a.p.B, "] and [", a.p.T, ", 2]; make them with key_ranges().");
  a.p.context_B = context_B->const_data_ptr<int32_t>(), a.p.key_range_T2 = key_range_T2->const_data_ptr<int32_t>();
}

void fill_tables(Attention& a, const char* op, const OptTensor& rel_k_RND, const OptTensor& rel_q_RND, const Tensor& slots) {
  PrefixAttentionParams& p = a.p;
  TORCH_CHECK(slots.dim() == 1 && slots.scalar_type() == at::kInt && slots.is_contiguous() && slots.numel() % 2 == 1 &&
                  slots.numel() >= 2 * p.longest - 1,
              op, ": slots ", slots.sizes(), " ", slots.scalar_type(), " must be contiguous int32 [2L - 1] with L >= ", p.longest,
              ", the tokens of the longest sequence.");
  p.slots = slots.const_data_ptr<int32_t>() + slots.numel() / 2;
  const auto table = [&](const char* name, const OptTensor& x) -> const void* {
    if (!x) return nullptr;
    TORCH_CHECK(x->dim() == 3 && x->size(1) == p.N && x->size(2) == p.D && x->is_contiguous() && dtype_of(op, *x) == p.dtype,
                op, ": ", name, " ", x->sizes(), " ", x->scalar_type(), " must be contiguous [R, ", p.N, ", ", p.D,
                "] in q's dtype.");
    for (int64_t d = 1 - p.longest; d < p.longest; ++d) {
      TORCH_CHECK_INDEX(p.slots[d] >= 0 && p.slots[d] < x->size(0), op, ": slot ", p.slots[d], " of distance ", d,
                        " lies outside the ", x->size(0), " rows of ", name, ".");
    }
    return x->const_data_ptr();
  };
  p.rel_k_RND = table("rel_k", rel_k_RND), p.rel_q_RND = table("rel_q", rel_q_RND);
}

std::tuple<Tensor, Tensor> forward(Attention& a, const Tensor& q) {
  Tensor out = at::empty(q.sizes(), q.options()), lse = at::empty({a.p.N, a.p.T}, q.options().dtype(at::kFloat));
  if (a.end < a.p.T) out.slice(0, a.end).zero_(), lse.slice(1, a.end).zero_();
  a.p.out_TND = out.mutable_data_ptr(), a.p.lse_NT = lse.mutable_data_ptr<float>();
  prefix_attention_fwd(a.p);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Attention& a, const char* op, const Tensor& dout, const Tensor& q,
                                            const OptTensor& prefix_k, const Tensor& lse, bool need_tokens, bool need_prefix) {
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

std::tuple<Tensor, Tensor> prefix_attention_fwd_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& prefix_k,
                                                   const OptTensor& prefix_v, const Tensor& cu_seqlens, int64_t /*max_seqlen*/,
                                                   const OptTensor& prompt_ids, const OptTensor& prompt_lengths, double scale,
                                                   double dropout_p, double prefix_dropout_p, const OptTensor& seed,
                                                   int64_t site, const OptTensor& context_B, const OptTensor& key_range_T2) {
  const char* op = "prefix_attention";
  Attention a;
  fill(a, op, q, k, v, prefix_k, prefix_v, cu_seqlens, prompt_ids, prompt_lengths, scale, dropout_p, prefix_dropout_p, seed,
       site);
  fill_ranges(a, op, context_B, key_range_T2);
  return forward(a, q);
}

// Neither op needs out_TND: whole rows are at hand, so delta is summed from P * dP.
std::tuple<Tensor, Tensor, Tensor> prefix_attention_bwd_op(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& prefix_k, const OptTensor& prefix_v,
    const OptTensor& /*out_TND*/, const Tensor& lse, const Tensor& cu_seqlens, int64_t /*max_seqlen*/,
    const OptTensor& prompt_ids, const OptTensor& prompt_lengths, double scale, double dropout_p, double prefix_dropout_p,
    const OptTensor& seed, int64_t site, const OptTensor& context_B, const OptTensor& key_range_T2, bool need_tokens,
    bool need_prefix) {
  const char* op = "prefix_attention backward";
  Attention a;
  fill(a, op, q, k, v, prefix_k, prefix_v, cu_seqlens, prompt_ids, prompt_lengths, scale, dropout_p, prefix_dropout_p, seed,
       site);
  fill_ranges(a, op, context_B, key_range_T2);
  return backward(a, op, dout, q, prefix_k, lse, need_tokens, need_prefix);
}

std::tuple<Tensor, Tensor> disentangled_attention_fwd_op(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& prefix_k, const OptTensor& prefix_v,
    const OptTensor& rel_k_RND, const OptTensor& rel_q_RND, const Tensor& slots, const Tensor& cu_seqlens,
    int64_t /*max_seqlen*/, const OptTensor& prompt_ids, const OptTensor& prompt_lengths, double scale, double dropout_p,
    double prefix_dropout_p, const OptTensor& seed, int64_t site) {
  const char* op = "disentangled_attention";
  Attention a;
  fill(a, op, q, k, v, prefix_k, prefix_v, cu_seqlens, prompt_ids, prompt_lengths, scale, dropout_p, prefix_dropout_p, seed,
       site);
  fill_tables(a, op, rel_k_RND, rel_q_RND, slots);
  return forward(a, q);
}

std::tuple<Tensor, Tensor, Tensor> disentangled_attention_bwd_op(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& prefix_k, const OptTensor& prefix_v,
    const OptTensor& rel_k_RND, const OptTensor& rel_q_RND, const Tensor& slots, const OptTensor& /*out_TND*/, const Tensor& lse,
    const Tensor& cu_seqlens, int64_t /*max_seqlen*/, const OptTensor& prompt_ids, const OptTensor& prompt_lengths, double scale,
    double dropout_p, double prefix_dropout_p, const OptTensor& seed, int64_t site, bool need_tokens, bool need_prefix) {
  const char* op = "disentangled_attention backward";
  Attention a;
  fill(a, op, q, k, v, prefix_k, prefix_v, cu_seqlens, prompt_ids, prompt_lengths, scale, dropout_p, prefix_dropout_p, seed,
       site);
  fill_tables(a, op, rel_k_RND, rel_q_RND, slots);
  return backward(a, op, dout, q, prefix_k, lse, need_tokens, need_prefix);
}

TORCH_LIBRARY_IMPL(ptv2, CPU, m) {
  m.impl("prefix_attention_fwd", prefix_attention_fwd_op);
  m.impl("prefix_attention_bwd", prefix_attention_bwd_op);
  m.impl("disentangled_attention_fwd", disentangled_attention_fwd_op);
  m.impl("disentangled_attention_bwd", disentangled_attention_bwd_op);
}

}  // namespace
}  // namespace ptv2
