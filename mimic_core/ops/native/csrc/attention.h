// torch's attention kernels that give their log-sum-exp, forward and backward, and what each wants of its arguments.

#pragma once

#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/any.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tril.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "cpu_shift.h"

namespace mimic_core {

// The numbers of torch.nn.attention.SDPBackend, which _fused_sdp_choice answers with. On a CPU flash is another kernel.
enum Kernel : int64_t { kMath = 0, kFlash = 1, kEfficient = 2, kCuDNN = 3 };

// Given fewer key/value heads than query heads, the CPU kernel of torch 2.6 reads past their end; 2.13's is right.
constexpr bool kGroupedOnCPU = TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 13);
// Elements: what the memory-efficient kernel wants a row of its bias to start at, and how it pads its LSE.
constexpr int64_t kAlignment = 16, kPadding = 32;

// Whether the CPU kernel's backward is fast in bf16: set by Python, which torch tells of the processor.
inline bool bf16_instructions = false;

// One call as a kernel takes it: what it would get wrong silently is out of the way. What is undefined is not there.
struct Call {
  Tensor q, k, v;        // [b h t d], [b g s d], [b g s d], the last axis contiguous
  Tensor mask, attends;  // [#b #h #t s], added to the logits in q's dtype; [#b #h #t], which rows may attend to a key
  double scale;
  bool is_causal;
  Kernel kernel;
  std::optional<Tensor> bias() const { return mask.defined() ? std::optional<Tensor>(mask) : std::nullopt; }
};

// What a kernel's forward gives: out [b h t d] in its own order of memory, lse [b h t'] with t' >= t, and what its
// backward asks back.
struct Attended {
  Tensor out, lse, seed, offset, lengths_q, lengths_k;
  Tensor lse_of_rows(int64_t t) const { return lse.size(2) == t ? lse : lse.narrow(2, 0, t); }
};

