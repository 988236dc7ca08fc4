// The ops with their gradients. With G the gradient of the shifted output, f = query . weight + bias and mu = sigmoid(f -
// lse):
//
//     df = mu (1 - mu) (G . vector)          d lse = -df
//
// A flash backward uses its `out` only for delta = rowsum(G * out), and delta must become rowsum(G * out) - d lse =
// G . (out + mu (1 - mu) vector). So the kernel is handed out + mu (1 - mu) vector = shifted - mu^2 vector, and the gradient
// through the LSE costs nothing.

#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/graph_task.h>

#include "arguments.h"
#include "cpu_norm.h"
#include "rows_on_device.h"

namespace mimic_core {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Of a shift, in whatever dtype; `wide` as the row loops read them beside a query.
struct Parameters {
  Tensor vector, weight, bias;
  Parameters wide(const Tensor& q) const {
    const auto dtype = mimic_core::wide(q);
    return {parameter(vector, dtype), parameter(weight, dtype), parameter(bias, dtype)};
  }
};

// `found` as the result of a backward that has none itself: a gradient of it is an error.
inline variable_list once_differentiable(variable_list found, const variable_list& of) {
  if (!c10::GradMode::is_enabled()) return found;
  bool asked = false;
  for (const auto& x : of) asked = asked || (x.defined() && x.requires_grad());
  if (!asked) return found;
  for (auto& x : found) {
    if (x.defined()) x = x.detach().requires_grad_();
  }
  auto error = std::make_shared<torch::autograd::DelayedError>(
      "mimic_core's kernels have no second derivatives; backend=\"reference\" of mimic_core.ops has them",
      static_cast<int64_t>(found.size()));
  return (*error)(std::move(found));
}

// Whether a tensor that a backward has unpacked may be written over: the graph ends with this backward, and nobody else
// holds its memory. A tensor that was saved as an output is one object that keeps it, and one that was made to unpack it.
inline bool is_last_use(const Tensor& x, bool hooked) {
  return !hooked && !torch::autograd::get_current_graph_task_keep_graph() && x.use_count() == 1 &&
         x.storage().use_count() == 2;
}

inline bool saved_by_hooks() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }

// Keeps a call and what its forward gave, and gives them back.
inline void save(AutogradContext* ctx, const Call& c, const Attended& a, std::initializer_list<Tensor> more) {
  variable_list kept{c.q, c.k, c.v, c.mask, a.lse, a.seed, a.offset, a.lengths_q, a.lengths_k};
  kept.insert(kept.end(), more);
  ctx->save_for_backward(std::move(kept));
  ctx->saved_data["scale"] = c.scale;
  ctx->saved_data["is_causal"] = c.is_causal;
  ctx->saved_data["kernel"] = static_cast<int64_t>(c.kernel);
}

constexpr size_t kSaved = 9;

inline Call saved_call(AutogradContext* ctx, const variable_list& x) {
  return {x[0], x[1], x[2], x[3], Tensor(), ctx->saved_data["scale"].toDouble(), ctx->saved_data["is_causal"].toBool(),
          static_cast<Kernel>(ctx->saved_data["kernel"].toInt())};
}

inline Attended saved_attended(const variable_list& x) { return {Tensor(), x[4], x[5], x[6], x[7], x[8]}; }

// `found` in the dtype of the parameter it is the gradient of.
inline Tensor gradient_of(const Tensor& parameter, const Tensor& found) { return found.to(parameter.scalar_type()); }

// A call with its shift: output [b t h d] and, for a backward, mu.
inline std::tuple<Attended, Tensor, Tensor> shifted_forward(const Call& c, const Parameters& p) {
  const Attended a = attend(c);
  const Tensor out = a.out.transpose(1, 2);
  const Tensor mu = at::empty({c.q.size(0), c.q.size(1), c.q.size(2)}, c.q.options().dtype(wide(c.q)));
  const Parameters wide_p = p.wide(c.q);
  shift_(out, c.q, a.lse_of_rows(c.q.size(2)), c.attends, wide_p.vector, wide_p.weight, wide_p.bias, mu);
  return {a, out, mu};
}

