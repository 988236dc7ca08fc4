// The row loops by device: C++ on a CPU, kernels on a GPU.

#pragma once

#include "cpu_norm.h"
#include "cpu_shift.h"
#include "cuda_rows.h"

namespace mimic_core {

// out += mu * vector in place, with mu = sigmoid(q . weight + bias - lse), 0 where a row does not attend or lse is -inf. mu
// [b h t] is written where it is defined. out is [b t h e], q [b h t d], lse [b h t], attends [#b #h #t] or undefined.
inline void shift_(const Tensor& out, const Tensor& q, const Tensor& lse, const Tensor& attends, const Tensor& vector,
                   const Tensor& weight, const Tensor& bias, const Tensor& mu) {
  const Tensor seen = attends.defined() ? attends.expand({q.size(0), q.size(1), q.size(2)}) : Tensor();
  return (on_gpu(q) ? cuda::shift_ : cpu::shift_)(out, q, lse, seen, vector, weight, bias, mu);
}

// df = mu (1 - mu) (grad . vector), and sums for `add_`; hat = shifted - mu^2 vector where hat is defined: it may be
// `shifted` itself. grad, shifted and hat are [b t h e].
inline std::tuple<Tensor, Tensor> fold(const Tensor& grad, const Tensor& shifted, const Tensor& q, const Tensor& mu,
                                       const Tensor& vector, const Tensor& hat) {
  return (on_gpu(q) ? cuda::fold : cpu::fold)(grad, shifted, q, mu, vector, hat);
}

// dq += df * weight in place where dq is defined; and the gradients of vector, weight and bias, from the sums of `fold`.
inline std::tuple<Tensor, Tensor, Tensor> add_(const Tensor& dq, const Tensor& df, const Tensor& weight,
                                               const Tensor& parts) {
  return (on_gpu(df) ? cuda::add_ : cpu::add_)(dq, df, weight, parts);
}

// A factor that may be learned: a tensor of one number on the device, or a number.
struct Factor {
  Tensor tensor;
  double number;
  double value() const { return tensor.defined() ? tensor.item<double>() : number; }
};

inline Tensor norm_preserving_add_rows(const Tensor& x, const Tensor& vector, const Factor& scale) {
  if (on_gpu(x)) return cuda::norm_preserving_add(x, vector, scale.tensor, scale.number);
  return cpu::norm_preserving_add(x, vector, scale.value());
}

// The gradients of x, the vector and the factor; the last two in the dtype of the maths.
inline std::tuple<Tensor, Tensor, Tensor> norm_gradient_rows(const Tensor& grad, const Tensor& x, const Tensor& vector,
                                                             const Factor& scale) {
  if (on_gpu(x)) return cuda::norm_gradients(grad, x, vector, scale.tensor, scale.number);
  return cpu::norm_gradients(grad, x, vector, scale.value());
}

}  // namespace mimic_core
