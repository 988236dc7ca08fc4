// The row loops on a GPU, compiled by NVRTC for one dtype and one pair of widths at a time. The maths is fp32.
//
// Given by -D: STORAGE 0 fp32, 1 bf16, 2 fp16; VEC elements a load, which all rows are aligned to; and
//   D, E     widths of a query and of a value    (shift, fold, add)
//   C        width of hidden states              (norm_add, norm_gradients, norm_sums)
// What one kernel of a row needs of another is in the order of the stream; sums are in one order, the same every time.

typedef long long i64;

#if STORAGE == 0
typedef float S;
__device__ inline float wide(S x) { return x; }
__device__ inline S narrow(float x) { return x; }
#elif STORAGE == 1
typedef unsigned short S;
__device__ inline float wide(S x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }
__device__ inline S narrow(float x) {
  const unsigned bits = __float_as_uint(x), nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<S>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest_even);
}
#elif defined(__CUDACC__)
typedef unsigned short S;
__device__ inline float wide(S x) {
  float found;
  asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"(x));
  return found;
}
__device__ inline S narrow(float x) {
  S found;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(found) : "f"(x));
  return found;
}
#else  // a CPU, where tests run this file
typedef _Float16 S;
__device__ inline float wide(S x) { return static_cast<float>(x); }
__device__ inline S narrow(float x) { return static_cast<S>(x); }
#endif

constexpr int kThreads = 256;

struct alignas(sizeof(S) * VEC) Pack {
  S x[VEC];
};
struct alignas(VEC * 4 < 16 ? VEC * 4 : 16) Wide {
  float x[VEC];
};

__device__ inline Wide load(const S* at) {
  const Pack pack = *reinterpret_cast<const Pack*>(at);
  Wide found;
#pragma unroll
  for (int i = 0; i < VEC; ++i) found.x[i] = wide(pack.x[i]);
  return found;
}

__device__ inline Wide load_wide(const float* at) { return *reinterpret_cast<const Wide*>(at); }

__device__ inline void store(S* at, const Wide& from) {
  Pack pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) pack.x[i] = narrow(from.x[i]);
  *reinterpret_cast<Pack*>(at) = pack;
}

// Rows [b h t .] by their strides, in elements.
struct Strides {
  i64 b, h, t;
};
__device__ inline i64 offset(const Strides& s, i64 b, i64 h, i64 t) { return b * s.b + h * s.h + t * s.t; }

#ifdef D

__device__ constexpr int power_of_two(int n) {
  int found = 1;
  while (found < n) found *= 2;
  return found;
}
constexpr int kWidest = D > E ? D : E;
// Neighbouring threads that share a row, and the rows a block has at a time.
constexpr int kLanes = power_of_two((kWidest + VEC - 1) / VEC) < 32 ? power_of_two((kWidest + VEC - 1) / VEC) : 32;
constexpr int kGroups = kThreads / kLanes;
// Loads of one thread in a row.
__device__ constexpr int packs(int width) { return (width / VEC + kLanes - 1) / kLanes; }

