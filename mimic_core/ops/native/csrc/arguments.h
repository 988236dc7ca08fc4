// Which arguments the ops here take as they are. Whoever gives others is sent another way, or told why, by Python.

#pragma once

#include <ATen/TracerMode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <atomic>
#include <cmath>
#include <initializer_list>
#include <optional>

#include "attention.h"

namespace mimic_core {

// Nobody watches what is called: loops over memory would go unseen by a dispatch mode and by a trace.
inline bool unwatched() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::tracer::impl::is_dispatch_enabled();
}

// CUDA devices whose kernels were compiled, run and compared; a bit each.
inline std::atomic<uint64_t> cuda_devices{0};

inline void enable_cuda(int64_t device, bool taken) {
  const uint64_t bit = uint64_t(1) << device;
  if (taken) cuda_devices |= bit;
  else cuda_devices &= ~bit;
}

inline bool is_on_device(const Tensor& x) {
  return x.is_cpu() || (x.is_cuda() && (cuda_devices >> x.get_device() & 1));
}

// A tensor with memory of its own to read: not a wrapped one (fake, functorch, a subclass), and without a tangent.
inline bool is_plain(const Tensor& x) {
  static const c10::DispatchKeySet odd({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                        c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
                                        c10::DispatchKey::Conjugate, c10::DispatchKey::Negative,
                                        c10::DispatchKey::ZeroTensor});
  return is_on_device(x) && x.layout() == at::kStrided && !x.key_set().has_any(odd) &&
         !x._fw_grad(0).defined();
}

inline bool is_plain_beside(const Tensor& x, const Tensor& q) { return is_plain(x) && x.device() == q.device(); }

inline bool has_sizes(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return x.sizes().equals(c10::IntArrayRef(sizes));
}

inline bool wants_gradient(const Tensor& x) { return x.requires_grad() && c10::GradMode::is_enabled(); }

// On CUDA the row kernels take no fp64: torch's attention kernels don't.
inline bool is_supported(const Tensor& x) {
  return cpu::is_supported(x.scalar_type()) && (!on_gpu(x) || x.scalar_type() != at::kDouble);
}

// Sizes, dtypes and devices of one call of attention, and nothing a kernel can't take.
inline bool takes_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                            std::optional<double> scale, bool is_causal) {
  if (!is_plain(q) || !is_plain_beside(k, q) || !is_plain_beside(v, q) || !is_supported(q)) return false;
  if (q.dim() != 4 || k.dim() != 4 || k.sizes() != v.sizes()) return false;
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), d = q.size(3), g = k.size(1), s = k.size(2);
  const auto dtype = q.scalar_type();
  if (k.scalar_type() != dtype || v.scalar_type() != dtype || k.size(0) != b || k.size(3) != d) return false;
  if (b == 0 || t == 0 || s == 0 || d == 0 || g == 0 || h == 0 || h % g) return false;
  if (on_gpu(q) && d % 8) return false;
  if (scale && !(*scale != 0 && std::isfinite(*scale))) return false;
  if (!mask) return true;
  const auto of_mask = mask->scalar_type();
  if (is_causal || !is_plain_beside(*mask, q) || mask->requires_grad()) return false;
  if (of_mask != at::kBool && !cpu::is_supported(of_mask)) return false;
  const int64_t axes = mask->dim(), wanted[] = {b, h, t, s};
  if (axes > 4 || mask->numel() == 0) return false;
  for (int64_t i = 0; i < axes; ++i) {
    if (mask->size(i) != 1 && mask->size(i) != wanted[4 - axes + i]) return false;
  }
  return true;
}

// The mask [#b #h #t #s], an additive one in q's dtype; undefined without one. The CPU kernel makes garbage of another
// dtype, and what is lowest in q's is forbidden.
inline Tensor normalised(const std::optional<Tensor>& mask, const Tensor& q) {
  if (!mask) return Tensor();
  Tensor found = *mask;
  while (found.dim() < 4) found = found.unsqueeze(0);
  return found.scalar_type() == at::kBool ? found : found.to(q.scalar_type());
}

inline double scale_of(std::optional<double> scale, const Tensor& q) {
  return scale ? *scale : 1 / std::sqrt(static_cast<double>(q.size(3)));
}

// The dtype of the maths: fp64 for fp64, else fp32.
inline at::ScalarType wide(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline bool takes_shift(const Tensor& q, int64_t value_width, const Tensor& vector, const Tensor& weight,
                        const Tensor& bias) {
  const int64_t h = q.size(1), d = q.size(3);
  for (const Tensor* x : {&vector, &weight, &bias}) {
    if (!is_plain_beside(*x, q) || !cpu::is_supported(x->scalar_type())) return false;
  }
  return has_sizes(vector, {h, value_width}) && has_sizes(weight, {h, d}) && has_sizes(bias, {h});
}

// A parameter as the row loops read it.
inline Tensor parameter(const Tensor& x, at::ScalarType dtype) {
  return x.scalar_type() == dtype && x.is_contiguous() ? x : x.detach().to(dtype).contiguous();
}

}  // namespace mimic_core
