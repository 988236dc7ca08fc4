// mimic_core's ops, one call each from the check of the arguments to the gradient. Each returns nothing for arguments it
// does not take as they are.

#pragma once

#include "autograd.h"
#include "cpu_virtual.h"

namespace mimic_core {

using MaybeTensor = std::optional<Tensor>;
using MaybeNumber = std::optional<double>;

// Whose bits a call is to give.
enum Follow : int64_t {
  kNobody = 0,
  // torch's scaled_dot_product_attention as transformers' models call it, where a lone query sees all its keys, whatever
  // is_causal says. Only the kernel will do that torch runs on the call.
  kTransformers = 1,
  // The same where grouped heads of a lone query are the rows of one matrix under a mask, or beyond 256 numbers: newer
  // transformers decode so, and that rounds differently.
  kPackingTransformers = 2,
};

inline bool packs(const Tensor& q, const Tensor& k, const MaybeTensor& mask, Follow follow) {
  return follow == kPackingTransformers && q.size(2) == 1 && q.size(1) != k.size(1) && (mask || q.size(3) > 256);
}

inline std::optional<Call> call_of(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask,
                                   MaybeNumber scale, bool is_causal, Follow follow) {
  if (!unwatched() || !takes_attention(q, k, v, mask, scale, is_causal)) return std::nullopt;
  const Tensor of_call = normalised(mask, q);
  if (follow && q.size(2) == 1) is_causal = false;
  if (!packs(q, k, mask, follow))
    return prepare(q, k, v, of_call, scale_of(scale, q), is_causal, std::nullopt, follow);
  if (of_call.defined() && of_call.size(1) != 1) return std::nullopt;
  const Tensor packed = q.reshape({q.size(0), k.size(1), q.size(1) / k.size(1), q.size(3)});
  return prepare(packed, k, v, of_call, scale_of(scale, q), false, std::nullopt, true);
}

inline bool any_wants_gradient(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* x : tensors) {
    if (wants_gradient(*x)) return true;
  }
  return false;
}

// Output [b t h d] and LSE [b h t].
inline std::optional<std::tuple<Tensor, Tensor>> attention_with_lse(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                    const MaybeTensor& mask, MaybeNumber scale,
                                                                    bool is_causal, Follow follow = kNobody) {
  const auto c = call_of(q, k, v, mask, scale, is_causal, follow);
  if (!c) return std::nullopt;
  Tensor out, lse;
  if (any_wants_gradient({&q, &k, &v})) {
    const auto made = AttentionWithLSE::apply(c->q, c->k, c->v, *c);
    out = made[0], lse = made[1];
  } else {
    at::AutoDispatchBelowADInplaceOrView below;
    const Attended a = attend(*c);
    out = a.out, lse = a.lse_of_rows(c->q.size(2));
  }
  if (c->attends.defined()) lse = lse.masked_fill(c->attends.logical_not(), -std::numeric_limits<double>::infinity());
  if (!packs(q, k, mask, follow)) return std::make_tuple(out.transpose(1, 2), lse);
  return std::make_tuple(out.reshape({q.size(0), 1, q.size(1), q.size(3)}), lse.reshape({q.size(0), q.size(1), 1}));
}

// attn_out [b t h e], shifted, in new memory.
inline MaybeTensor gated_shift(const Tensor& attn_out, const Tensor& q, const Tensor& lse, const Tensor& vector,
                               const Tensor& weight, const Tensor& bias) {
  if (!unwatched() || !is_plain(q) || !is_plain_beside(attn_out, q) || !is_plain_beside(lse, q)) return std::nullopt;
  if (q.dim() != 4 || attn_out.dim() != 4 || lse.dim() != 3 || q.numel() == 0 || attn_out.numel() == 0) return std::nullopt;
  if (!is_supported(q) || attn_out.scalar_type() != q.scalar_type() || lse.scalar_type() != wide(q)) return std::nullopt;
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), e = attn_out.size(3);
  if (!has_sizes(lse, {b, h, t}) || !has_sizes(attn_out, {b, t, h, e})) return std::nullopt;
  if (!takes_shift(q, e, vector, weight, bias)) return std::nullopt;
  if (any_wants_gradient({&attn_out, &q, &lse, &vector, &weight, &bias}))
    return GatedShift::apply(attn_out, q, lse, vector, weight, bias);
  at::AutoDispatchBelowADInplaceOrView below;
  return gated_shift_rows(attn_out, q, lse, {vector, weight, bias}, Tensor());
}

