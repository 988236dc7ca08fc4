// The row loops around a CPU attention kernel: gate and shift, and their half of the folded backward, one pass each.
//
// Tensors are handed over as torch has them, any strides with a contiguous last axis. The maths is fp32 (fp64 for fp64).
// The Python beside it (_epilogue.py) is the same in plain torch; tests hold the two together.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "native_rows.h"

namespace {

using at::Tensor;

template <typename S>
void shift_rows(const Tensor& out, const Tensor& q, const Tensor& lse, const Tensor* attends, const Tensor& vector,
                const Tensor& weight, const Tensor& bias, const Tensor* mu) {
  using A = at::opmath_type<S>;
  const int64_t d = q.size(3), e = out.size(3);
  const Tensor v = parameter<A>(vector), w = parameter<A>(weight), c = parameter<A>(bias);
  const A *vp = v.const_data_ptr<A>(), *wp = w.const_data_ptr<A>(), *cp = c.const_data_ptr<A>();
  const auto out_rows = bth<S>(out), q_rows = bht<S>(q);
  const auto lse_rows = bht<A>(lse), mu_rows = mu ? bht<A>(*mu) : Rows<A>{};
  const auto seen = attends ? bht<bool>(*attends) : Rows<bool>{};
  for_rows(q.size(0), q.size(1), q.size(2), [&] {
    return [&, copy = std::vector<A>(std::max(d, e))](int64_t b, int64_t h, int64_t t) mutable {
      const A log_z2 = *lse_rows.at(b, h, t);
      A m = 0;
      if ((!attends || *seen.at(b, h, t)) && log_z2 != -std::numeric_limits<A>::infinity()) {
        const A* query = wide_row(q_rows.at(b, h, t), copy.data(), d);
        m = 1 / (1 + std::exp(log_z2 - cp[h] - dot(query, wp + h * d, d)));
      }
      if (mu) *mu_rows.at(b, h, t) = m;
      S* row = out_rows.at(b, h, t);
      add_scaled(row, row, m, vp + h * e, copy.data(), e);
    };
  });
}

void dispatch_shift(const Tensor& out, const Tensor& q, const Tensor& lse, const Tensor* attends, const Tensor& vector,
                    const Tensor& weight, const Tensor& bias, const Tensor* mu) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "shift_rows", [&] {
    shift_rows<scalar_t>(out, q, lse, attends, vector, weight, bias, mu);
  });
}

Tensor gated_shift_(const Tensor& out, const Tensor& q, const Tensor& lse, const std::optional<Tensor>& attends,
                    const Tensor& vector, const Tensor& weight, const Tensor& bias) {
  const auto options = q.options().dtype(at::toOpMathType(q.scalar_type())).requires_grad(false);
  const Tensor mu = at::empty({q.size(0), q.size(1), q.size(2)}, options);
  const Tensor seen = attends ? attends->expand(mu.sizes()) : Tensor();
  dispatch_shift(out, q, lse, attends ? &seen : nullptr, vector, weight, bias, &mu);
  return mu;
}

// `sums` is [parts, h, e + d + 1] in double: of the vector, the gate's weight and its bias.
template <typename S>
void gradient_rows(const Tensor& grad, const Tensor& shifted, const Tensor& q, const Tensor& mu, const Tensor& vector,
                   const Tensor* out_hat, const Tensor& df, const Tensor& sums) {
  using A = at::opmath_type<S>;
  const int64_t heads = q.size(1), tokens = q.size(2), d = q.size(3), e = grad.size(3), width = e + d + 1;
  const Tensor v = parameter<A>(vector);
  const A* vp = v.const_data_ptr<A>();
  const auto g_rows = bth<S>(grad), s_rows = bth<S>(shifted), q_rows = bht<S>(q);
  const auto o_rows = out_hat ? bth<S>(*out_hat) : Rows<S>{};
  const auto mu_rows = bht<A>(mu), df_rows = bht<A>(df);
  const int64_t blocks = (tokens + kBlock - 1) / kBlock, all = q.size(0) * blocks, parts = sums.size(0);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> block(heads * width), copy(std::max(d, e));
    for (int64_t part = begin; part < end; ++part) {
      double* total = sums.data_ptr<double>() + part * heads * width;
      for (int64_t i = part * all / parts; i < (part + 1) * all / parts; ++i) {
        const int64_t b = i / blocks, first = i % blocks * kBlock;
        std::fill(block.begin(), block.end(), A(0));
        for (int64_t t = first; t < std::min(first + kBlock, tokens); ++t) {
          for (int64_t h = 0; h < heads; ++h) {
            A* sum = block.data() + h * width;
            const A *vec = vp + h * e, m = *mu_rows.at(b, h, t);
            const A* g = wide_row(g_rows.at(b, h, t), copy.data(), e);
            const A f = m * (1 - m) * dot(g, vec, e);
            *df_rows.at(b, h, t) = f;
            accumulate(sum, m, g, e);
            accumulate(sum + e, f, wide_row(q_rows.at(b, h, t), copy.data(), d), d);
            sum[e + d] += f;
            if (out_hat) add_scaled(o_rows.at(b, h, t), s_rows.at(b, h, t), -m * m, vec, copy.data(), e);
          }
        }
        for (int64_t j = 0; j < heads * width; ++j) total[j] += block[j];
      }
    }
  });
}

