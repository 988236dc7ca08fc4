// The LSE of attention over keys in pages, on a CPU: vLLM's kernel computes it on the way and does not return it.
//
// In a page the keys of a head are stored transposed, [d size], so keys side by side fill a register.

#pragma once

#include <algorithm>
#include <cstring>

#include "cpu_shift.h"

namespace mimic_core::cpu {

// As many keys as a register holds. The compiler keeps what is wider than a register in memory: with 16 keys, AVX2 took 3,070
// instead of 340 us (8 requests of 512 keys, 9 heads over 3 of 64).
#if defined(__AVX512F__)
constexpr int64_t kKeys = 16;
#elif defined(__AVX2__)
constexpr int64_t kKeys = 8;
#else
constexpr int64_t kKeys = 4;
#endif
typedef float Keys __attribute__((vector_size(kKeys * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kKeys * sizeof(int32_t))));
typedef uint16_t Halves __attribute__((vector_size(kKeys * sizeof(uint16_t))));
// Queries that read a page at the same time.
constexpr int64_t kQueries = 4;
// A logit is a chain of d additions, and each waits for the one before. So many chains run side by side: with the keys of one
// part at a time, 8 requests of 512 keys took 75 instead of 51 us (9 heads over 3 of 64, AVX512).
#ifdef __AVX512F__
constexpr int64_t kChains = 12;
#else
constexpr int64_t kChains = 6;  // there are half as many registers
#endif
// Parts of kKeys keys that N queries read at the same time.
template <int64_t N>
constexpr int64_t kParts = std::clamp<int64_t>(kChains / N, 1, 4);

inline Keys load(const float* from) {
  Keys x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline Keys load(const at::BFloat16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof(x));
  return reinterpret_cast<Keys>(__builtin_convertvector(x, Ints) << 16);
}

// e^x for x <= 0, by the polynomial of Cephes. torch's is not in its headers, and the compiler has none for registers.
inline Keys exp_of(Keys x) {
  const Keys least = Keys{} - 87.f;
  x = x < least ? least : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);  // rounds to zero, so to the nearest here
  const Keys whole = __builtin_convertvector(n, Keys);
  const Keys r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Keys p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.f) * reinterpret_cast<Keys>((n + 127) << 23);
}

// The LSE of logits that come in parts: one of each lane, which are added at the end. To add up the lanes of each part takes
// longer than the products of a query with its keys.
struct LSE {
  Keys most = Keys{} - 1e30f, sum = {};

  // Of M parts, whose keys `first` to `last` are seen.
  template <int64_t M>
  void add(const Keys* x, int64_t first, int64_t last) {
    if (first > 0 || last < M * kKeys) {
      for (int64_t m = 0; m < M; ++m) add_seen(x[m], first - m * kKeys, last - m * kKeys);
      return;
    }
    Keys next = most;
#pragma GCC unroll 8
    for (int64_t m = 0; m < M; ++m) next = x[m] > next ? x[m] : next;
    sum *= exp_of(most - next);
#pragma GCC unroll 8
    for (int64_t m = 0; m < M; ++m) sum += exp_of(x[m] - next);
    most = next;
  }

  float value() const {
    float highest = most[0];
    for (int64_t i = 1; i < kKeys; ++i) highest = std::max(highest, most[i]);
    const Keys e = sum * exp_of(most - highest);
    double total = 0;
    for (int64_t i = 0; i < kKeys; ++i) total += e[i];
    return static_cast<float>(highest + std::log(total));
  }

 private:
  void add_seen(Keys x, int64_t first, int64_t last) {
    if (first >= kKeys || last <= 0) return;
    Ints seen = {};
    for (int64_t i = 0; i < kKeys; ++i) seen[i] = i >= first && i < last ? -1 : 0;
    x = seen ? x : most;  // changes no maximum
    const Keys next = x > most ? x : most;
    sum = sum * exp_of(most - next) + (seen ? exp_of(x - next) : Keys{});
    most = next;
  }
};

// The keys of one head of one request.
template <typename S>
struct Pages {
  const S* keys;
  const int32_t* pages;
  int64_t stride, size, d;

  const S* at(int64_t key) const { return keys + pages[key / size] * stride + key % size; }
};

// Adds to the LSE of each of N queries [N d] the keys from `first` on. Query j sees those up to places[j], and only `window` of
// them if that is more than 0.
template <int64_t N, typename S>
void add_keys(const float* queries, const Pages<S>& pages, int64_t first, const int64_t* places, int64_t window, float scale,
              LSE* to) {
  constexpr int64_t M = kParts<N>;
  const int64_t last = places[N - 1] / kKeys * kKeys, d = pages.d, size = pages.size;
  const S *now[M], *then[M];
  // Those past the last are read once more, and not seen.
  for (int64_t m = 0; m < M; ++m) then[m] = pages.at(std::min(first + m * kKeys, last));
  for (int64_t key = first; key <= last; key += M * kKeys) {
    for (int64_t m = 0; m < M; ++m) {
      now[m] = then[m];
      then[m] = pages.at(std::min(key + (M + m) * kKeys, last));
    }
    Keys logits[N][M] = {};
    for (int64_t i = 0; i < d; ++i) {
      Keys keys[M];
#pragma GCC unroll 8
      for (int64_t m = 0; m < M; ++m) {
        __builtin_prefetch(then[m] + i * size);  // much of the time goes into the wait for keys
        keys[m] = load(now[m] + i * size);
      }
#pragma GCC unroll 8
      for (int64_t j = 0; j < N; ++j) {
#pragma GCC unroll 8
        for (int64_t m = 0; m < M; ++m) logits[j][m] += queries[j * d + i] * keys[m];
      }
    }
    for (int64_t j = 0; j < N; ++j) {
      for (int64_t m = 0; m < M; ++m) logits[j][m] *= scale;
      to[j].template add<M>(logits[j], window > 0 ? places[j] - window + 1 - key : 0, places[j] + 1 - key);
    }
  }
}

