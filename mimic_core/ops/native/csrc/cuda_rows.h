// The row loops around an attention kernel, and the norm-preserving add, on a GPU: the functions of cpu_shift.h and
// cpu_norm.h, each a launch or two of kernels.cu.

#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "cuda_driver.h"

namespace mimic_core::cuda {

struct Strides {  // as in kernels.cu
  int64_t b, h, t;
};

inline Strides bht(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }
inline Strides bth(const Tensor& x) { return {x.stride(0), x.stride(2), x.stride(1)}; }

// Whether every row of these starts where 16 bytes can be loaded at a time.
inline bool are_aligned(std::initializer_list<Tensor> rows) {
  for (const Tensor& x : rows) {
    if (!x.defined()) continue;
    const int64_t size = x.element_size();
    if (reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 || x.size(-1) * size % 16) return false;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) {
      if (x.size(i) > 1 && x.stride(i) * size % 16) return false;
    }
  }
  return true;
}

template <typename T>
T* pointer(const Tensor& x) {
  return x.defined() ? static_cast<T*>(x.data_ptr()) : nullptr;
}

inline Kind kind_of(const Tensor& like, int64_t first, int64_t second, std::initializer_list<Tensor> rows) {
  // Rows of parameters are read in fp32, as many elements at a time as the others.
  const bool whole = first * like.element_size() % 16 == 0 && second * like.element_size() % 16 == 0;
  return {like.scalar_type(), first, second, whole && are_aligned(rows), static_cast<int>(like.get_device())};
}

inline int64_t lanes(const Kind& kind) {  // kLanes of kernels.cu
  const int64_t elements = !kind.aligned ? 1 : kind.dtype == at::kFloat ? 4 : 8;
  const int64_t loads = (std::max(kind.first, kind.second) + elements - 1) / elements;
  int64_t found = 1;
  while (found < loads && found < 32) found *= 2;
  return found;
}

inline int64_t blocks(int64_t n, int64_t each) { return (n + each - 1) / each; }

inline void shift_(const Tensor& out, const Tensor& q, const Tensor& lse, const Tensor& attends, const Tensor& vector,
                   const Tensor& weight, const Tensor& bias, const Tensor& mu) {
  const c10::DeviceGuard guard(q.device());
  const int64_t rows = q.size(0) * q.size(1) * q.size(2);
  const Kind kind = kind_of(q, q.size(3), out.size(3), {out, q, vector, weight});
  launch(kind, "shift", q, blocks(rows, kThreads / lanes(kind)), 1, pointer<void>(out), pointer<void>(q), pointer<float>(lse),
         pointer<bool>(attends), pointer<float>(vector), pointer<float>(weight), pointer<float>(bias), pointer<float>(mu),
         bth(out), bht(q), bht(lse), attends.defined() ? bht(attends) : Strides{}, static_cast<int>(q.size(1)),
         static_cast<int>(q.size(2)), rows);
}

// Rows of a head whose sums a block makes, and at most so many blocks: others add them up.
constexpr int64_t kRowsEach = 64, kMostParts = 128;

inline std::tuple<Tensor, Tensor> fold(const Tensor& grad, const Tensor& shifted, const Tensor& q, const Tensor& mu,
                                       const Tensor& vector, const Tensor& hat) {
  const c10::DeviceGuard guard(q.device());
  const int64_t h = q.size(1), d = q.size(3), e = grad.size(3), rows = q.size(0) * q.size(2);
  const int64_t each = std::max(kRowsEach, blocks(rows, kMostParts)), number = blocks(rows, each);
  const Tensor parts = at::empty({number, h, e + d + 1}, mu.options()), df = at::empty_like(mu);
  const Kind kind = kind_of(q, d, e, {grad, hat.defined() ? shifted : Tensor(), q, vector, hat});
  launch(kind, "fold", q, number, h, pointer<void>(grad), pointer<void>(shifted), pointer<void>(q), pointer<float>(mu),
         pointer<float>(vector), pointer<void>(hat), pointer<float>(df), pointer<float>(parts), bth(grad), bth(shifted),
         bht(q), hat.defined() ? bth(hat) : Strides{}, static_cast<int>(h), static_cast<int>(q.size(2)), rows,
         static_cast<int>(each));
  return {df, parts};
}

inline std::tuple<Tensor, Tensor, Tensor> add_(const Tensor& dq, const Tensor& df, const Tensor& weight,
                                               const Tensor& parts) {
  const c10::DeviceGuard guard(df.device());
  const int64_t h = weight.size(0), d = weight.size(1), e = parts.size(2) - d - 1, rows = df.numel();
  const Tensor d_vector = at::empty({h, e}, weight.options()), d_weight = at::empty({h, d}, weight.options()),
               d_bias = at::empty({h}, weight.options());
  const Kind kind = kind_of(dq.defined() ? dq : weight, d, e, {dq, weight});
  const int64_t row_blocks = dq.defined() ? blocks(rows, kThreads / lanes(kind)) : 0;
  launch(kind, "add", df, row_blocks + blocks(h * (e + d + 1), kThreads), 1, pointer<void>(dq), pointer<float>(df),
         pointer<float>(weight), pointer<float>(parts), pointer<float>(d_vector), pointer<float>(d_weight),
         pointer<float>(d_bias), dq.defined() ? bht(dq) : Strides{}, static_cast<int>(h), static_cast<int>(df.size(2)), rows,
         static_cast<int>(row_blocks), static_cast<int>(parts.size(0)));
  return {d_vector, d_weight, d_bias};
}

inline Kind norm_kind(const Tensor& x, const Tensor& vector, const Tensor& grad) {
  return kind_of(x, x.size(-1), 0, {x, vector, grad});
}

inline Tensor norm_preserving_add(const Tensor& x, const Tensor& vector, const Tensor& scale, double number) {
  const c10::DeviceGuard guard(x.device());
  const Tensor out = at::empty(x.sizes(), x.options());
  launch(norm_kind(x, vector, out), "norm_add", x, x.numel() / x.size(-1), 1, pointer<void>(x), pointer<float>(vector),
         pointer<float>(scale), static_cast<float>(number), pointer<void>(out));
  return out;
}

// Blocks of norm_gradients: the same number on every device, so that sums come out the same.
constexpr int64_t kNormBlocks = 256;

inline std::tuple<Tensor, Tensor, Tensor> norm_gradients(const Tensor& grad, const Tensor& x, const Tensor& vector,
                                                         const Tensor& scale, double number) {
  const c10::DeviceGuard guard(x.device());
  const int64_t c = x.size(-1), rows = x.numel() / c, count = std::min(rows, kNormBlocks);
  const Tensor dx = at::empty(x.sizes(), x.options()), parts = at::empty({count, c + 1}, vector.options()),
               d_vector = at::empty_like(vector), d_scale = at::empty({}, vector.options());
  const Kind kind = norm_kind(x, vector, grad);
  launch(kind, "norm_gradients", x, count, 1, pointer<void>(grad), pointer<void>(x), pointer<float>(vector),
         pointer<float>(scale), static_cast<float>(number), pointer<void>(dx), pointer<float>(parts), rows);
  launch(kind, "norm_sums", x, blocks(c + 1, kThreads), 1, pointer<float>(parts), pointer<float>(scale),
         static_cast<float>(number), pointer<float>(d_vector), pointer<float>(d_scale), static_cast<int>(count));
  return {dx, d_vector, d_scale};
}

}  // namespace mimic_core::cuda
