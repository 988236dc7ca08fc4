// Loads and launches the kernels of kernels.cu. CUDA's driver is found when it is first needed, so this is built without
// CUDA's headers and libraries, by any C++ compiler.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

namespace mimic_core::cuda {

using at::Tensor;

// Makes the machine code of kernels.cu, with these options, for a device: Python does, by NVRTC.
inline std::function<std::string(const std::string& options, int device)> compile;

inline void* symbol(const char* library, const char* name, int flags = 0) {
  void* handle = dlopen(library, RTLD_LAZY | flags);
  void* found = handle ? dlsym(handle, name) : nullptr;
  TORCH_CHECK(found, "mimic_core: ", library, " has no ", name, handle ? "" : ", or can't be loaded");
  return found;
}

template <typename F>
F driver(const char* name) {
  return reinterpret_cast<F>(symbol("libcuda.so.1", name));
}

inline void check(int result, const char* what) {
  if (result == 0) return;
  static const auto name_of = driver<int (*)(int, const char**)>("cuGetErrorName");
  const char* name = nullptr;
  name_of(result, &name);
  TORCH_CHECK(false, "mimic_core: ", what, " failed with ", name ? name : "an unknown error");
}

// A thread that has not used CUDA yet has no context. The device's own one is what torch uses.
inline void make_context_current(int device) {
  static const auto get_current = driver<int (*)(void**)>("cuCtxGetCurrent");
  static const auto set_current = driver<int (*)(void*)>("cuCtxSetCurrent");
  static const auto retain = driver<int (*)(void**, int)>("cuDevicePrimaryCtxRetain");
  void* context = nullptr;
  check(get_current(&context), "asking for CUDA's context");
  if (context) return;
  check(retain(&context, device), "taking CUDA's context");
  check(set_current(context), "setting CUDA's context");
}

// Where torch enqueues work for a tensor now. A CPU's tensors are there in tests, which bring a driver of their own.
inline void* stream_of(const Tensor& x) {
  if (!x.is_cuda()) return nullptr;
  static const auto current = reinterpret_cast<int (*)(int32_t, void**)>(
      symbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream", RTLD_NOLOAD));
  void* stream = nullptr;
  check(current(x.get_device(), &stream), "asking torch for its CUDA stream");
  return stream;
}

// The kernels of one module: its options, and a function by its name.
class Module {
 public:
  Module(const std::string& image, int device) {
    make_context_current(device);
    static const auto load = driver<int (*)(void**, const void*)>("cuModuleLoadData");
    check(load(&module_, image.data()), "loading a kernel");
  }

  void* function(const char* name) {
    static const auto get = driver<int (*)(void**, void*, const char*)>("cuModuleGetFunction");
    void*& found = functions_[name];
    if (!found) check(get(&found, module_, name), "finding a kernel");
    return found;
  }

 private:
  void* module_ = nullptr;
  std::map<std::string, void*> functions_;
};

// What a module is compiled for. Widths: (d, e) of queries and values, or (c, 0) of hidden states.
struct Kind {
  at::ScalarType dtype;
  int64_t first, second;
  bool aligned;
  int device;
  auto key() const { return std::make_tuple(static_cast<int>(dtype), first, second, aligned, device); }

  std::string options() const {
    const int storage = dtype == at::kFloat ? 0 : dtype == at::kBFloat16 ? 1 : 2;
    const int elements = !aligned ? 1 : storage ? 8 : 4;
    std::string found = "-DSTORAGE=" + std::to_string(storage) + " -DVEC=" + std::to_string(elements);
    if (second) return found + " -DD=" + std::to_string(first) + " -DE=" + std::to_string(second);
    return found + " -DC=" + std::to_string(first);
  }
};

inline void* function_of(const Kind& kind, const char* name) {
  static std::mutex mutex;
  static std::map<decltype(kind.key()), Module> modules;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = modules.find(kind.key());
    if (found != modules.end()) return found->second.function(name);
  }
  // Not under the lock: the compiler is Python's, which another thread may hold while it waits for this lock.
  TORCH_CHECK(compile, "mimic_core: nothing was given to compile CUDA's kernels with");
  const std::string image = compile(kind.options(), kind.device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = modules.find(kind.key());
  if (found != modules.end()) return found->second.function(name);
  return modules.emplace(kind.key(), Module(image, kind.device)).first->second.function(name);
}

constexpr unsigned kThreads = 256;  // as in kernels.cu

// Enqueues a kernel over x * y blocks, where torch enqueues work for `like`.
template <typename... Arguments>
void launch(const Kind& kind, const char* name, const Tensor& like, int64_t x, int64_t y, Arguments... arguments) {
  using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  static const auto run = driver<Launch>("cuLaunchKernel");
  void* function = function_of(kind, name);
  make_context_current(kind.device);
  void* pointers[] = {&arguments...};
  check(run(function, static_cast<unsigned>(x), static_cast<unsigned>(y), 1, kThreads, 1, 1, 0, stream_of(like), pointers,
            nullptr),
        name);
}

}  // namespace mimic_core::cuda
