// The ops as torch's dispatcher knows them, for torch.compile and for whoever calls torch.ops.mimic_core: on a CPU and a
// GPU, in shapes alone (Meta, for fake tensors), and with their gradients.
//
// Where tensors have memory, an op is the function of ops.h. For a compiler that traces, an op and its backward are ops of their
// own (_name, _name_backward) that it puts into its graph. Their results are contiguous, those [b h t d] in the memory order of
// [b t h d], so that shapes alone tell the strides.

#pragma once

#include <torch/library.h>

#include "ops.h"

namespace mimic_core::dispatch {

using torch::jit::Stack;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
T taken(std::optional<T> found, const char* op) {
  TORCH_CHECK_VALUE(found, "mimic_core::", op, " does not take these arguments as they are; mimic_core.ops.", op,
                    " says what is wrong with them, or computes them in another way");
  return std::move(*found);
}

// --- gradients where nothing has memory, for any of the ops

variable_list called(const std::string& name, Stack stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").callBoxed(&stack);
  variable_list found;
  for (const auto& x : stack) found.push_back(x.toTensor());
  return found;
}

// What an op is given beside the tensors it has gradients in: a mask, a scale, whether it is causal.
struct Beside {
  std::string name;
  std::vector<c10::IValue> options;
};

Stack stack_of(at::TensorList tensors, const std::vector<c10::IValue>& options) {
  Stack stack;
  for (const auto& x : tensors) stack.push_back(x.defined() ? c10::IValue(x) : c10::IValue());
  stack.insert(stack.end(), options.begin(), options.end());
  return stack;
}

// Its results, the first `results`, with their gradients. _name gives them and what _name_backward wants beside them; that
// takes the gradients of the results, the tensors, the options, and all that _name gave.
struct Traced : torch::autograd::Function<Traced> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const Beside& beside, size_t results) {
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list made = called("mimic_core::_" + beside.name, stack_of(tensors, beside.options)), kept = tensors.vec();
    kept.insert(kept.end(), made.begin(), made.end());
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["name"] = beside.name;
    ctx->saved_data["options"] = c10::ivalue::Tuple::create(beside.options);
    ctx->saved_data["tensors"] = static_cast<int64_t>(tensors.size());
    made.resize(results);
    return made;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list kept = ctx->get_saved_variables();
    const auto tensors = kept.begin() + ctx->saved_data["tensors"].toInt();
    variable_list found, of(grads);
    of.insert(of.end(), kept.begin(), tensors);
    {
      at::AutoDispatchBelowADInplaceOrView below;
      Stack stack = stack_of(of, ctx->saved_data["options"].toTupleRef().elements().vec());
      stack.insert(stack.end(), tensors, kept.end());
      found = called("mimic_core::_" + ctx->saved_data["name"].toStringRef() + "_backward", std::move(stack));
    }
    found.resize(found.size() + 2);  // what is no tensor
    return once_differentiable(std::move(found), of);
  }
};