// out_hat [b t h e] for a flash backward (None unless `attention`), df [b h t], and the gradients of the parameters.
std::tuple<std::optional<Tensor>, Tensor, Tensor, Tensor, Tensor> folded_gradients(
    const Tensor& incoming, const Tensor& shifted, const Tensor& q, const Tensor& mu, const Tensor& vector,
    const Tensor& weight, bool attention) {
  // An expanded one is what .sum() sends back.
  const Tensor grad = incoming.stride(3) == 1 ? incoming : incoming.contiguous();
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), d = q.size(3), e = grad.size(3);
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), b * ((t + kBlock - 1) / kBlock));
  const Tensor sums = at::zeros({parts, h, e + d + 1}, q.options().dtype(at::kDouble).requires_grad(false));
  const Tensor df = at::empty_like(mu);
  const Tensor out_hat = attention ? at::empty(grad.sizes(), q.options().requires_grad(false)) : Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "gradient_rows", [&] {
    gradient_rows<scalar_t>(grad, shifted, q, mu, vector, attention ? &out_hat : nullptr, df, sums);
  });
  const Tensor sum = sums.sum(0);
  return {attention ? std::optional<Tensor>(out_hat) : std::nullopt, df,
          sum.narrow(1, 0, e).to(vector.scalar_type()), sum.narrow(1, e, d).to(weight.scalar_type()),
          sum.select(1, e + d).to(weight.scalar_type())};
}

void add_to_dq_(const Tensor& dq, const Tensor& df, const Tensor& weight) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dq.scalar_type(), "add_to_dq", [&] {
    using A = at::opmath_type<scalar_t>;
    const int64_t d = dq.size(3);
    const Tensor w = parameter<A>(weight);
    const A* wp = w.const_data_ptr<A>();
    const auto rows = bht<scalar_t>(dq);
    const auto df_rows = bht<A>(df);
    for_rows(dq.size(0), dq.size(1), dq.size(2), [&] {
      return [&, copy = std::vector<A>(d)](int64_t b, int64_t h, int64_t t) mutable {
        scalar_t* row = rows.at(b, h, t);
        add_scaled(row, row, *df_rows.at(b, h, t), wp + h * d, copy.data(), d);
      };
    });
  });
}

bool plain(const Tensor& x) {
  // A wrapped tensor (fake, functorch, a subclass) has no memory to read here.
  static const c10::DispatchKeySet odd({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                        c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
                                        c10::DispatchKey::Conjugate, c10::DispatchKey::Negative,
                                        c10::DispatchKey::ZeroTensor});
  return x.is_cpu() && x.layout() == at::kStrided && !x.key_set().has_any(odd);
}

// 0 where allowed, -inf (its bit pattern) where not, and whether a row allows anything, in one pass.
template <typename U>
void mask_rows(const Tensor& allowed, U forbidden, const Tensor& added, const Tensor& attends) {
  const int64_t s = allowed.size(3);
  const auto* from = reinterpret_cast<const uint8_t*>(allowed.const_data_ptr<bool>());
  auto* to = static_cast<U*>(added.data_ptr());
  bool* some = attends.data_ptr<bool>();
  at::parallel_for(0, attends.numel(), std::max<int64_t>(1, kRows * 64 / s), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint8_t any = 0;
#pragma omp simd reduction(| : any)
      for (int64_t j = 0; j < s; ++j) {
        any |= from[i * s + j];
        to[i * s + j] = from[i * s + j] ? U(0) : forbidden;
      }
      some[i] = any != 0;
    }
  });
}