// The gradients of c.q, c.k, c.v (undefined unless `into_attention`), vector, weight and bias. `overwrite`: nobody needs the
// shifted output any more.
inline variable_list shifted_backward(const Tensor& incoming, const Call& c, const Attended& a, const Tensor& shifted,
                                      const Tensor& mu, const Parameters& p, bool into_attention, bool overwrite) {
  const Tensor grad = last_axis_contiguous(incoming);
  const Parameters wide_p = p.wide(c.q);
  Tensor hat, dq, dk, dv;
  if (into_attention) {
    // cuDNN wants it in an order of its own: see `laid_out_as`.
    const bool fits = !on_gpu(c.q) || c.kernel != kCuDNN;
    if (!fits) hat = at::empty_like(c.q).transpose(1, 2);
    else hat = overwrite ? shifted : at::empty_like(shifted);
  }
  const auto [df, parts] = fold(grad, shifted, c.q, mu, wide_p.vector, hat);
  if (into_attention) std::tie(dq, dk, dv) = attend_backward(grad.transpose(1, 2), c, hat.transpose(1, 2), a);
  const auto [d_vector, d_weight, d_bias] = add_(dq, df, wide_p.weight, parts);
  return {dq, dk, dv, gradient_of(p.vector, d_vector), gradient_of(p.weight, d_weight), gradient_of(p.bias, d_bias)};
}

struct ShiftedAttention : torch::autograd::Function<ShiftedAttention> {
  // The tensors are those of `c`, beside it because autograd looks for them here.
  static Tensor forward(AutogradContext* ctx, const Tensor&, const Tensor&, const Tensor&, const Tensor& vector,
                        const Tensor& weight, const Tensor& bias, const Call& c) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [a, out, mu] = shifted_forward(c, {vector, weight, bias});
    save(ctx, c, a, {out, mu, vector, weight, bias});
    ctx->saved_data["hooked"] = saved_by_hooks();
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &shifted = saved[kSaved], &mu = saved[kSaved + 1];
    const Parameters p{saved[kSaved + 2], saved[kSaved + 3], saved[kSaved + 4]};
    const bool into_attention = ctx->needs_input_grad(0) || ctx->needs_input_grad(1) || ctx->needs_input_grad(2);
    variable_list found;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      found = shifted_backward(grads[0], saved_call(ctx, saved), saved_attended(saved), shifted, mu, p, into_attention,
                               is_last_use(shifted, ctx->saved_data["hooked"].toBool()));
    }
    found.emplace_back();  // the call
    return once_differentiable(std::move(found), {grads[0], saved[0], saved[1], saved[2], p.vector, p.weight, p.bias});
  }
};

// The gradients of c.q, c.k and c.v from those of the output [b h t d] and the LSE; either may be undefined.
inline variable_list attention_backward(const Tensor& of_out, const Tensor& of_lse, const Call& c, const Attended& a,
                                        const Tensor& out) {
  variable_list found(3);
  if (of_out.defined())
    std::tie(found[0], found[1], found[2]) = attend_backward(last_axis_contiguous(of_out), c, out, a);
  if (of_lse.defined()) {
    // d lse / d logits is the softmax: what flows back from an attention whose values are all the first unit vector, and
    // whose `out`, so delta, is taken as zero.
    Call unit = c;
    unit.v = at::zeros_like(c.v);
    unit.v.select(-1, 0).fill_(1);
    const Tensor through = at::zeros_like(out);
    through.select(-1, 0).copy_(of_lse);
    const auto [dq, dk, _] = attend_backward(through, unit, at::zeros_like(out), a);
    found[0] = found[0].defined() ? found[0].add_(dq) : dq;
    found[1] = found[1].defined() ? found[1].add_(dk) : dk;
  }
  return found;
}