__device__ inline float sum_over_lanes(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// row += factor * vec in place, by the lanes of a group.
template <int width>
__device__ inline void add_scaled(S* row, float factor, const float* vec, int lane) {
#pragma unroll
  for (int i = 0; i < packs(width); ++i) {
    const int at = (i * kLanes + lane) * VEC;
    if (at < width) {
      Wide x = load(row + at);
      const Wide v = load_wide(vec + at);
#pragma unroll
      for (int j = 0; j < VEC; ++j) x.x[j] += factor * v.x[j];
      store(row + at, x);
    }
  }
}

// out += mu * vector in place, one row a group of lanes. attends and mu may be null; mu [b h t] is contiguous.
extern "C" __global__ void __launch_bounds__(kThreads)
    shift(S* out, const S* q, const float* lse, const bool* attends, const float* vector, const float* weight,
          const float* bias, float* mu, Strides of_out, Strides of_q, Strides of_lse, Strides of_attends, int heads,
          int tokens, i64 rows) {
  const int lane = threadIdx.x % kLanes;
  const i64 row = static_cast<i64>(blockIdx.x) * kGroups + threadIdx.x / kLanes;
  const bool there = row < rows;  // nobody leaves early: lanes of a warp add up together
  const int h = static_cast<int>(row % heads), t = static_cast<int>(row / heads % tokens);
  const i64 b = row / heads / tokens;
  float logit = 0;
#pragma unroll
  for (int i = 0; i < packs(D); ++i) {
    const int at = (i * kLanes + lane) * VEC;
    if (there && at < D) {
      const Wide x = load(q + offset(of_q, b, h, t) + at), w = load_wide(weight + h * D + at);
#pragma unroll
      for (int j = 0; j < VEC; ++j) logit += x.x[j] * w.x[j];
    }
  }
  logit = sum_over_lanes(logit);
  if (!there) return;
  const float log_z2 = lse[offset(of_lse, b, h, t)];
  const bool sees = (!attends || attends[offset(of_attends, b, h, t)]) && log_z2 != __int_as_float(0xff800000);
  const float m = sees ? sigmoid(logit + bias[h] - log_z2) : 0.0f;
  if (mu && lane == 0) mu[(b * heads + h) * tokens + t] = m;
  add_scaled<E>(out + offset(of_out, b, h, t), m, vector + h * E, lane);
}

// For `each` rows of one head (blockIdx.y): df = mu (1 - mu) (grad . vector), hat = shifted - mu^2 vector where hat is not
// null (it may be `shifted` itself), and parts [blocks, heads, E + D + 1] = sums of mu grad, df q, df.
extern "C" __global__ void __launch_bounds__(kThreads)
    fold(const S* grad, const S* shifted, const S* q, const float* mu, const float* vector, S* hat, float* df, float* parts,
         Strides of_grad, Strides of_shifted, Strides of_q, Strides of_hat, int heads, int tokens, i64 rows, int each) {
  constexpr int width = E + D + 1;
  __shared__ float shared[kGroups * width];
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, h = blockIdx.y;
  float of_vector[packs(E)][VEC] = {}, of_weight[packs(D)][VEC] = {}, of_bias = 0;
  // Every group goes round as often: its lanes add up together with others of their warp.
  for (int start = 0; start < each; start += kGroups) {
    const i64 row = static_cast<i64>(blockIdx.x) * each + start + group;  // of [b t]
    const bool there = start + group < each && row < rows;
    const i64 b = row / tokens;
    const int t = static_cast<int>(row % tokens);
    const i64 flat = (b * heads + h) * tokens + t;
    const float m = there ? mu[flat] : 0.0f;
    Wide g[packs(E)];
    float along = 0;
#pragma unroll
    for (int i = 0; i < packs(E); ++i) {
      const int at = (i * kLanes + lane) * VEC;
      if (there && at < E) {
        g[i] = load(grad + offset(of_grad, b, h, t) + at);
        const Wide v = load_wide(vector + h * E + at);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          along += g[i].x[j] * v.x[j];
          of_vector[i][j] += m * g[i].x[j];
        }
        if (hat) {
          Wide x = load(shifted + offset(of_shifted, b, h, t) + at);
#pragma unroll
          for (int j = 0; j < VEC; ++j) x.x[j] -= m * m * v.x[j];
          store(hat + offset(of_hat, b, h, t) + at, x);
        }
      }
    }
    const float f = m * (1.0f - m) * sum_over_lanes(along);
    if (there && lane == 0) {
      df[flat] = f;
      of_bias += f;
    }
#pragma unroll
    for (int i = 0; i < packs(D); ++i) {
      const int at = (i * kLanes + lane) * VEC;
      if (there && at < D) {
        const Wide x = load(q + offset(of_q, b, h, t) + at);
#pragma unroll
        for (int j = 0; j < VEC; ++j) of_weight[i][j] += f * x.x[j];
      }
    }
  }
  float* mine = shared + group * width;
#pragma unroll
  for (int i = 0; i < packs(E); ++i) {
    const int at = (i * kLanes + lane) * VEC;
    for (int j = 0; at < E && j < VEC; ++j) mine[at + j] = of_vector[i][j];
  }
#pragma unroll
  for (int i = 0; i < packs(D); ++i) {
    const int at = (i * kLanes + lane) * VEC;
    for (int j = 0; at < D && j < VEC; ++j) mine[E + at + j] = of_weight[i][j];
  }
  if (lane == 0) mine[E + D] = of_bias;
  __syncthreads();
  for (int column = threadIdx.x; column < width; column += kThreads) {
    float sum = 0;
    for (int i = 0; i < kGroups; ++i) sum += shared[i * width + column];
    parts[(static_cast<i64>(blockIdx.x) * heads + h) * width + column] = sum;
  }
}

// The first `row_blocks` blocks: dq += df * weight in place, one row a group of lanes. The others: the sums over `parts`, a
// column of a head each.
extern "C" __global__ void __launch_bounds__(kThreads)
    add(S* dq, const float* df, const float* weight, const float* parts, float* d_vector, float* d_weight, float* d_bias,
        Strides of_dq, int heads, int tokens, i64 rows, int row_blocks, int number) {
  if (static_cast<int>(blockIdx.x) >= row_blocks) {
    constexpr int width = E + D + 1;
    const i64 at = static_cast<i64>(blockIdx.x - row_blocks) * kThreads + threadIdx.x;
    if (at >= static_cast<i64>(heads) * width) return;
    const int h = static_cast<int>(at / width), column = static_cast<int>(at % width);
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < number; ++i) sum += parts[static_cast<i64>(i) * heads * width + at];
    if (column < E) d_vector[h * E + column] = sum;
    else if (column < E + D) d_weight[h * D + column - E] = sum;
    else d_bias[h] = sum;
    return;
  }
  const int lane = threadIdx.x % kLanes;
  const i64 row = static_cast<i64>(blockIdx.x) * kGroups + threadIdx.x / kLanes;
  if (row >= rows) return;
  const int h = static_cast<int>(row % heads), t = static_cast<int>(row / heads % tokens);
  const i64 b = row / heads / tokens;
  const float f = df[(b * heads + h) * tokens + t];
  add_scaled<D>(dq + offset(of_dq, b, h, t), f, weight + h * D, lane);
}