inline Tensor last_axis_contiguous(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

inline Tensor repeated(const Tensor& x, int64_t heads) {
  const auto size = x.sizes();
  return x.unsqueeze(2).expand({size[0], size[1], heads / size[1], size[2], size[3]}).reshape({size[0], heads, size[2], size[3]});
}

// Query i attends to keys 0..i: aligned at the upper left, as torch's is_causal is.
inline Tensor causal_mask(const Tensor& q, const Tensor& k) {
  return at::ones({1, 1, q.size(2), k.size(2)}, q.options().dtype(at::kBool)).tril();
}

inline double lowest(at::ScalarType dtype) {
  double found = 0;
  MIMIC_CORE_DISPATCH(dtype, "lowest", [&] { found = static_cast<double>(std::numeric_limits<scalar_t>::lowest()); });
  return found;
}

// The same numbers, each row at an address a CUDA kernel can load whole vectors from.
inline Tensor aligned(const Tensor& mask) {
  bool fits = mask.stride(-1) == 1;
  for (int64_t i = 0; i < 3; ++i) fits = fits && (mask.size(i) == 1 || mask.stride(i) % kAlignment == 0);
  if (fits) return mask;
  const int64_t s = mask.size(-1), wanted = (s + kAlignment - 1) / kAlignment * kAlignment;
  return at::constant_pad_nd(mask, {0, wanted - s}).narrow(-1, 0, s);
}

// The kernel torch's scaled_dot_product_attention runs on a call; kMath where that is none that gives an LSE.
inline Kernel torchs_choice(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale,
                            bool is_causal) {
  const bool grouped = k.size(1) != q.size(1);
  const auto ask = [&](const Tensor& of_q, const Tensor& bias, bool enable_gqa) {
    const std::optional<Tensor> given = bias.defined() ? std::optional<Tensor>(bias) : std::nullopt;
    return static_cast<Kernel>(at::_fused_sdp_choice(of_q, k, v, given, 0.0, is_causal, scale, enable_gqa));
  };
  // Under a mask transformers repeats the keys on CUDA, where no kernel takes both; the choice does not count heads.
  if (grouped && mask.defined() && on_gpu(q))
    return ask(q.narrow(1, 0, k.size(1)), mask.size(1) == 1 ? mask : mask.narrow(1, 0, k.size(1)), false);
  return ask(q, mask, grouped);
}

// Whether `mask` is bool, 0 or -inf, or the dtype's lowest number: what a kernel adds to the logits, and which rows [#b #h
// #t] may attend to a key.
inline std::tuple<Tensor, Tensor> additive(const Tensor& mask, const Tensor& q) {
  if (mask.scalar_type() != at::kBool) return {mask, mask.amax(-1).gt(lowest(mask.scalar_type()))};
  if (!on_gpu(q)) return cpu::additive_mask(mask, q.scalar_type());
  const auto options = q.options().requires_grad(false);
  const Tensor nothing = at::full({}, -std::numeric_limits<double>::infinity(), options);
  return {at::where(mask, at::zeros({}, options), nothing), mask.any(-1)};
}

// A call as a kernel takes it. `mask` is [#b #h #t #s], bool or in q's dtype, or undefined. `kernel` is one of torch's, by
// default the one torch would choose; `follow`: only that one will do, and without it there is no call.
inline std::optional<Call> prepare(Tensor q, Tensor k, Tensor v, Tensor mask, double scale, bool is_causal,
                                   std::optional<Kernel> kernel, bool follow) {
  const int64_t t = q.size(2), s = k.size(2);
  const bool on_cpu = !on_gpu(q), given = mask.defined();
  if (is_causal && scale < 0) {
    // The kernels multiply their own -inf by the scale: a negative one makes NaN of it.
    mask = causal_mask(q, k), is_causal = false;
  }
  if (!kernel) {
    // On a CPU there is only one to take, whatever torch would.
    kernel = on_cpu && !follow ? kFlash : torchs_choice(q, k, v, mask, scale, is_causal);
    if (*kernel == kMath) {
      if (follow) return std::nullopt;
      // Where torch's answer is its slow path there is a better one.
      const bool plain = !mask.defined() && !(is_causal && t > s);
      kernel = plain && q.scalar_type() != at::kFloat && q.size(3) <= 256 ? kFlash : kEfficient;
    }
  }
  if (is_causal && t < s) {
    k = k.narrow(2, 0, t), v = v.narrow(2, 0, t);
  } else if (is_causal && t > s) {
    mask = causal_mask(q, k), is_causal = false;
  }
  Tensor attends;
  if (mask.defined()) {
    std::tie(mask, attends) = additive(mask, q);
    if (!given) attends = Tensor();  // causal ones let every row attend to a key
    // torch 2.6 takes the last axis of a CPU's mask for contiguous.
    if (on_cpu) mask = last_axis_contiguous(mask.expand({mask.size(0), mask.size(1), mask.size(2), k.size(2)}));
    else mask = aligned(mask).expand({q.size(0), q.size(1), t, s});
  }
  if (k.size(1) != q.size(1) && (on_cpu ? !kGroupedOnCPU : kernel == kEfficient || mask.defined()))
    k = repeated(k, q.size(1)), v = repeated(v, q.size(1));
  // A last axis that is not contiguous gives a wrong output beside a right LSE.
  q = last_axis_contiguous(q), k = last_axis_contiguous(k), v = last_axis_contiguous(v);
  return Call{q, k, v, mask, attends, scale, is_causal, *kernel};
}

inline Attended attend(const Call& c) {
  Attended a;
  int64_t t = c.q.size(2);
  if (!on_gpu(c.q)) {
    std::tie(a.out, a.lse) =
        at::_scaled_dot_product_flash_attention_for_cpu(c.q, c.k, c.v, 0.0, c.is_causal, c.bias(), c.scale);
  } else if (c.kernel == kFlash) {
    auto made = at::_scaled_dot_product_flash_attention(c.q, c.k, c.v, 0.0, c.is_causal, false, c.scale);
    a = {std::get<0>(made), std::get<1>(made), std::get<6>(made), std::get<7>(made), std::get<2>(made), std::get<3>(made)};
  } else if (c.kernel == kEfficient) {
    std::tie(a.out, a.lse, a.seed, a.offset) =
        at::_scaled_dot_product_efficient_attention(c.q, c.k, c.v, c.bias(), true, 0.0, c.is_causal, c.scale);
  } else {
    auto made = at::_scaled_dot_product_cudnn_attention(c.q, c.k, c.v, c.bias(), true, 0.0, c.is_causal, false, c.scale);
    a = {std::get<0>(made), std::get<1>(made), std::get<6>(made), std::get<7>(made), std::get<2>(made), std::get<3>(made)};
    a.lse = a.lse.reshape({c.q.size(0), c.q.size(1), t});
  }
  return a;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Keys and rows of a call in fp32 at a time, where half precision is computed so on a CPU: an eighth of them all, for the
// copies to be small beside the call itself.
inline int64_t chunk_of(int64_t t, int64_t s) { return std::clamp<int64_t>(std::max(t, s) / 8, 128, 512); }

inline Tensor part_of(const Tensor& mask, int64_t axis, int64_t start, int64_t length) {
  return mask.size(axis) == 1 ? mask : mask.narrow(axis, start, length);
}

// The CPU kernel's backward in fp32 for half precision, in pieces: of all of it at once the copies would take three times
// the memory of the backward itself. Without instructions for bf16 the kernel is 4 to 12 times slower in it.
inline Gradients backward_in_fp32(const Tensor& grad, const Call& c, const Tensor& out, const Tensor& lse) {
  const int64_t b = c.q.size(0), h = c.q.size(1), t = c.q.size(2), g = c.k.size(1), s = c.k.size(2), each = h / g;
  const int64_t chunk = chunk_of(t, s);
  const Tensor dq = at::empty_like(c.q), dk = at::empty_like(c.k), dv = at::empty_like(c.v);
  // Key heads at a time: enough attention heads for all threads.
  const int64_t groups = std::min<int64_t>(g, (at::get_num_threads() + each - 1) / each);
  for (int64_t n = 0; n < b; ++n) {
    for (int64_t g0 = 0; g0 < g; g0 += groups) {
      const int64_t gn = std::min(groups, g - g0), h0 = g0 * each, hn = gn * each;
      const auto rows = [&](const Tensor& x, int64_t first, int64_t length) {
        return x.narrow(0, n, 1).narrow(1, h0, hn).narrow(2, first, length);
      };
      const auto keys = [&](const Tensor& x, int64_t first, int64_t length) {
        return x.narrow(0, n, 1).narrow(1, g0, gn).narrow(2, first, length);
      };
      const Tensor sum_q = at::zeros({1, hn, t, c.q.size(3)}, c.q.options().dtype(at::kFloat));
      for (int64_t s0 = 0; s0 < s; s0 += chunk) {
        const int64_t sn = std::min(chunk, s - s0);
        const Tensor k = keys(c.k, s0, sn).to(at::kFloat), v = keys(c.v, s0, sn).to(at::kFloat);
        const Tensor sum_k = at::zeros(k.sizes(), k.options()), sum_v = at::zeros(v.sizes(), v.options());
        for (int64_t t0 = c.is_causal ? s0 : 0; t0 < t; t0 += chunk) {
          const int64_t tn = std::min(chunk, t - t0);
          std::optional<Tensor> mask;
          if (c.mask.defined())
            mask = part_of(part_of(part_of(part_of(c.mask, 0, n, 1), 1, h0, hn), 2, t0, tn), 3, s0, sn).to(at::kFloat);
          const auto [of_q, of_k, of_v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
              rows(grad, t0, tn).to(at::kFloat), rows(c.q, t0, tn).to(at::kFloat), k, v, rows(out, t0, tn).to(at::kFloat),
              rows(lse, t0, tn), 0.0, c.is_causal && t0 == s0, mask, c.scale);
          sum_q.narrow(2, t0, tn).add_(of_q);
          sum_k.add_(of_k), sum_v.add_(of_v);
        }
        keys(dk, s0, sn).copy_(sum_k);
        keys(dv, s0, sn).copy_(sum_v);
      }
      rows(dq, 0, t).copy_(sum_q);
    }
  }
  return {dq, dk, dv};
}

// x in the memory order of a new tensor like q, which has its sizes.
//
// torch keeps cuDNN's plan of a backward by the sizes and strides of q, k and v, and by the dropout. The strides of `out`
// and `grad` are those of the first call of such a key, which may be anybody's: any others give garbage without a word. So
// both come in one layout each, and a dropout of -0.0, which nobody else has, makes the plans our own.
inline Tensor laid_out_as(const Tensor& x, const Tensor& q) {
  const Tensor like = q.is_non_overlapping_and_dense() ? q : at::empty_like(q);
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) > 1 && x.stride(i) != like.stride(i)) return at::empty_like(q).copy_(x);
  }
  return x;
}