// Requests of which the last tokens are in a call. Their queries are [n h d], those of request i from starts[i] on; its keys,
// lengths[i] of them, are in the pages [p g d size] that row i of the table names. A window of more than 0 is the number of
// keys that a query sees.
struct Paged {
  const Tensor &query, &keys, &table, &starts, &lengths;
  float scale;
  int64_t window;
};

// Some rows of a request for one head of its keys: row i is query head i % group of token i / group.
struct Part {
  int64_t request, head, first, last;
};

// Calls use(token, head, query, lse) for each query of the tokens that are `wanted`, and for some beside them.
template <typename S, typename Wanted, typename Use>
void for_lse(const Paged& call, Wanted wanted, Use use) {
  const Tensor &query = call.query, &keys = call.keys;
  const int64_t h = query.size(1), d = query.size(2), g = keys.size(1), size = keys.size(3), group = h / g;
  const int64_t window = call.window;
  const auto *start = call.starts.const_data_ptr<int32_t>(), *length = call.lengths.const_data_ptr<int32_t>();
  const int32_t* pages = call.table.const_data_ptr<int32_t>();
  const S *q = query.const_data_ptr<S>(), *k = keys.const_data_ptr<S>();
  const auto any = [&](int64_t request, int64_t first, int64_t last) {
    for (int64_t token = start[request] + first / group; token <= start[request] + (last - 1) / group; ++token) {
      if (wanted(token)) return true;
    }
    return false;
  };
  std::vector<Part> parts;
  for (int64_t r = 0; r < call.lengths.size(0); ++r) {
    const int64_t rows = (start[r + 1] - start[r]) * group;
    for (int64_t head = 0; head < g; ++head) {
      for (int64_t i = 0; i < rows; i += kBlock) {
        const int64_t last = std::min(i + kBlock, rows);
        if (any(r, i, last)) parts.push_back({r, head, i, last});
      }
    }
  }
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(kQueries * d);
    for (int64_t n = begin; n < end; ++n) {
      const Part part = parts[n];
      const int64_t before = length[part.request] - (start[part.request + 1] - start[part.request]);
      for (int64_t row = part.first; row < part.last; row += kQueries) {
        const int64_t some = std::min(kQueries, part.last - row);
        if (!any(part.request, row, row + some)) continue;
        LSE found[kQueries];
        int64_t place[kQueries], token[kQueries], head[kQueries];
        for (int64_t j = 0; j < some; ++j) {
          place[j] = before + (row + j) / group;
          token[j] = start[part.request] + (row + j) / group;
          head[j] = part.head * group + (row + j) % group;
          const S* from = q + token[j] * query.stride(0) + head[j] * query.stride(1);
          for (int64_t i = 0; i < d; ++i) wide[j * d + i] = static_cast<float>(from[i]);
        }
        const int64_t first = window > 0 ? std::max<int64_t>(0, place[0] - window + 1) : 0;
        constexpr decltype(&add_keys<1, S>) forms[] = {add_keys<1, S>, add_keys<2, S>, add_keys<3, S>, add_keys<4, S>};
        const int32_t* own = pages + part.request * call.table.stride(0);
        const Pages<S> of_head{k + part.head * keys.stride(1), own, keys.stride(0), size, d};
        forms[some - 1](wide.data(), of_head, first / kKeys * kKeys, place, window, call.scale, found);
        for (int64_t j = 0; j < some; ++j) use(token[j], head[j], wide.data() + j * d, found[j].value());
      }
    }
  });
}

// To out [n h], in fp32.
template <typename S>
void paged_lse_of(const Paged& call, const Tensor& out) {
  float* to = out.data_ptr<float>();
  const int64_t h = out.size(1);
  for_lse<S>(call, [](int64_t) { return true; },
             [&](int64_t token, int64_t head, const float*, float lse) { to[token * h + head] = lse; });
}

// out [n h e] += strengths[n] gate vector, in place, with the parameters of row rows[n] of [stacks h ...].
template <typename S>
void paged_shift_of(const Paged& call, const Tensor& out, const Tensor& vector, const Tensor& weight, const Tensor& bias,
                    const Tensor& rows, const Tensor& strengths) {
  const int64_t h = out.size(1), e = out.size(2), d = call.query.size(2);
  const float *vp = vector.const_data_ptr<float>(), *wp = weight.const_data_ptr<float>(), *cp = bias.const_data_ptr<float>();
  const float* strength = strengths.const_data_ptr<float>();
  const int64_t* of = rows.const_data_ptr<int64_t>();
  S* to = out.data_ptr<S>();
  for_lse<S>(call, [&](int64_t token) { return strength[token] != 0; },
             [&](int64_t token, int64_t head, const float* query, float lse) {
               const int64_t i = of[token] * h + head;
               const float mu = strength[token] / (1 + std::exp(lse - cp[i] - dot(query, wp + i * d, d)));
               S* row = to + token * out.stride(0) + head * out.stride(1);
               for (int64_t j = 0; j < e; ++j) row[j] = static_cast<S>(static_cast<float>(row[j]) + mu * vp[i * e + j]);
             });
}

}  // namespace mimic_core::cpu
