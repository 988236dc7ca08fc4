// The row loops around an attention kernel on a CPU: gate and shift after it, their share of its backward.
//
// Tensors have any strides with a contiguous last axis; parameters are contiguous, in the dtype of the maths (fp32, fp64
// for fp64). What is undefined is not there.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "rows.h"

namespace mimic_core::cpu {

#define MIMIC_CORE_DISPATCH(dtype, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, name, __VA_ARGS__)

inline bool is_supported(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

template <typename S>
void shift_rows(const Tensor& out, const Tensor& q, const Tensor& lse, const Tensor& attends, const Tensor& vector,
                const Tensor& weight, const Tensor& bias, const Tensor& mu) {
  using A = at::opmath_type<S>;
  const int64_t d = q.size(3), e = out.size(3);
  const A *vp = vector.const_data_ptr<A>(), *wp = weight.const_data_ptr<A>(), *cp = bias.const_data_ptr<A>();
  const auto out_rows = bth<S>(out), q_rows = bht<S>(q);
  const auto lse_rows = bht<A>(lse);
  const auto mu_rows = mu.defined() ? bht<A>(mu) : Rows<A>{};
  const auto seen = attends.defined() ? bht<bool>(attends) : Rows<bool>{};
  for_rows(q.size(0), q.size(1), q.size(2), [&] {
    return [&, copy = Copy<S, A>(std::max(d, e))](int64_t b, int64_t h, int64_t t) mutable {
      const A log_z2 = *lse_rows.at(b, h, t);
      A m = 0;
      if ((!seen.data || *seen.at(b, h, t)) && log_z2 != -std::numeric_limits<A>::infinity()) {
        const A* query = wide_row(q_rows.at(b, h, t), copy.data(), d);
        m = 1 / (1 + std::exp(log_z2 - cp[h] - dot(query, wp + h * d, d)));
      }
      if (mu_rows.data) *mu_rows.at(b, h, t) = m;
      S* row = out_rows.at(b, h, t);
      add_scaled(row, row, m, vp + h * e, copy.data(), e);
    };
  });
}

inline void shift_(const Tensor& out, const Tensor& q, const Tensor& lse, const Tensor& attends, const Tensor& vector,
                   const Tensor& weight, const Tensor& bias, const Tensor& mu) {
  MIMIC_CORE_DISPATCH(q.scalar_type(), "shift", [&] {
    shift_rows<scalar_t>(out, q, lse, attends, vector, weight, bias, mu);
  });
}

// `parts` is [parts, h, e + d + 1] in double: sums for the vector, the gate's weight and its bias.
template <typename S>
void fold_rows(const Tensor& grad, const Tensor& shifted, const Tensor& q, const Tensor& mu, const Tensor& vector,
               const Tensor& hat, const Tensor& df, const Tensor& parts) {
  using A = at::opmath_type<S>;
  const int64_t heads = q.size(1), tokens = q.size(2), d = q.size(3), e = grad.size(3), width = e + d + 1;
  const A* vp = vector.const_data_ptr<A>();
  const auto g_rows = bth<S>(grad), q_rows = bht<S>(q);
  const auto s_rows = hat.defined() ? bth<S>(shifted) : Rows<S>{}, hat_rows = hat.defined() ? bth<S>(hat) : Rows<S>{};
  const auto mu_rows = bht<A>(mu), df_rows = bht<A>(df);
  const int64_t blocks = (tokens + kBlock - 1) / kBlock, all = q.size(0) * blocks, number = parts.size(0);
  at::parallel_for(0, number, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> block(heads * width);
    Copy<S, A> copy(std::max(d, e));
    for (int64_t part = begin; part < end; ++part) {
      double* total = parts.data_ptr<double>() + part * heads * width;
      std::fill_n(total, heads * width, 0.0);
      for (int64_t i = part * all / number; i < (part + 1) * all / number; ++i) {
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
            if (hat_rows.data) add_scaled(hat_rows.at(b, h, t), s_rows.at(b, h, t), -m * m, vec, copy.data(), e);
          }
        }
        for (int64_t j = 0; j < heads * width; ++j) total[j] += block[j];
      }
    }
  });
}

