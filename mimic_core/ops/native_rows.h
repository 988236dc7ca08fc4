// What native.cpp's loops are made of: rows of numbers in any memory order, half precision among them.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

// Rows a thread should have before another one is worth waking: a row is two passes over a few hundred bytes.
constexpr int64_t kRows = 256;
// Tokens summed in the maths' own dtype before the sum goes on in double: keeps 4096 of them at fp32 accuracy.
constexpr int64_t kBlock = 64;

// One row of numbers per (batch, head, token). Loops run over heads within a token: memory is laid out so in a model.
template <typename T>
struct Rows {
  T* data;
  int64_t batch, head, token;
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
void widen(const at::BFloat16* from, float* to, int64_t n) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  auto* wide = reinterpret_cast<uint32_t*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) wide[i] = static_cast<uint32_t>(bits[i]) << 16;
}

void narrow(const float* from, at::BFloat16* to, int64_t n) {
  const auto* wide = reinterpret_cast<const uint32_t*>(from);
  auto* bits = reinterpret_cast<uint16_t*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t x = wide[i], nearest_even = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
    bits[i] = static_cast<uint16_t>((x & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest_even);
  }
}

void widen(const at::Half* from, float* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = from[i];
}

void narrow(const float* from, at::Half* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) to[i] = from[i];
}

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

template <typename A>
A dot(const A* a, const A* b, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename A>
void accumulate(A* sum, A factor, const A* row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * row[i];
}

template <typename A>
Tensor parameter(const Tensor& x) {
  return x.detach().to(c10::CppTypeToScalarType<A>::value).contiguous();
}

// Runs row(batch, head, token) for all of them, heads innermost, shared out among threads.
template <typename F>
void for_rows(int64_t batches, int64_t heads, int64_t tokens, const F& row) {
  const int64_t grain = std::max<int64_t>(1, kRows / heads);
  at::parallel_for(0, batches * tokens, grain, [&](int64_t begin, int64_t end) {
    auto work = row();
    int64_t b = begin / tokens, t = begin % tokens;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < heads; ++h) work(b, h, t);
      if (++t == tokens) t = 0, ++b;
    }
  });
}

}  // namespace
