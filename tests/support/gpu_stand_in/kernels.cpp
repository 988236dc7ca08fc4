// Runs kernels.cu on a CPU, thread by thread: the threads of a block are contexts that take turns, each up to the next point
// where they wait for each other. KERNELS is the path of kernels.cu.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

struct Three32 {
  unsigned x, y, z;
};

static Three32 threadIdx, blockIdx, gridDim, blockDim;
// Where a thread waits, and where whoever lets it run does. Without system calls, which a switch of contexts makes.
struct Place {
  jmp_buf at;
};
static std::vector<Place> waiting;
static Place scheduler;
static std::vector<float> exchanged;
static unsigned running;

// The other threads run up to their next wait before this one goes on.
static void wait_for_the_others() {
  const unsigned me = running;
  if (!_setjmp(waiting[me].at)) _longjmp(scheduler.at, 1);
  threadIdx.x = running = me;
}

static float shuffle(float value, int step) {
  exchanged[running] = value;
  wait_for_the_others();
  const float found = exchanged[running ^ step];
  wait_for_the_others();
  return found;
}

static float bits_as_float(unsigned x) {
  float found;
  return std::memcpy(&found, &x, 4), found;
}

static unsigned float_as_bits(float x) {
  unsigned found;
  return std::memcpy(&found, &x, 4), found;
}

#define __global__ __attribute__((visibility("default")))
#define __device__ static
#define __shared__ static
#define __launch_bounds__(n)
#define __syncthreads wait_for_the_others
#define __shfl_xor_sync(mask, value, step) shuffle(value, step)
#define __uint_as_float bits_as_float
#define __float_as_uint float_as_bits
#define __int_as_float bits_as_float
#define __fdiv_rn(a, b) ((a) / (b))
#define __fsqrt_rn(a) std::sqrt(a)

#include KERNELS

template <typename... A, size_t... I>
static void call(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(parameters[I])...);
}

template <typename... A>
static void call(void (*kernel)(A...), void** parameters) {
  call(kernel, parameters, std::index_sequence_for<A...>{});
}

static const char* wanted;
static void** given;

static void run() {
#ifdef D
  if (!std::strcmp(wanted, "shift")) return call(shift, given);
  if (!std::strcmp(wanted, "fold")) return call(fold, given);
  if (!std::strcmp(wanted, "add")) return call(add, given);
#endif
#ifdef C
  if (!std::strcmp(wanted, "norm_add")) return call(norm_add, given);
  if (!std::strcmp(wanted, "norm_gradients")) return call(norm_gradients, given);
  if (!std::strcmp(wanted, "norm_sums")) return call(norm_sums, given);
#endif
  std::fprintf(stderr, "there is no kernel %s\n", wanted);
  std::abort();
}

static void run_and_end() {
  run();
  _longjmp(scheduler.at, 2);
}

// Lets a thread run up to its next wait, or to its end, which is true. `start` is its first stretch.
static bool runs_to_its_end(ucontext_t* start, unsigned thread) {
  const int came = _setjmp(scheduler.at);
  if (came) return came == 2;
  threadIdx = {thread, 0, 0}, running = thread;
  if (start) setcontext(start);
  _longjmp(waiting[thread].at, 1);
}

extern "C" __attribute__((visibility("default"))) void launch(const char* name, unsigned x, unsigned y, unsigned threads,
                                                              void** parameters) {
  constexpr size_t stack = 64 << 10;
  static std::vector<char> stacks;
  stacks.resize(threads * stack);
  waiting.resize(threads);
  exchanged.resize(threads);
  wanted = name, given = parameters, gridDim = {x, y, 1}, blockDim = {threads, 1, 1};
  std::vector<char> done(threads);
  for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) {
      unsigned left = threads;
      for (unsigned i = 0; i < threads; ++i) {
        ucontext_t start;
        getcontext(&start);
        start.uc_stack = {stacks.data() + i * stack, 0, stack};
        start.uc_link = nullptr;
        makecontext(&start, run_and_end, 0);
        done[i] = runs_to_its_end(&start, i);
        left -= done[i];
      }
      while (left) {
        for (unsigned i = 0; i < threads; ++i) {
          if (!done[i]) left -= done[i] = runs_to_its_end(nullptr, i);
        }
      }
    }
  }
}