// hat = shifted - mu^2 vector where it is defined (it may be `shifted` itself); df; and sums for `add`.
inline std::tuple<Tensor, Tensor> fold(const Tensor& grad, const Tensor& shifted, const Tensor& q, const Tensor& mu,
                                       const Tensor& vector, const Tensor& hat) {
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), d = q.size(3), e = grad.size(3);
  const int64_t number = std::min<int64_t>(at::get_num_threads(), b * ((t + kBlock - 1) / kBlock));
  const Tensor parts = at::empty({number, h, e + d + 1}, mu.options().dtype(at::kDouble)), df = at::empty_like(mu);
  MIMIC_CORE_DISPATCH(q.scalar_type(), "fold", [&] {
    fold_rows<scalar_t>(grad, shifted, q, mu, vector, hat, df, parts);
  });
  return {df, parts};
}

template <typename A>
void sum_parts(const Tensor& parts, const Tensor& d_vector, const Tensor& d_weight, const Tensor& d_bias) {
  const int64_t number = parts.size(0), heads = parts.size(1), width = parts.size(2), e = d_vector.size(1);
  const double* from = parts.const_data_ptr<double>();
  A *vp = d_vector.data_ptr<A>(), *wp = d_weight.data_ptr<A>(), *cp = d_bias.data_ptr<A>();
  const auto sum = [&](A* to, int64_t h, int64_t first, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      double all = 0;
      for (int64_t part = 0; part < number; ++part) all += from[(part * heads + h) * width + first + j];
      to[j] = static_cast<A>(all);
    }
  };
  for (int64_t h = 0; h < heads; ++h) {
    sum(vp + h * e, h, 0, e);
    sum(wp + h * (width - 1 - e), h, e, width - 1 - e);
    sum(cp + h, h, width - 1, 1);
  }
}

// dq += df * weight in place, where dq is defined, and the sums of `parts`: they come in the dtype of the maths.
inline std::tuple<Tensor, Tensor, Tensor> add_(const Tensor& dq, const Tensor& df, const Tensor& weight,
                                               const Tensor& parts) {
  if (dq.defined()) {
    MIMIC_CORE_DISPATCH(dq.scalar_type(), "add", [&] {
      using A = at::opmath_type<scalar_t>;
      const int64_t d = dq.size(3);
      const A* wp = weight.const_data_ptr<A>();
      const auto rows = bht<scalar_t>(dq);
      const auto df_rows = bht<A>(df);
      for_rows(dq.size(0), dq.size(1), dq.size(2), [&] {
        return [&, copy = Copy<scalar_t, A>(d)](int64_t b, int64_t h, int64_t t) mutable {
          scalar_t* row = rows.at(b, h, t);
          add_scaled(row, row, *df_rows.at(b, h, t), wp + h * d, copy.data(), d);
        };
      });
    });
  }
  const int64_t h = weight.size(0), d = weight.size(1), e = parts.size(2) - d - 1;
  const Tensor d_vector = at::empty({h, e}, weight.options()), d_weight = at::empty({h, d}, weight.options()),
               d_bias = at::empty({h}, weight.options());
  if (weight.scalar_type() == at::kDouble) sum_parts<double>(parts, d_vector, d_weight, d_bias);
  else sum_parts<float>(parts, d_vector, d_weight, d_bias);
  return {d_vector, d_weight, d_bias};
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

// A bool mask [b h t s] as numbers to add in `dtype`, and which rows [b h t] allow a key.
inline std::tuple<Tensor, Tensor> additive_mask(const Tensor& mask, at::ScalarType dtype) {
  const Tensor allowed = mask.contiguous(), added = at::empty(mask.sizes(), mask.options().dtype(dtype)),
               attends = at::empty(mask.sizes().slice(0, 3), mask.options());
  if (dtype == at::kFloat) mask_rows<uint32_t>(allowed, 0xff800000u, added, attends);
  else if (dtype == at::kDouble) mask_rows<uint64_t>(allowed, 0xfff0000000000000u, added, attends);
  else if (dtype == at::kBFloat16) mask_rows<uint16_t>(allowed, 0xff80u, added, attends);
  else mask_rows<uint16_t>(allowed, 0xfc00u, added, attends);
  return {added, attends};
}

}  // namespace mimic_core::cpu