// Attention that is done, as if its context had the keys [h n d] and values [h n e] too; on a CPU, without a gradient.
inline MaybeTensor virtual_context(const Tensor& attn_out, const Tensor& q, const Tensor& lse, const Tensor& keys,
                                   const Tensor& values, const Tensor& weight, double scale) {
  if (!unwatched() || !is_plain(q) || !is_plain_beside(attn_out, q) || !is_plain_beside(lse, q) || on_gpu(q)) return std::nullopt;
  if (q.dim() != 4 || attn_out.dim() != 4 || keys.dim() != 3 || q.numel() == 0 || attn_out.numel() == 0) return std::nullopt;
  if (!is_supported(q) || q.scalar_type() == at::kDouble || attn_out.scalar_type() != q.scalar_type()) return std::nullopt;
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), d = q.size(3), e = attn_out.size(3), n = keys.size(1);
  if (!has_sizes(attn_out, {b, t, h, e}) || !has_sizes(lse, {b, h, t}) || !has_sizes(keys, {h, n, d})) return std::nullopt;
  if (n == 0 || !has_sizes(values, {h, n, e}) || weight.numel() != 1) return std::nullopt;
  for (const Tensor* x : {&keys, &values, &weight, &lse}) {
    if (x->scalar_type() != at::kFloat || !is_plain_beside(*x, q)) return std::nullopt;
  }
  if (any_wants_gradient({&attn_out, &q, &lse, &keys, &values, &weight})) return std::nullopt;
  at::AutoDispatchBelowADInplaceOrView below;
  const Tensor out = at::empty(attn_out.sizes(), attn_out.options());
  const auto run = q.scalar_type() == at::kFloat      ? cpu::virtual_rows<float>
                   : q.scalar_type() == at::kBFloat16 ? cpu::virtual_rows<at::BFloat16>
                                                      : cpu::virtual_rows<at::Half>;
  run(last_axis_contiguous(attn_out), last_axis_contiguous(q), lse, keys.contiguous(), values.contiguous(), weight,
      static_cast<float>(scale), out);
  return out;
}

// Output [b t h d], shifted.
inline MaybeTensor shifted_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& vector,
                                     const Tensor& weight, const Tensor& bias, const MaybeTensor& mask, MaybeNumber scale,
                                     bool is_causal, Follow follow = kNobody) {
  if (q.dim() == 4 && k.dim() == 4 && packs(q, k, mask, follow)) {
    const auto found = attention_with_lse(q, k, v, mask, scale, is_causal, follow);
    return found ? gated_shift(std::get<0>(*found), q, std::get<1>(*found), vector, weight, bias) : std::nullopt;
  }
  const auto c = call_of(q, k, v, mask, scale, is_causal, follow);
  if (!c || !takes_shift(q, q.size(3), vector, weight, bias)) return std::nullopt;
  if (any_wants_gradient({&q, &k, &v, &vector, &weight, &bias}))
    return ShiftedAttention::apply(c->q, c->k, c->v, vector, weight, bias, *c);
  at::AutoDispatchBelowADInplaceOrView below;
  const Attended a = attend(*c);
  const Parameters p = Parameters{vector, weight, bias}.wide(q);
  const Tensor out = a.out.transpose(1, 2);
  shift_(out, c->q, a.lse_of_rows(q.size(2)), c->attends, p.vector, p.weight, p.bias, Tensor());
  return out;
}

// (x + a v) |x| / |x + a v| over the last axis, with a = scale, or `number` where scale is not given.
inline MaybeTensor norm_preserving_add(const Tensor& x, const Tensor& vector, const MaybeTensor& scale, double number) {
  if (!unwatched() || !is_plain(x) || !is_supported(x) || x.dim() == 0 || x.numel() == 0) return std::nullopt;
  if (!is_plain_beside(vector, x) || !cpu::is_supported(vector.scalar_type()) || !has_sizes(vector, {x.size(-1)}))
    return std::nullopt;
  if (scale && (!is_plain_beside(*scale, x) || scale->dim() != 0 || !cpu::is_supported(scale->scalar_type())))
    return std::nullopt;
  const Tensor of_scale = scale.value_or(Tensor());
  if (any_wants_gradient({&x, &vector}) || (scale && wants_gradient(*scale)))
    return NormPreservingAdd::apply(x, vector, scale, number);
  at::AutoDispatchBelowADInplaceOrView below;
  return norm_preserving_add_rows(x.contiguous(), parameter(vector, wide(x)), factor(of_scale, number, x));
}