struct AttentionWithLSE : torch::autograd::Function<AttentionWithLSE> {
  // Output [b h t d] and LSE [b h t].
  static variable_list forward(AutogradContext* ctx, const Tensor&, const Tensor&, const Tensor&, const Call& c) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Attended a = attend(c);
    save(ctx, c, a, {a.out});
    ctx->set_materialize_grads(false);
    return {a.out, a.lse_of_rows(c.q.size(2))};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list found;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      found = attention_backward(grads[0], grads[1], saved_call(ctx, saved), saved_attended(saved), saved[kSaved]);
    }
    found.emplace_back();  // the call
    return once_differentiable(std::move(found), {grads[0], grads[1], saved[0], saved[1], saved[2]});
  }
};

// The gradients of the attention output, the query (undefined unless wanted), the LSE, vector, weight and bias.
inline variable_list gated_shift_backward(const Tensor& incoming, const Tensor& q, const Tensor& mu, const Parameters& p,
                                          bool into_query) {
  const Tensor grad = last_axis_contiguous(incoming);
  const Parameters wide_p = p.wide(q);
  const auto [df, parts] = fold(grad, grad, last_axis_contiguous(q), mu, wide_p.vector, Tensor());
  const Tensor dq = into_query ? at::zeros(q.sizes(), q.options()) : Tensor();
  const auto [d_vector, d_weight, d_bias] = add_(dq, df, wide_p.weight, parts);
  return {grad, dq, df.neg(), gradient_of(p.vector, d_vector), gradient_of(p.weight, d_weight), gradient_of(p.bias, d_bias)};
}

// attn_out [b t h e] shifted, in new memory; mu [b h t] is written where it is defined.
inline Tensor gated_shift_rows(const Tensor& attn_out, const Tensor& q, const Tensor& lse, const Parameters& p,
                               const Tensor& mu) {
  const Parameters wide_p = p.wide(q);
  const Tensor out = attn_out.clone(at::MemoryFormat::Contiguous);
  shift_(out, last_axis_contiguous(q), lse, Tensor(), wide_p.vector, wide_p.weight, wide_p.bias, mu);
  return out;
}

struct GatedShift : torch::autograd::Function<GatedShift> {
  static Tensor forward(AutogradContext* ctx, const Tensor& attn_out, const Tensor& q, const Tensor& lse,
                        const Tensor& vector, const Tensor& weight, const Tensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor mu = at::empty(lse.sizes(), lse.options());
    const Tensor out = gated_shift_rows(attn_out, q, lse, {vector, weight, bias}, mu);
    ctx->save_for_backward({q, mu, vector, weight, bias});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Parameters p{saved[2], saved[3], saved[4]};
    variable_list found;
    {
      at::AutoDispatchBelowADInplaceOrView below;
      found = gated_shift_backward(grads[0], saved[0], saved[1], p, ctx->needs_input_grad(1));
    }
    return once_differentiable(std::move(found), {grads[0], saved[0], p.vector, p.weight, p.bias});
  }
};

inline Factor factor(const Tensor& scale, double number, const Tensor& x) {
  return {scale.defined() ? parameter(scale, wide(x)) : Tensor(), number};
}

struct NormPreservingAdd : torch::autograd::Function<NormPreservingAdd> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& vector, const std::optional<Tensor>& scale,
                        double number) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor of_scale = scale.value_or(Tensor());
    ctx->save_for_backward({x, vector, of_scale});
    ctx->saved_data["number"] = number;
    return norm_preserving_add_rows(x.contiguous(), parameter(vector, wide(x)), factor(of_scale, number, x));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &vector = saved[1], &scale = saved[2];
    variable_list found(4);
    {
      at::AutoDispatchBelowADInplaceOrView below;
      const auto [dx, d_vector, d_scale] =
          norm_gradient_rows(grads[0].contiguous(), x.contiguous(), parameter(vector, wide(x)),
                             factor(scale, ctx->saved_data["number"].toDouble(), x));
      found = {dx, gradient_of(vector, d_vector), scale.defined() ? gradient_of(scale, d_scale) : Tensor(), {}};
    }
    return once_differentiable(std::move(found), {grads[0], x, vector, scale});
  }
};

}  // namespace mimic_core