// The gradients of c.q, c.k and c.v. A flash backward uses `out` [b h t d] only for delta = rowsum(grad * out), and `grad`
// [b h t d] has a contiguous last axis.
inline Gradients attend_backward(const Tensor& grad, const Call& c, const Tensor& out, const Attended& a) {
  const int64_t t = c.q.size(2), s = c.k.size(2);
  if (!on_gpu(c.q)) {
    const auto dtype = c.q.scalar_type();
    if (dtype == at::kHalf || (dtype == at::kBFloat16 && !bf16_instructions)) return backward_in_fp32(grad, c, out, a.lse);
    return at::_scaled_dot_product_flash_attention_for_cpu_backward(grad, c.q, c.k, c.v, out, a.lse, 0.0, c.is_causal,
                                                                    c.bias(), c.scale);
  }
  if (c.kernel == kFlash) {
    return at::_scaled_dot_product_flash_attention_backward(grad, c.q, c.k, c.v, out, a.lse, a.lengths_q, a.lengths_k, t, s,
                                                            0.0, c.is_causal, a.seed, a.offset, c.scale);
  }
  if (c.kernel == kEfficient) {
    const int64_t padding = (t + kPadding - 1) / kPadding * kPadding - a.lse.size(2);
    const Tensor lse = padding > 0 ? at::constant_pad_nd(a.lse, {0, padding}) : a.lse;
    const auto [dq, dk, dv, _] = at::_scaled_dot_product_efficient_attention_backward(
        grad, c.q, c.k, c.v, c.mask, out, lse, a.seed, a.offset, 0.0, {true, true, true, false}, c.is_causal, c.scale);
    return {dq, dk, dv};
  }
  const Tensor laid_out_grad = grad.transpose(1, 2).contiguous().transpose(1, 2);
  return at::_scaled_dot_product_cudnn_attention_backward(laid_out_grad, c.q, c.k, c.v, laid_out_as(out, c.q),
                                                          a.lse.unsqueeze(-1), a.seed, a.offset, c.mask, a.lengths_q,
                                                          a.lengths_k, t, s, -0.0, c.is_causal, c.scale);
}

}  // namespace mimic_core