// A bool mask as numbers to add in the dtype of q, and the rows that attend; None: it needs preparation.
std::optional<std::tuple<Tensor, Tensor>> additive_mask(const Tensor& mask, const Tensor& q) {
  if (!plain(mask) || mask.scalar_type() != at::kBool || mask.dim() != 4 || mask.numel() == 0) return std::nullopt;
  const Tensor allowed = mask.contiguous();
  const Tensor added = at::empty(mask.sizes(), q.options().requires_grad(false));
  const Tensor attends = at::empty(mask.sizes().slice(0, 3), mask.options());
  const auto dtype = q.scalar_type();
  if (dtype == at::kFloat) mask_rows<uint32_t>(allowed, 0xff800000u, added, attends);
  else if (dtype == at::kDouble) mask_rows<uint64_t>(allowed, 0xfff0000000000000u, added, attends);
  else if (dtype == at::kBFloat16) mask_rows<uint16_t>(allowed, 0xff80u, added, attends);
  else if (dtype == at::kHalf) mask_rows<uint16_t>(allowed, 0xfc00u, added, attends);
  else return std::nullopt;
  return std::make_tuple(added, attends);
}

bool wants_grad(const Tensor& x) { return x.requires_grad() && c10::GradMode::is_enabled(); }

bool is_parameter(const Tensor& x, const Tensor& q) {
  const auto dtype = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return plain(x) && x.scalar_type() == dtype && x.is_contiguous() && !wants_grad(x);
}

bool are_parameters(const Tensor& vector, const Tensor& weight, const Tensor& bias, const Tensor& q, int64_t e) {
  const int64_t h = q.size(1), d = q.size(3);
  return is_parameter(vector, q) && is_parameter(weight, q) && is_parameter(bias, q) && vector.dim() == 2 &&
         vector.size(0) == h && vector.size(1) == e && weight.dim() == 2 && weight.size(0) == h &&
         weight.size(1) == d && bias.dim() == 1 && bias.size(0) == h;
}

bool is_supported(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

// The shift of an output that stays as it is, without gradients; None: the arguments need preparation.
std::optional<Tensor> gated_shift(const Tensor& attn_out, const Tensor& q, const Tensor& lse, const Tensor& vector,
                                  const Tensor& weight, const Tensor& bias) {
  if (!plain(attn_out) || !plain(q) || !plain(lse) || q.dim() != 4 || attn_out.dim() != 4 || lse.dim() != 3)
    return std::nullopt;
  const auto dtype = q.scalar_type();
  if (!is_supported(dtype) || attn_out.scalar_type() != dtype || lse.scalar_type() != at::toOpMathType(dtype))
    return std::nullopt;
  for (int64_t i = 0; i < 3; ++i)
    if (lse.size(i) != q.size(i)) return std::nullopt;
  if (attn_out.size(0) != q.size(0) || attn_out.size(1) != q.size(2) || attn_out.size(2) != q.size(1))
    return std::nullopt;
  if (q.numel() == 0 || attn_out.numel() == 0 || q.stride(3) != 1) return std::nullopt;
  if (!are_parameters(vector, weight, bias, q, attn_out.size(3))) return std::nullopt;
  const Tensor out = attn_out.clone(at::MemoryFormat::Contiguous);
  dispatch_shift(out, q, lse, nullptr, vector, weight, bias, nullptr);
  return out;
}

// Attention, gate and shift without gradients, for arguments that need no preparation; None: they do.
// One call from Python instead of a dozen, and the checks with it: a token decoded at a time is all overhead.
std::optional<Tensor> shifted_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& vector,
                                        const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& mask,
                                        std::optional<double> scale, bool is_causal, bool grouped) {
  if (!plain(q) || !plain(k) || !plain(v) || wants_grad(q) || wants_grad(k) || wants_grad(v)) return std::nullopt;
  if (q.dim() != 4 || k.dim() != 4 || k.sizes() != v.sizes()) return std::nullopt;
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), d = q.size(3), g = k.size(1), s = k.size(2);
  const auto dtype = q.scalar_type();
  if (!is_supported(dtype) || k.scalar_type() != dtype || v.scalar_type() != dtype) return std::nullopt;
  if (k.size(0) != b || k.size(3) != d || g == 0 || h % g || (g != h && !grouped)) return std::nullopt;
  if (b == 0 || t == 0 || s == 0 || d == 0 || (is_causal && (mask || t != s))) return std::nullopt;
  if (q.stride(3) != 1 || k.stride(3) != 1 || v.stride(3) != 1) return std::nullopt;
  if (scale && !(*scale > 0 && std::isfinite(*scale))) return std::nullopt;
  if (!are_parameters(vector, weight, bias, q, d)) return std::nullopt;
  Tensor added, attends;
  if (mask) {
    const Tensor& m = *mask;
    if (!plain(m) || m.dim() != 4 || m.size(3) != s || m.requires_grad()) return std::nullopt;
    for (int64_t i = 0; i < 3; ++i)
      if (m.size(i) != 1 && m.size(i) != q.size(i)) return std::nullopt;
    if (m.scalar_type() == at::kBool) {
      std::tie(added, attends) = *additive_mask(m, q);
    } else if (m.scalar_type() == dtype && m.stride(3) == 1) {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, "lowest", [&] {
        attends = m.amax(-1).gt(static_cast<double>(std::numeric_limits<scalar_t>::lowest()));
      });
      added = m;
    } else {
      return std::nullopt;
    }
    attends = attends.expand({b, h, t});
  }
  const auto result = at::_scaled_dot_product_flash_attention_for_cpu(
      q, k, v, 0.0, is_causal, mask ? std::optional<Tensor>(added) : std::nullopt,
      scale ? *scale : 1 / std::sqrt(static_cast<double>(d)));
  const Tensor out = std::get<0>(result).transpose(1, 2);
  dispatch_shift(out, q, std::get<1>(result), mask ? &attends : nullptr, vector, weight, bias, nullptr);
  return out;
}

