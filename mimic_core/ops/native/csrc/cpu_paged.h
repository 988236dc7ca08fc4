// The LSE of attention over keys in pages, on a CPU: vLLM's kernel computes it on the way and does not return it.
//
// In a page the keys of a head are stored transposed, [d size]: 16 keys side by side are one register, or two.

#pragma once

#include <cstring>

#include "cpu_shift.h"

namespace mimic_core::cpu {

constexpr int64_t kKeys = 16;
typedef float Keys __attribute__((vector_size(kKeys * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kKeys * sizeof(int32_t))));
typedef uint16_t Halves __attribute__((vector_size(kKeys * sizeof(uint16_t))));
// Queries that read a page at the same time, and how many times kKeys ahead of them keys are asked for.
constexpr int64_t kQueries = 4, kAhead = 2;

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

// The logits of N queries [N d] with kKeys keys of a page; `stride` is the page's size. Most of the time goes into the wait for
// keys, so those at `next` are asked for meanwhile.
template <int64_t N, typename S>
inline void logits_of(const float* queries, const S* keys, const S* next, int64_t d, int64_t stride, Keys* to) {
  Keys found[N] = {};
  for (int64_t i = 0; i < d; ++i) {
    __builtin_prefetch(next + i * stride);
    const Keys key = load(keys + i * stride);
#pragma GCC unroll 4
    for (int64_t j = 0; j < N; ++j) found[j] += queries[j * d + i] * key;
  }
  for (int64_t j = 0; j < N; ++j) to[j] = found[j];
}

// The LSE of logits that come in parts: one of each lane, which are added at the end. To add up the lanes of each part takes
// longer than the products of a query with its keys.
struct LSE {
  Keys most = Keys{} - 1e30f, sum = {};

  // Of keys `first` to `last` of a part.
  void add(Keys x, int64_t first, int64_t last) {
    Ints seen = ~Ints{};
    if (first > 0 || last < kKeys) {
      for (int64_t i = 0; i < kKeys; ++i) seen[i] = i >= first && i < last ? -1 : 0;
    }
    x = seen ? x : most;  // changes no maximum
    const Keys next = x > most ? x : most;
    const Keys e = exp_of(x - next);
    sum = sum * exp_of(most - next) + (seen ? e : Keys{});
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
};

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
        const auto keys_at = [&](int64_t key) {
          const int64_t page = pages[part.request * call.table.stride(0) + key / size];
          return k + page * keys.stride(0) + part.head * keys.stride(1) + key % size;
        };
        constexpr decltype(&logits_of<1, S>) forms[] = {logits_of<1, S>, logits_of<2, S>, logits_of<3, S>, logits_of<4, S>};
        const int64_t last = place[some - 1] / kKeys * kKeys;
        for (int64_t key = first / kKeys * kKeys; key <= last; key += kKeys) {
          Keys logits[kQueries];
          forms[some - 1](wide.data(), keys_at(key), keys_at(std::min(key + kAhead * kKeys, last)), d, size, logits);
          for (int64_t j = 0; j < some; ++j) {
            const int64_t from = window > 0 ? place[j] - window + 1 - key : 0, until = place[j] + 1 - key;
            if (from < kKeys && until > 0) found[j].add(logits[j] * call.scale, from, until);
          }
        }
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