// An op of tensors that Python or functorch stands behind.
variable_list traced(const Beside& beside, const variable_list& tensors, size_t results) {
  for (const auto& x : tensors) {
    if (wants_gradient(x)) return Traced::apply(at::TensorList(tensors), beside, results);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return called("mimic_core::" + beside.name, stack_of(tensors, beside.options));
}

Beside attention_beside(const char* name, const MaybeTensor& mask, MaybeNumber scale, bool is_causal) {
  TORCH_CHECK_VALUE(!mask || !wants_gradient(*mask), "mimic_core::", name, " passes no gradient to its mask");
  return {name, {mask, scale, is_causal}};
}

// --- what the graphs run

Tensor by_token(const Tensor& x) { return x.transpose(1, 2).contiguous().transpose(1, 2); }

Call call_again(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, MaybeNumber scale, bool is_causal) {
  return taken(call_of(q, k, v, mask, scale, is_causal, kNobody), "shifted_attention");
}

// What a kernel's backward asks back of its forward, where that is another node of a graph: without dropout it is not read.
Attended attended_again(const Call& c, const Tensor& lse) {
  const Tensor unread = on_gpu(c.q) ? at::zeros({2}, c.q.options().dtype(at::kLong)) : Tensor();
  return {Tensor(), lse, unread, unread, Tensor(), Tensor()};
}

// The gradients of the keys or values that were given, from those of what `prepare` made of them.
Tensor for_keys(Tensor x, const Tensor& keys) {
  if (x.size(1) != keys.size(1)) x = x.unflatten(1, {keys.size(1), -1}).sum(2);
  return by_token(x.size(2) == keys.size(2) ? x : at::constant_pad_nd(x, {0, 0, 0, keys.size(2) - x.size(2)}));
}

#define QKV const Tensor &q, const Tensor &k, const Tensor &v
#define SHIFT const Tensor &vector, const Tensor &weight, const Tensor &bias
#define OPTIONS const MaybeTensor &mask, MaybeNumber scale, bool is_causal

Tensor shifted(QKV, SHIFT, OPTIONS) {
  const at::NoGradGuard no_grad;
  return taken(shifted_attention(q, k, v, vector, weight, bias, mask, scale, is_causal), "shifted_attention").contiguous();
}

Three shifted_kept(QKV, SHIFT, OPTIONS) {
  const at::NoGradGuard no_grad;
  const Call c = call_again(q, k, v, mask, scale, is_causal);
  TORCH_CHECK_VALUE(takes_shift(q, q.size(3), vector, weight, bias), "mimic_core: a shift of other sizes than its attention");
  const auto [a, out, mu] = shifted_forward(c, {vector, weight, bias});
  return {out.contiguous(), a.lse_of_rows(q.size(2)).contiguous(), mu};
}

Six shifted_gradients(const Tensor& grad, QKV, SHIFT, OPTIONS, const Tensor& out, const Tensor& lse, const Tensor& mu) {
  const at::NoGradGuard no_grad;
  const Call c = call_again(q, k, v, mask, scale, is_causal);
  const auto x = shifted_backward(grad, c, attended_again(c, lse), out, mu, {vector, weight, bias}, true, false);
  return {by_token(x[0]), for_keys(x[1], k), for_keys(x[2], v), x[3], x[4], x[5]};
}

Two attention(QKV, OPTIONS) {
  const at::NoGradGuard no_grad;
  const auto [out, lse] = taken(attention_with_lse(q, k, v, mask, scale, is_causal), "attention_with_lse");
  return {out.contiguous(), lse.contiguous()};
}

Three attention_gradients(const MaybeTensor& of_out, const MaybeTensor& of_lse, QKV, OPTIONS, const Tensor& out,
                          const Tensor& lse) {
  const at::NoGradGuard no_grad;
  const Call c = call_again(q, k, v, mask, scale, is_causal);
  // Where a row sees no key the LSE is -inf here, and finite to the kernel: nothing is passed on through either.
  const auto seen = [&](const Tensor& x) {
    return c.attends.defined() ? x.masked_fill(c.attends.logical_not(), 0.0) : x;
  };
  const auto x = attention_backward(of_out ? of_out->transpose(1, 2) : Tensor(), of_lse ? seen(*of_lse) : Tensor(), c,
                                    attended_again(c, seen(lse)), out.transpose(1, 2));
  return {by_token(x[0]), for_keys(x[1], k), x[2].defined() ? for_keys(x[2], v) : at::zeros_like(v)};
}

Tensor norm(const Tensor& x, const Tensor& vector, const Tensor& scale) {
  const at::NoGradGuard no_grad;
  return taken(norm_preserving_add(x, vector, scale, 1.0), "norm_preserving_add").contiguous();
}

Three norm_gradients(const Tensor& grad, const Tensor& x, const Tensor& vector, const Tensor& scale, const Tensor&) {
  const at::NoGradGuard no_grad;
  const auto [dx, d_vector, d_scale] =
      norm_gradient_rows(grad.contiguous(), x.contiguous(), parameter(vector, wide(x)), factor(scale, 1.0, x));
  return {dx, gradient_of(vector, d_vector), gradient_of(scale, d_scale)};
}

// --- their shapes

Tensor new_of(const Tensor& x, std::initializer_list<int> axes, at::ScalarType dtype) {
  c10::SymDimVector sizes;
  for (const int axis : axes) sizes.push_back(x.sym_size(axis));
  return at::empty_symint(sizes, x.options().dtype(dtype));
}

Tensor same(const Tensor& x) { return at::empty_symint(x.sym_sizes(), x.options()); }
Tensor same_by_token(const Tensor& x) { return new_of(x, {0, 2, 1, 3}, x.scalar_type()).transpose(1, 2); }
Tensor shape_of_out(const Tensor& q) { return new_of(q, {0, 2, 1, 3}, q.scalar_type()); }
Tensor shape_of_rows(const Tensor& q) { return new_of(q, {0, 1, 2}, wide(q)); }

Tensor shifted_shape(QKV, SHIFT, OPTIONS) { return shape_of_out(q); }
Three shifted_kept_shape(QKV, SHIFT, OPTIONS) { return {shape_of_out(q), shape_of_rows(q), shape_of_rows(q)}; }
Six shifted_gradients_shape(const Tensor&, QKV, SHIFT, OPTIONS, const Tensor&, const Tensor&, const Tensor&) {
  return {same_by_token(q), same_by_token(k), same_by_token(v), same(vector), same(weight), same(bias)};
}
Two attention_shape(QKV, OPTIONS) { return {shape_of_out(q), shape_of_rows(q)}; }
Three attention_gradients_shape(const MaybeTensor&, const MaybeTensor&, QKV, OPTIONS, const Tensor&, const Tensor&) {
  return {same_by_token(q), same_by_token(k), same_by_token(v)};
}
Tensor norm_shape(const Tensor& x, const Tensor&, const Tensor&) { return same(x); }
Three norm_gradients_shape(const Tensor&, const Tensor& x, const Tensor& vector, const Tensor& scale, const Tensor&) {
  return {same(x), same(vector), same(scale)};
}

// --- with gradients: where inputs want some and where they don't, so the strides are those of the shapes above

Tensor shifted_with_gradients(QKV, SHIFT, OPTIONS) {
  if (auto out = shifted_attention(q, k, v, vector, weight, bias, mask, scale, is_causal)) return out->contiguous();
  return traced(attention_beside("shifted_attention", mask, scale, is_causal), {q, k, v, vector, weight, bias}, 1)[0];
}

Two attention_with_gradients(QKV, OPTIONS) {
  if (const auto found = attention_with_lse(q, k, v, mask, scale, is_causal)) {
    return {std::get<0>(*found).contiguous(), std::get<1>(*found).contiguous()};
  }
  const auto made = traced(attention_beside("attention_with_lse", mask, scale, is_causal), {q, k, v}, 2);
  return {made[0], made[1]};
}

Tensor norm_with_gradients(const Tensor& x, const Tensor& vector, const Tensor& scale) {
  if (auto out = norm_preserving_add(x, vector, scale, 1.0)) return out->contiguous();
  return traced({"norm_preserving_add", {}}, {x, vector, scale}, 1)[0];
}

#undef QKV
#undef SHIFT
#undef OPTIONS

// --- registered

TORCH_LIBRARY(mimic_core, m) {
  const std::string qkv = "Tensor q, Tensor k, Tensor v, ", norm = "Tensor x, Tensor vector, Tensor scale";
  const std::string shift = "Tensor vector, Tensor gate_weight, Tensor gate_bias, ";
  const std::string options = "Tensor? mask=None, float? scale=None, bool is_causal=False";
  const std::string given = "Tensor? mask, float? scale, bool is_causal";
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  define("shifted_attention(" + qkv + shift + options + ") -> Tensor");
  define("_shifted_attention(" + qkv + shift + given + ") -> (Tensor, Tensor, Tensor)");
  define("_shifted_attention_backward(Tensor grad, " + qkv + shift + given +
        ", Tensor out, Tensor lse, Tensor mu) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  define("attention_with_lse(" + qkv + options + ") -> (Tensor, Tensor)");
  define("_attention_with_lse(" + qkv + given + ") -> (Tensor, Tensor)");
  define("_attention_with_lse_backward(Tensor? of_out, Tensor? of_lse, " + qkv + given +
        ", Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)");
  define("norm_preserving_add(" + norm + ") -> Tensor");
  define("_norm_preserving_add(" + norm + ") -> Tensor");
  define("_norm_preserving_add_backward(Tensor grad, " + norm + ", Tensor out) -> (Tensor, Tensor, Tensor)");
}

void register_kernels(torch::Library& m) {
  m.impl("shifted_attention", &shifted);
  m.impl("_shifted_attention", &shifted_kept);
  m.impl("_shifted_attention_backward", &shifted_gradients);
  m.impl("attention_with_lse", &attention);
  m.impl("_attention_with_lse", &attention);
  m.impl("_attention_with_lse_backward", &attention_gradients);
  m.impl("norm_preserving_add", &norm);
  m.impl("_norm_preserving_add", &norm);
  m.impl("_norm_preserving_add_backward", &norm_gradients);
}

TORCH_LIBRARY_IMPL(mimic_core, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(mimic_core, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(mimic_core, Meta, m) {
  m.impl("shifted_attention", &shifted_shape);
  m.impl("_shifted_attention", &shifted_kept_shape);
  m.impl("_shifted_attention_backward", &shifted_gradients_shape);
  m.impl("attention_with_lse", &attention_shape);
  m.impl("_attention_with_lse", &attention_shape);
  m.impl("_attention_with_lse_backward", &attention_gradients_shape);
  m.impl("norm_preserving_add", &norm_shape);
  m.impl("_norm_preserving_add", &norm_shape);
  m.impl("_norm_preserving_add_backward", &norm_gradients_shape);
}

TORCH_LIBRARY_IMPL(mimic_core, Autograd, m) {
  m.impl("shifted_attention", &shifted_with_gradients);
  m.impl("attention_with_lse", &attention_with_gradients);
  m.impl("norm_preserving_add", &norm_with_gradients);
}

}  // namespace mimic_core::dispatch