template <typename S>
void norm_rows(const Tensor& x, const Tensor& vector, double scale, const Tensor& out) {
  using A = at::opmath_type<S>;
  const int64_t c = x.size(-1);
  const A *vp = vector.const_data_ptr<A>(), a = static_cast<A>(scale);
  const S* xp = x.const_data_ptr<S>();
  S* op = out.data_ptr<S>();
  at::parallel_for(0, x.numel() / c, std::max<int64_t>(1, kRows * 64 / c), [&](int64_t begin, int64_t end) {
    std::vector<A> moved(c);
    A* m = moved.data();
    for (int64_t i = begin; i < end; ++i) {
      const A* row = wide_row(xp + i * c, m, c);
      A before = 0, after = 0;
#pragma omp simd reduction(+ : before, after)
      for (int64_t j = 0; j < c; ++j) {
        const A old = row[j], sum = old + a * vp[j];
        before += old * old;
        after += sum * sum;
        m[j] = sum;
      }
      const A ratio = after > 0 ? std::sqrt(before) / std::sqrt(after) : std::sqrt(before);
      A* to = m;
      if constexpr (std::is_same_v<S, A>) to = op + i * c;
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) to[j] = m[j] * ratio;
      if constexpr (!std::is_same_v<S, A>) narrow(m, op + i * c, c);
    }
  });
}

bool is_norm_call(const Tensor& x, const Tensor& vector) {
  return plain(x) && x.dim() > 0 && x.numel() > 0 && x.is_contiguous() && at::isFloatingType(x.scalar_type()) &&
         plain(vector) && vector.is_contiguous() && vector.dim() == 1 && vector.size(0) == x.size(-1) &&
         vector.scalar_type() == at::toOpMathType(x.scalar_type());
}

// (x + a v) |x| / |x + a v|, row by row, without gradients.
Tensor norm_preserving_add_(const Tensor& x, const Tensor& vector, double scale) {
  const Tensor out = at::empty(x.sizes(), x.options().requires_grad(false));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "norm_rows",
                                  [&] { norm_rows<scalar_t>(x, vector, scale, out); });
  return out;
}

// The same for whatever is given; None: gradients are wanted, or the arguments need preparation.
std::optional<Tensor> norm_preserving_add(const Tensor& x, const Tensor& vector, const Tensor& scale) {
  if (!is_norm_call(x, vector) || wants_grad(x) || wants_grad(vector)) return std::nullopt;
  if (!plain(scale) || scale.numel() != 1 || wants_grad(scale)) return std::nullopt;
  return norm_preserving_add_(x, vector, scale.item<double>());
}

// Whether torch's scaled_dot_product_attention would run the CPU flash kernel on the call; `_cpu.follows_sdpa`.
bool follows_sdpa(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double scale,
                  bool is_causal) {
  constexpr int64_t flash = 1;  // torch.nn.attention.SDPBackend.FLASH_ATTENTION
  if (!q.is_cpu() || q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || v.size(3) != q.size(3)) return false;
  if (q.size(0) == 0 || q.size(2) == 0 || k.size(2) == 0 || (mask && mask->requires_grad())) return false;
  return at::_fused_sdp_choice(q, k, v, mask, 0.0, is_causal, scale, k.size(1) != q.size(1)) == flash;
}

