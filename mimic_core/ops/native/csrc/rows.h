// Rows of numbers in any memory order, half precision among them, and the arithmetic on one row.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace mimic_core {

using at::Tensor;

// Rows a thread should have before another one is worth waking: a row is two passes over a few hundred bytes.
constexpr int64_t kRows = 256;
// Tokens summed in the maths' own dtype before the sum goes on in double: keeps 4096 of them at fp32 accuracy.
constexpr int64_t kBlock = 64;
// Sums side by side in a reduction: one of 8 waits for its own last addition, 4 cycles. More than 16 of two kinds at once
// are more than AVX2 has registers for, and 1.8 times slower.
constexpr int64_t kSums = 16;

// Tests have no GPU: they let CPU tensors go the way of a GPU's, to stand-ins for torch's kernels and for CUDA's driver.
inline bool stand_in = false;

inline bool on_gpu(const Tensor& x) { return x.is_cuda() || stand_in; }

// One row of numbers per (batch, head, token). Loops run over heads within a token: memory is laid out so in a model.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
  T* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

// For a tensor [b h t d] or [b h t].
template <typename T>
Rows<T> bht(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// For a tensor [b t h d].
template <typename T>
Rows<T> bth(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(2), x.stride(1)};
}

// Half precision to and from fp32, a row at a time. c10's conversions are right but keep loops from being vectorised:
// ten times slower here.
inline void widen(const at::BFloat16* from, float* to, int64_t n) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  auto* wide = reinterpret_cast<uint32_t*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) wide[i] = static_cast<uint32_t>(bits[i]) << 16;
}

inline void narrow(const float* from, at::BFloat16* to, int64_t n) {
  const auto* wide = reinterpret_cast<const uint32_t*>(from);
  auto* bits = reinterpret_cast<uint16_t*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t x = wide[i], nearest_even = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
    bits[i] = static_cast<uint16_t>((x & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest_even);
  }
}

inline void widen(const at::Half* from, float* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = from[i];
}

inline void narrow(const float* from, at::Half* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) to[i] = from[i];
}

// Room for a row in the dtype of the maths; none where it is the row's own.
template <typename S, typename A>
struct Copy {
  explicit Copy(int64_t n) : room(std::is_same_v<S, A> ? 0 : n) {}
  A* data() { return room.data(); }
  c10::SmallVector<A, 256> room;
};

// A row in the dtype of the maths: itself, or a copy of it.
template <typename S, typename A>
const A* wide_row(const S* row, A* copy, int64_t n) {
  if constexpr (std::is_same_v<S, A>) {
    return row;
  } else {
    widen(row, copy, n);
    return copy;
  }
}

// row = base + factor * vec, in the maths' dtype in between.
template <typename S, typename A>
void add_scaled(S* row, const S* base, A factor, const A* vec, A* copy, int64_t n) {
  const A* from = wide_row(base, copy, n);
  A* to;
  if constexpr (std::is_same_v<S, A>) to = row;
  else to = copy;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] + factor * vec[i];
  if constexpr (!std::is_same_v<S, A>) narrow(copy, row, n);
}

// The sum of `width` numbers, in pairs.
template <int64_t width, typename A>
A folded(A* sums) {
  if constexpr (width == 1) {
    return sums[0];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < width / 2; ++j) sums[j] += sums[j + width / 2];
    return folded<width / 2>(sums);
  }
}

// Sum of term(i) over n, kSums of them side by side.
template <typename A, typename F>
A sum_of(int64_t n, const F& term) {
  A sums[kSums], rest = 0;
  int64_t i = 0;
#pragma omp simd
  for (int64_t j = 0; j < kSums; ++j) sums[j] = 0;  // not `= {}`, which calls a routine for long memory
  for (; i + kSums <= n; i += kSums) {
#pragma omp simd
    for (int64_t j = 0; j < kSums; ++j) sums[j] += term(i + j);
  }
  for (; i < n; ++i) rest += term(i);
  return folded<kSums>(sums) + rest;
}

template <typename A>
A dot(const A* a, const A* b, int64_t n) {
  return sum_of<A>(n, [=](int64_t i) { return a[i] * b[i]; });
}

template <typename A>
void accumulate(A* sum, A factor, const A* row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * row[i];
}

// Runs row(batch, head, token) for all of them, heads innermost, shared out among threads; `make` makes one per thread.
template <typename F>
void for_rows(int64_t batches, int64_t heads, int64_t tokens, const F& make) {
  const int64_t grain = std::max<int64_t>(1, kRows / std::max<int64_t>(1, heads));
  at::parallel_for(0, batches * tokens, grain, [&](int64_t begin, int64_t end) {
    auto row = make();
    int64_t b = begin / tokens, t = begin % tokens;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < heads; ++h) row(b, h, t);
      if (++t == tokens) t = 0, ++b;
    }
  });
}

}  // namespace mimic_core
