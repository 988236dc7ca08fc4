// Virtual keys and values beside an attention that is done, on a CPU: a few pairs for each attention head, one pass over its rows.

#pragma once

#include <ATen/ops/zeros.h>

#include "cpu_paged.h"

namespace mimic_core::cpu {

// e^(x - most) in place, and their sum. `x` has room for whole registers.
inline float softmax_of(float* x, int64_t n, float most) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kKeys) {
    const Keys e = exp_of(load(x + i) - most);
    std::memcpy(x + i, &e, sizeof(e));
    for (int64_t j = i; j < std::min(n, i + kKeys); ++j) sum += x[j];
  }
  return static_cast<float>(sum);
}

// Keys [h n d] as [h parts d 16], with zeros for those that are missing: 16 logits are then one sum of registers. With a dot
// product for each key, and the row of `add_values` in memory, attention with 16 pairs took 1.15 times sdpa's time at 1,024
// tokens in fp32, and takes 1.06. For a few tokens it isn't worth to turn the keys.
inline Tensor turned(const Tensor& keys, int64_t rows) {
  if (rows < 4 * kKeys) return Tensor();
  const int64_t h = keys.size(0), n = keys.size(1), d = keys.size(2), parts = (n + kKeys - 1) / kKeys;
  const Tensor to = at::zeros({h, parts, d, kKeys}, keys.options());
  const float* from = keys.const_data_ptr<float>();
  float* at = to.data_ptr<float>();
  for (int64_t i = 0; i < h * n; ++i) {
    float* column = at + (i / n * parts + i % n / kKeys) * d * kKeys + i % n % kKeys;
    for (int64_t j = 0; j < d; ++j) column[j * kKeys] = from[i * d + j];
  }
  return to;
}

// The products of a query with the 16 keys of a part, [d 16].
inline Keys products(const float* query, const float* keys, int64_t d) {
  Keys sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= d; i += 4) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) sums[j] += query[i + j] * load(keys + (i + j) * kKeys);
  }
  for (; i < d; ++i) sums[0] += query[i] * load(keys + i * kKeys);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// row = factor row + sum_i p_i v_i, for values [n e]: 16 numbers of it at a time stay in registers.
inline void add_values(float* row, float factor, const float* p, const float* values, int64_t n, int64_t e) {
  int64_t j = 0;
  for (; j + 2 * kKeys <= e; j += 2 * kKeys) {
    Keys a = factor * load(row + j), b = factor * load(row + j + kKeys);
    for (int64_t i = 0; i < n; ++i) {
      a += p[i] * load(values + i * e + j);
      b += p[i] * load(values + i * e + j + kKeys);
    }
    std::memcpy(row + j, &a, sizeof(a));
    std::memcpy(row + j + kKeys, &b, sizeof(b));
  }
  for (; j < e; ++j) {
    row[j] *= factor;
    for (int64_t i = 0; i < n; ++i) row[j] += p[i] * values[i * e + j];
  }
}

// out = (1 - a) attn_out + a sum_i softmax_i(scale k_i . q) v_i, a = weight sigmoid(logsumexp_i(scale k_i . q) - lse).
template <typename S>
void virtual_rows(const Tensor& attn_out, const Tensor& q, const Tensor& lse, const Tensor& keys, const Tensor& values,
                  const Tensor& weight, float scale, const Tensor& out) {
  const int64_t n = keys.size(1), d = q.size(3), e = out.size(3);
  const float *kp = keys.const_data_ptr<float>(), *vp = values.const_data_ptr<float>();
  const float factor = *weight.const_data_ptr<float>();
  const Tensor columns = turned(keys, q.size(0) * q.size(2));
  const float* tp = columns.defined() ? columns.const_data_ptr<float>() : nullptr;
  const int64_t parts = (n + kKeys - 1) / kKeys;
  const auto from_rows = bth<S>(attn_out), out_rows = bth<S>(out), q_rows = bht<S>(q);
  const auto lse_rows = bht<float>(lse);
  for_rows(q.size(0), q.size(1), q.size(2), [&] {
    return [&, copy = Copy<S, float>(std::max(d, e)), room = Copy<S, float>(e),
            p = c10::SmallVector<float, 64>(parts * kKeys)](int64_t b, int64_t h, int64_t t) mutable {
      S* to = out_rows.at(b, h, t);
      std::memcpy(to, from_rows.at(b, h, t), e * sizeof(S));
      const float log_z2 = *lse_rows.at(b, h, t);
      if (log_z2 == -std::numeric_limits<float>::infinity()) return;
      const float* query = wide_row(q_rows.at(b, h, t), copy.data(), d);
      for (int64_t i = 0; tp && i < parts; ++i) {
        const Keys x = products(query, tp + (h * parts + i) * d * kKeys, d);
        std::memcpy(p.data() + i * kKeys, &x, sizeof(x));
      }
      float most = -std::numeric_limits<float>::infinity();
      for (int64_t i = 0; i < n; ++i) {
        p[i] = scale * (tp ? p[i] : dot(query, kp + (h * n + i) * d, d));
        most = std::max(most, p[i]);
      }
      const float z = softmax_of(p.data(), n, most), a = factor / (1 + std::exp(log_z2 - most - std::log(z)));
      if (a == 0) return;
      for (int64_t i = 0; i < n; ++i) p[i] *= a / z;
      float* row;
      if constexpr (std::is_same_v<S, float>) row = to;
      else widen(to, row = room.data(), e);
      add_values(row, 1 - a, p.data(), vp + h * n * e, n, e);
      if constexpr (!std::is_same_v<S, float>) narrow(row, to, e);
    };
  });
}

}  // namespace mimic_core::cpu
