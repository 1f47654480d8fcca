// PyTorch's wheels contain no PTX, so its own operators cannot be simulated. Once PyTorch is found in the process,
// libcudasim_torch (src/runtime/torch/) is loaded, which runs them on the CPU instead.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>

#include "runtime.h"

namespace cudasim::runtime {

void attach_to_torch() {
  static std::atomic<bool> done{false};
  if (done.load(std::memory_order_relaxed)) return;
  void* torch = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  if (!torch) return;
  dlclose(torch);
  if (done.exchange(true)) return;
  const char* path = std::getenv("CUDASIM_TORCH_LIBRARY");
  if (!path || !*path) {
    complain("CUDASIM_TORCH_LIBRARY is not set: PyTorch's own CUDA operators will fail");
    return;
  }
  if (!dlopen(path, RTLD_NOW | RTLD_LOCAL)) complain("%s", dlerror());
}

}  // namespace cudasim::runtime