template <typename S>
void norm_gradient_rows(const Tensor& x, const Tensor& vector, double scale, const Tensor& grad, const Tensor& dx,
                        const Tensor& sums) {
  using A = at::opmath_type<S>;
  const int64_t c = x.size(-1), rows = x.numel() / c, parts = sums.size(0);
  const A *vp = vector.const_data_ptr<A>(), a = static_cast<A>(scale);
  const S *xp = x.const_data_ptr<S>(), *gp = grad.const_data_ptr<S>();
  S* dp = dx.data_ptr<S>();
  double* sp = sums.data_ptr<double>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> sum(c), moved(c), grad_copy(c), row_copy(c);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * rows / parts, last = (part + 1) * rows / parts;
      for (int64_t start = first; start < last; start += kBlock) {
        std::fill(sum.begin(), sum.end(), A(0));
        A *total = sum.data(), *m = moved.data();
        for (int64_t i = start; i < std::min(start + kBlock, last); ++i) {
          const A* row = wide_row(xp + i * c, row_copy.data(), c);
          const A* g = wide_row(gp + i * c, grad_copy.data(), c);
          A before = 0, after = 0, along = 0;
#pragma omp simd reduction(+ : before, after, along)
          for (int64_t j = 0; j < c; ++j) {
            m[j] = row[j] + a * vp[j];
            before += row[j] * row[j];
            after += m[j] * m[j];
            along += g[j] * m[j];
          }
          // With n = |x|, l = |m|: dm = n / l (g - (g.m) m / l^2), dx = dm + (g.m) x / (l n). A norm's gradient at 0 is 0.
          const A ratio = after > 0 ? std::sqrt(before) / std::sqrt(after) : std::sqrt(before);
          const A of_m = after > 0 ? along * ratio / after : A(0);
          const A of_x = after > 0 && before > 0 ? along / (std::sqrt(after) * std::sqrt(before)) : A(0);
          A* to = m;
          if constexpr (std::is_same_v<S, A>) to = dp + i * c;
#pragma omp simd
          for (int64_t j = 0; j < c; ++j) {
            const A dm = ratio * g[j] - of_m * m[j];
            total[j] += dm;
            to[j] = dm + of_x * row[j];
          }
          if constexpr (!std::is_same_v<S, A>) narrow(m, dp + i * c, c);
        }
        for (int64_t j = 0; j < c; ++j) sp[part * c + j] += sum[j];
      }
    }
  });
}

// Gradients of x, the vector and the scale. `x` and `vector` as norm_preserving_add takes them.
std::tuple<Tensor, Tensor, Tensor> norm_gradients(const Tensor& x, const Tensor& vector, double scale,
                                                  const Tensor& incoming) {
  const Tensor grad = incoming.contiguous(), dx = at::empty(x.sizes(), x.options().requires_grad(false));
  const int64_t rows = x.numel() / x.size(-1), parts = std::min<int64_t>(rows, at::get_num_threads());
  const Tensor sums = at::zeros({parts, x.size(-1)}, x.options().dtype(at::kDouble).requires_grad(false));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "norm_gradient_rows", [&] {
    norm_gradient_rows<scalar_t>(x, vector, scale, grad, dx, sums);
  });
  const Tensor moved = sums.sum(0);
  return {dx, (moved * scale).to(vector.scalar_type()),
          moved.dot(vector.detach().to(at::kDouble)).to(vector.scalar_type())};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("gated_shift", &gated_shift, unlocked());
  m.def("gated_shift_", &gated_shift_, unlocked());
  m.def("folded_gradients", &folded_gradients, unlocked());
  m.def("add_to_dq_", &add_to_dq_, unlocked());
  m.def("shifted_attention", &shifted_attention, unlocked());
  m.def("additive_mask", &additive_mask, unlocked());
  m.def("follows_sdpa", &follows_sdpa);
  m.def("norm_preserving_add", &norm_preserving_add, unlocked());
  m.def("norm_preserving_add_", &norm_preserving_add_, unlocked());
  m.def("takes_norm", &is_norm_call);
  m.def("norm_gradients", &norm_gradients, unlocked());
}
