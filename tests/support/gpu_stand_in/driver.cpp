// A stand-in for CUDA's driver: a module is the path of a library that runs the kernels on the CPU (kernels.cpp), and a launch
// is done when it returns. It has what mimic_core asks of the driver, with the driver's signatures, and checks what it is given.

#include <dlfcn.h>

#include <cstring>
#include <string>

namespace {
int context;  // there is one
void* current = nullptr;
enum { kSuccess = 0, kInvalidValue = 1, kInvalidImage = 200, kInvalidContext = 201, kNotFound = 500 };

struct Function {
  void (*launch)(const char*, unsigned, unsigned, unsigned, void**);
  std::string name;
};
}  // namespace

extern "C" {

int launches = 0;

int cuGetErrorName(int result, const char** name) {
  *name = result == kInvalidContext ? "CUDA_ERROR_INVALID_CONTEXT"
          : result == kInvalidImage ? "CUDA_ERROR_INVALID_IMAGE"
          : result == kNotFound     ? "CUDA_ERROR_NOT_FOUND"
                                    : "CUDA_ERROR_INVALID_VALUE";
  return kSuccess;
}

int cuCtxGetCurrent(void** found) { return *found = current, kSuccess; }
int cuCtxSetCurrent(void* wanted) { return current = wanted, kSuccess; }
int cuDevicePrimaryCtxRetain(void** found, int) { return *found = &context, kSuccess; }

int cuModuleLoadData(void** module, const void* image) {
  if (!current) return kInvalidContext;
  *module = dlopen(static_cast<const char*>(image), RTLD_NOW | RTLD_LOCAL);
  return *module ? kSuccess : kInvalidImage;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  auto launch = reinterpret_cast<decltype(Function::launch)>(dlsym(module, "launch"));
  if (!launch || !dlsym(module, name)) return kNotFound;
  *function = new Function{launch, name};
  return kSuccess;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
                   unsigned shared, void*, void** parameters, void** extra) {
  if (!current) return kInvalidContext;
  if (!x || !y || z != 1 || threads % 32 || ty != 1 || tz != 1 || shared || extra) return kInvalidValue;
  const auto* of = static_cast<Function*>(function);
  of->launch(of->name.c_str(), x, y, threads, parameters);
  ++launches;
  return kSuccess;
}
}
