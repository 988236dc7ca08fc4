// The norm-preserving add on a CPU, one pass over memory: (x + a v) |x| / |x + a v|, row by row. Tensors are contiguous,
// the vector in the dtype of the maths.

#pragma once

#include "cpu_shift.h"

namespace mimic_core::cpu {

template <typename A>
struct Lengths {
  A before, after;  // squared, of a row and of the row with the vector
  // What gives the sum the length of the row. A sum of zero stays zero.
  A ratio() const { return after > 0 ? std::sqrt(before) / std::sqrt(after) : A(0); }
};

// The lengths of `next`, and on the way `to` = (row + scale * vector) * ratio where `row` is not null: while one row is read
// from memory the row before it is written, which takes a fourth less than one after the other.
//
// Both lengths are summed in one order: where the vector is zero they are the same number, and their ratio is 1.
template <bool write, typename A>
Lengths<A> lengths(const A* next, const A* vector, A scale, int64_t n, A* to, const A* row, A ratio) {
  A before[kSums], after[kSums], rest_before = 0, rest_after = 0;
  int64_t i = 0;
#pragma omp simd
  for (int64_t j = 0; j < kSums; ++j) before[j] = after[j] = 0;  // not `= {}`, which calls a routine for long memory
  for (; i + kSums <= n; i += kSums) {
#pragma omp simd
    for (int64_t j = 0; j < kSums; ++j) {
      const A old = next[i + j], sum = old + scale * vector[i + j];
      before[j] += old * old;
      after[j] += sum * sum;
      if constexpr (write) to[i + j] = (row[i + j] + scale * vector[i + j]) * ratio;
    }
  }
  for (; i < n; ++i) {
    const A old = next[i], sum = old + scale * vector[i];
    rest_before += old * old;
    rest_after += sum * sum;
    if constexpr (write) to[i] = (row[i] + scale * vector[i]) * ratio;
  }
  return {folded<kSums>(before) + rest_before, folded<kSums>(after) + rest_after};
}

template <typename A>
Lengths<A> lengths(const A* row, const A* vector, A scale, int64_t n) {
  return lengths<false, A>(row, vector, scale, n, nullptr, nullptr, 0);
}

// Rows a thread should have, as kRows are rows of 64.
inline int64_t rows_each(int64_t width) { return std::max<int64_t>(1, kRows * 64 / width); }

// to = (row + scale * vector) * ratio. Loops stand in functions of their own: in a lambda, what it captured is read anew for
// every number, and nothing is vectorised: 8 times slower.
template <typename A>
void moved(A* to, const A* row, const A* vector, A scale, A ratio, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = (row[j] + scale * vector[j]) * ratio;
}

template <typename S>
void norm_rows(const S* x, const at::opmath_type<S>* vector, at::opmath_type<S> scale, S* out, int64_t first, int64_t last,
               int64_t c) {
  using A = at::opmath_type<S>;
  constexpr bool is_wide = std::is_same_v<S, A>;
  Copy<S, A> one(c), other(c), written(c);
  A *here = one.data(), *there = other.data();
  const A* row = wide_row(x + first * c, here, c);
  Lengths<A> found = lengths(row, vector, scale, c);
  for (int64_t i = first; i < last; ++i) {
    A* to;
    if constexpr (is_wide) to = out + i * c;
    else to = written.data();
    if (i + 1 < last) {
      const A* next = wide_row(x + (i + 1) * c, there, c);
      found = lengths<true>(next, vector, scale, c, to, row, found.ratio());
      row = next;
      std::swap(here, there);
    } else {
      moved(to, row, vector, scale, found.ratio(), c);
    }
    if constexpr (!is_wide) narrow(to, out + i * c, c);
  }
}

inline Tensor norm_preserving_add(const Tensor& x, const Tensor& vector, double scale) {
  const Tensor out = at::empty(x.sizes(), x.options());
  const int64_t c = x.size(-1);
  MIMIC_CORE_DISPATCH(x.scalar_type(), "norm", [&] {
    using A = at::opmath_type<scalar_t>;
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    const A* vp = vector.const_data_ptr<A>();
    scalar_t* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, x.numel() / c, rows_each(c), [=](int64_t first, int64_t last) {
      norm_rows<scalar_t>(from, vp, static_cast<A>(scale), to, first, last, c);
    });
  });
  return out;
}