#endif
#ifdef C

// The sums of all threads of a block, of three numbers at a time; every thread gets them.
struct Three {
  float a, b, c;
};
__device__ inline Three sum_over_block(Three x) {
  __shared__ Three warps[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    x.a += __shfl_xor_sync(0xffffffffu, x.a, step);
    x.b += __shfl_xor_sync(0xffffffffu, x.b, step);
    x.c += __shfl_xor_sync(0xffffffffu, x.c, step);
  }
  __syncthreads();  // the sums before these are read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  Three all = {0, 0, 0};
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    all.a += warps[i].a;
    all.b += warps[i].b;
    all.c += warps[i].c;
  }
  return all;
}

constexpr int kPacks = (C / VEC + kThreads - 1) / kThreads;

// (x + a v) |x| / |x + a v|, a row a block; x and out [rows C] are contiguous. scale is null where the factor is `number`.
extern "C" __global__ void __launch_bounds__(kThreads)
    norm_add(const S* x, const float* vector, const float* scale, float number, S* out) {
  const i64 row = static_cast<i64>(blockIdx.x) * C;
  const float a = scale ? *scale : number;
  Wide moved[kPacks];
  Three lengths = {0, 0, 0};
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = (i * kThreads + threadIdx.x) * VEC;
    if (at < C) {
      moved[i] = load(x + row + at);
      const Wide v = load_wide(vector + at);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const float old = moved[i].x[j];
        moved[i].x[j] += a * v.x[j];
        lengths.a += old * old;
        lengths.b += moved[i].x[j] * moved[i].x[j];
      }
    }
  }
  lengths = sum_over_block(lengths);
  // Rounded correctly, as a plain / is not under every option: a vector of zero must give 1. A sum of zero stays zero.
  const float ratio = lengths.b > 0 ? __fdiv_rn(__fsqrt_rn(lengths.a), __fsqrt_rn(lengths.b)) : 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = (i * kThreads + threadIdx.x) * VEC;
    if (at < C) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) moved[i].x[j] *= ratio;
      store(out + row + at, moved[i]);
    }
  }
}

// Every gridDim.x-th row: dx, and parts [gridDim.x, C + 1] = sums of dm, and of dm . vector.
//
// With n = |x|, l = |m|: dm = n / l (g - (g.m) m / l^2), dx = dm + (g.m) x / (l n). A norm's gradient at 0 is 0, and what is
// put to zero passes nothing on.
extern "C" __global__ void __launch_bounds__(kThreads)
    norm_gradients(const S* grad, const S* x, const float* vector, const float* scale, float number, S* dx, float* parts,
                   i64 rows) {
  const float a = scale ? *scale : number;
  float total[kPacks][VEC] = {}, of_scale = 0;
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    Wide old[kPacks], g[kPacks], v[kPacks];
    Three sums = {0, 0, 0};
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = (i * kThreads + threadIdx.x) * VEC;
      if (at < C) {
        old[i] = load(x + row * C + at), g[i] = load(grad + row * C + at), v[i] = load_wide(vector + at);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const float moved = old[i].x[j] + a * v[i].x[j];
          sums.a += old[i].x[j] * old[i].x[j];
          sums.b += moved * moved;
          sums.c += g[i].x[j] * moved;
        }
      }
    }
    sums = sum_over_block(sums);
    const float n = __fsqrt_rn(sums.a), l = __fsqrt_rn(sums.b);
    const float ratio = l > 0 ? __fdiv_rn(n, l) : 0.0f, of_m = l > 0 ? sums.c * ratio / sums.b : 0.0f,
                of_x = l > 0 && n > 0 ? sums.c / (l * n) : 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = (i * kThreads + threadIdx.x) * VEC;
      if (at < C) {
        Wide sent;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const float dm = ratio * g[i].x[j] - of_m * (old[i].x[j] + a * v[i].x[j]);
          total[i][j] += dm;
          of_scale += dm * v[i].x[j];
          sent.x[j] = dm + of_x * old[i].x[j];
        }
        store(dx + row * C + at, sent);
      }
    }
  }
  float* mine = parts + static_cast<i64>(blockIdx.x) * (C + 1);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = (i * kThreads + threadIdx.x) * VEC;
    for (int j = 0; at < C && j < VEC; ++j) mine[at + j] = total[i][j];
  }
  of_scale = sum_over_block({of_scale, 0, 0}).a;
  if (threadIdx.x == 0) mine[C] = of_scale;
}

// The sums over `parts`, a column each: d_vector = factor * the sum of dm.
extern "C" __global__ void __launch_bounds__(kThreads)
    norm_sums(const float* parts, const float* scale, float number, float* d_vector, float* d_scale, int count) {
  const int column = blockIdx.x * kThreads + threadIdx.x;
  if (column > C) return;
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < count; ++i) sum += parts[static_cast<i64>(i) * (C + 1) + column];
  if (column < C) d_vector[column] = (scale ? *scale : number) * sum;
  else *d_scale = sum;
}

#endif