// The same with a vector [b c] and a scale [b], for decoding alone: on a CPU, without a gradient.
inline MaybeTensor norm_preserving_add_of_samples(const Tensor& x, const Tensor& vector, const Tensor& scale) {
  if (!unwatched() || !is_plain(x) || on_gpu(x) || !is_supported(x) || x.dim() < 2 || x.numel() == 0) return std::nullopt;
  for (const Tensor* p : {&vector, &scale}) {
    if (!is_plain_beside(*p, x) || !cpu::is_supported(p->scalar_type())) return std::nullopt;
  }
  if (!has_sizes(vector, {x.size(0), x.size(-1)}) || !has_sizes(scale, {x.size(0)})) return std::nullopt;
  if (any_wants_gradient({&x, &vector, &scale})) return std::nullopt;
  at::AutoDispatchBelowADInplaceOrView below;
  return cpu::norm_preserving_add_of_samples(x.contiguous(), parameter(vector, wide(x)), parameter(scale, wide(x)));
}

// Whether a call over keys in pages is taken: on a CPU, for decoding alone.
inline bool takes_pages(const cpu::Paged& call) {
  const auto &query = call.query, &keys = call.keys;
  const bool sizes = query.dim() == 3 && keys.dim() == 4 && call.table.dim() == 2;
  if (!sizes || call.starts.dim() != 1 || call.lengths.dim() != 1) return false;
  if (on_gpu(query) || query.scalar_type() != keys.scalar_type() || any_wants_gradient({&query, &keys})) return false;
  if (query.scalar_type() != at::kFloat && query.scalar_type() != at::kBFloat16) return false;
  for (const Tensor* x : {&call.table, &call.starts, &call.lengths}) {
    if (x->scalar_type() != at::kInt || x->stride(-1) != 1) return false;
  }
  const int64_t d = query.size(2), size = keys.size(3), requests = call.lengths.size(0);
  if (query.stride(2) != 1 || keys.stride(3) != 1 || keys.stride(2) != size || keys.size(2) != d) return false;
  if (size % cpu::kKeys || query.size(1) % keys.size(1)) return false;
  return call.starts.size(0) == requests + 1 && call.table.size(0) >= requests;
}

// The LSE [n h] of the queries.
inline MaybeTensor paged_lse(const cpu::Paged& call) {
  if (!takes_pages(call)) return std::nullopt;
  const Tensor out = at::full({call.query.size(0), call.query.size(1)}, -std::numeric_limits<float>::infinity(),
                              call.query.options().dtype(at::kFloat));
  const auto run = call.query.scalar_type() == at::kFloat ? cpu::paged_lse_of<float> : cpu::paged_lse_of<at::BFloat16>;
  run(call, out);
  return out;
}

// Shifts out [n h e] in place, each token by the parameters of its row. Returns whether it did.
inline bool paged_gated_shift(const cpu::Paged& call, const Tensor& out, const Tensor& vector, const Tensor& weight,
                              const Tensor& bias, const Tensor& rows, const Tensor& strengths) {
  if (!takes_pages(call) || out.dim() != 3 || out.stride(2) != 1 || out.scalar_type() != call.query.scalar_type()) return false;
  const int64_t n = call.query.size(0), h = call.query.size(1), d = call.query.size(2), e = out.size(2);
  if (vector.dim() != 3 || !has_sizes(out, {n, h, e}) || !has_sizes(rows, {n}) || !has_sizes(strengths, {n})) return false;
  const int64_t stacks = vector.size(0);
  if (!has_sizes(vector, {stacks, h, e}) || !has_sizes(weight, {stacks, h, d}) || !has_sizes(bias, {stacks, h})) return false;
  for (const Tensor* x : {&vector, &weight, &bias, &strengths}) {
    if (x->scalar_type() != at::kFloat || !x->is_contiguous() || on_gpu(*x)) return false;
  }
  if (rows.scalar_type() != at::kLong || !rows.is_contiguous()) return false;
  const auto run = out.scalar_type() == at::kFloat ? cpu::paged_shift_of<float> : cpu::paged_shift_of<at::BFloat16>;
  run(call, out, vector, weight, bias, rows, strengths);
  return true;
}

}  // namespace mimic_core