// The same where each sample, an entry of the first axis of x, has its own vector [b c] and scale [b].
inline Tensor norm_preserving_add_of_samples(const Tensor& x, const Tensor& vectors, const Tensor& scales) {
  const Tensor out = at::empty(x.sizes(), x.options());
  const int64_t c = x.size(-1), b = x.size(0), rows = x.numel() / c / b;
  MIMIC_CORE_DISPATCH(x.scalar_type(), "norm", [&] {
    using A = at::opmath_type<scalar_t>;
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    const A *vp = vectors.const_data_ptr<A>(), *sp = scales.const_data_ptr<A>();
    scalar_t* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, b, std::max<int64_t>(1, rows_each(c) / rows), [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        norm_rows<scalar_t>(from + i * rows * c, vp + i * c, sp[i], to + i * rows * c, 0, rows, c);
    });
  });
  return out;
}

template <typename A>
A along_moved(const A* grad, const A* row, const A* vector, A scale, int64_t n) {
  return sum_of<A>(n, [=](int64_t j) { return grad[j] * (row[j] + scale * vector[j]); });
}

// total += dm and to = dm + of_x * row, with dm = ratio * grad - of_m * (row + scale * vector); `to` may be `row`.
template <typename A>
void norm_gradient(A* to, A* total, const A* row, const A* grad, const A* vector, A scale, A ratio, A of_m, A of_x,
                   int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const A old = row[j], dm = ratio * grad[j] - of_m * (old + scale * vector[j]);
    total[j] += dm;
    to[j] = dm + of_x * old;
  }
}

// dx of some rows, and `sums` [c], of dm.
template <typename S>
void norm_gradient_rows(const S* x, const at::opmath_type<S>* vector, at::opmath_type<S> scale, const S* grad, S* dx,
                        double* sums, int64_t first, int64_t last, int64_t c) {
  using A = at::opmath_type<S>;
  std::vector<A> total(c);
  Copy<S, A> row_copy(c), grad_copy(c);
  std::fill_n(sums, c, 0.0);
  for (int64_t start = first; start < last; start += kBlock) {
    std::fill(total.begin(), total.end(), A(0));
    for (int64_t i = start; i < std::min(start + kBlock, last); ++i) {
      const A* row = wide_row(x + i * c, row_copy.data(), c);
      const A* g = wide_row(grad + i * c, grad_copy.data(), c);
      const Lengths<A> found = lengths(row, vector, scale, c);
      const A ratio = found.ratio(), along = along_moved(g, row, vector, scale, c);
      // With n = |x|, l = |m|: dm = n / l (g - (g.m) m / l^2), dx = dm + (g.m) x / (l n). A norm's gradient at 0 is 0, and
      // what is put to zero passes nothing on.
      const A of_m = found.after > 0 ? along * ratio / found.after : A(0);
      const A of_x = found.after > 0 && found.before > 0 ? along / (std::sqrt(found.after) * std::sqrt(found.before)) : A(0);
      if constexpr (std::is_same_v<S, A>) {
        norm_gradient(dx + i * c, total.data(), row, g, vector, scale, ratio, of_m, of_x, c);
      } else {
        norm_gradient(row_copy.data(), total.data(), row, g, vector, scale, ratio, of_m, of_x, c);
        narrow(row_copy.data(), dx + i * c, c);
      }
    }
    for (int64_t j = 0; j < c; ++j) sums[j] += total[j];
  }
}

// Gradients of x, the vector and the scale; the last two in the dtype of the maths.
inline std::tuple<Tensor, Tensor, Tensor> norm_gradients(const Tensor& grad, const Tensor& x, const Tensor& vector,
                                                         double scale) {
  const int64_t c = x.size(-1), rows = x.numel() / c;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(rows / rows_each(c), at::get_num_threads()));
  const Tensor dx = at::empty(x.sizes(), x.options()), d_vector = at::empty_like(vector),
               d_scale = at::empty({}, vector.options()), sums = at::empty({parts, c}, x.options().dtype(at::kDouble));
  MIMIC_CORE_DISPATCH(x.scalar_type(), "norm_gradients", [&] {
    using A = at::opmath_type<scalar_t>;
    const scalar_t *from = x.const_data_ptr<scalar_t>(), *gp = grad.const_data_ptr<scalar_t>();
    scalar_t* to = dx.data_ptr<scalar_t>();
    const A* vp = vector.const_data_ptr<A>();
    double* all = sums.data_ptr<double>();
    at::parallel_for(0, parts, 1, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        norm_gradient_rows<scalar_t>(from, vp, static_cast<A>(scale), gp, to, all + i * c, i * rows / parts,
                                     (i + 1) * rows / parts, c);
    });
    A* vector_to = d_vector.data_ptr<A>();
    double of_scale = 0;
    for (int64_t j = 0; j < c; ++j) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += all[part * c + j];
      vector_to[j] = static_cast<A>(sum * scale);
      of_scale += sum * vp[j];
    }
    *d_scale.data_ptr<A>() = static_cast<A>(of_scale);
  });
  return {dx, d_vector, d_scale};
}

}  // namespace mimic_core::cpu
