// Registered device code: its kernels and variables, loaded on first use.
#include <cuda.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <deque>
#include <unordered_map>

#include "fatbin.h"
#include "runtime.h"

namespace cudasim::runtime {

// One piece of PTX, parsed on first use.
struct LazyModule {
  std::string ptx;
  bool loaded = false;
  Module* module = nullptr;
};

// The device code of one translation unit (or one linked library).
struct Image {
  const FatbinWrapper* wrapper = nullptr;
  bool unpacked = false;
  std::vector<LazyModule> modules;
  int ptx_arch = 0;   // of its PTX, 0 if that is text
  std::string error;  // why loading failed
  std::unordered_map<std::string, SassKernel> sass;
  bool sass_read = false;
  struct ManagedVariable {
    void** host_pointer;
    std::string name;
  };
  std::vector<ManagedVariable> managed;
};

struct Function {
  Image* image = nullptr;
  std::string name;
  Kernel* kernel = nullptr;
  std::string error;
  int max_dynamic_shared = -1;  // -1: not set
  int carveout = -1;
  bool non_portable_cluster = false;
};

namespace {

struct Variable {
  Image* image;
  std::string name;
  size_t size;
  void* address = nullptr;
};

struct Registry {
  std::recursive_mutex mutex;
  std::deque<Image> images;
  std::deque<Function> functions;
  std::unordered_map<const void*, Function*> by_host;
  std::unordered_map<const Function*, bool> handles;
  std::unordered_map<const void*, Variable> variables;
};
Registry& registry() {
  static Registry& r = *new Registry;  // outlives the static objects of its users
  return r;
}

std::vector<FatbinEntry> entries_of(const FatbinWrapper& wrapper) {
  std::vector<FatbinEntry> all = read_fatbin(wrapper.data);
  if (wrapper.version >= 2 && wrapper.extra)
    for (const void* const* p = wrapper.extra; *p; ++p)
      for (const FatbinEntry& e : read_fatbin(*p)) all.push_back(e);
  return all;
}

// Rates how well an entry suits the device; larger is better. PTX for a newer device comes last: the interpreter can
// run it, but the real device could not.
int rank(const FatbinEntry& e) {
  const int arch = static_cast<int>(e.arch), here = device().arch;
  if (arch == here) return 100000 + e.arch_specific;
  if (arch < here) return (e.arch_specific ? 1000 : 10000) + arch;
  return 1000 - arch;
}

std::string describe(const std::vector<FatbinEntry>& entries) {
  std::string text;
  for (const FatbinEntry& e : entries)
    text += (text.empty() ? "" : ", ") + std::string(e.kind == FatbinEntry::ptx ? "PTX " : "SASS ") +
            std::to_string(e.arch) + (e.arch_specific ? "a" : "");
  return text.empty() ? "nothing" : text;
}

void unpack_modules(Image& image) {
  if (image.unpacked) return;
  image.unpacked = true;
  const std::vector<FatbinEntry> entries = entries_of(*image.wrapper);
  int best = -1;
  for (const FatbinEntry& e : entries)
    if (e.kind == FatbinEntry::ptx) best = std::max(best, rank(e));
  if (best < 0) {
    const std::string arch = std::to_string(device().arch);
    image.error = "its binary embeds no PTX (only " + describe(entries) + "): build it with -gencode arch=compute_" +
                  arch + ",code=[sm_" + arch + ",compute_" + arch + "]";
    return;
  }
  for (const FatbinEntry& e : entries) {
    if (e.kind != FatbinEntry::ptx || rank(e) != best) continue;
    std::string error;
    LazyModule& m = image.modules.emplace_back();
    image.ptx_arch = static_cast<int>(e.arch);
    m.ptx = unpack(e, &error);
    if (m.ptx.empty()) image.error = error;
    log("unpacked %zu bytes of PTX for compute_%u", m.ptx.size(), e.arch);
  }
}

// Calls `find` with each module that mentions `name` until it returns something.
template <class Find>
auto search(Image& image, const std::string& name, Find find) -> decltype(find(nullptr)) {
  unpack_modules(image);
  for (LazyModule& m : image.modules) {
    if (!m.loaded) {
      if (m.ptx.find(name) == std::string::npos) continue;
      m.loaded = true;
      std::string error;
      m.module = load_module(m.ptx.data(), m.ptx.size(), &error);
      if (!m.module) image.error = "its PTX could not be parsed: " + error;
      m.ptx = {};
    }
    if (m.module)
      if (auto found = find(m.module)) return found;
  }
  return nullptr;
}

void read_sass(Image& image) {
  if (image.sass_read) return;
  image.sass_read = true;
  for (const FatbinEntry& e : entries_of(*image.wrapper)) {
    if (e.kind != FatbinEntry::elf || static_cast<int>(e.arch) != device().arch) continue;
    std::string error;
    for (auto& [name, kernel] : read_cubin(unpack(e, &error))) image.sass[name] = kernel;
  }
}

void* find_variable(Image& image, const std::string& name, size_t* size) {
  void* p = search(image, name, [&](Module* module) { return find_global(module, name.c_str(), size); });
  if (p) add_symbol_range(p, *size);
  return p;
}

// ptxas reuses registers, but the interpreter's input does not: without SASS this is a rough estimate. A block of the
// largest size has room on an SM, each of whose four partitions has an equal share of the warps.
int guess_registers(const KernelInfo& info) {
  const int warps = (static_cast<int>(info.max_threads) + 127) / 128 * 4;
  const int most = DeviceSpec::registers / (warps * 32) / 8 * 8;
  return std::clamp(static_cast<int>(info.registers_estimate / 3), 16, std::clamp(most, 16, 255));
}

cudaError_t resolve(const void* symbol, void** address, size_t* size) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  const auto found = r.variables.find(symbol);
  if (found == r.variables.end()) return report(cudaErrorInvalidSymbol);
  Variable& v = found->second;
  if (!v.address) {
    size_t actual = v.size;
    v.address = find_variable(*v.image, v.name, &actual);
    if (!v.address)
      return report(cudaErrorInvalidSymbol, "device variable " + v.name + ": " +
                                                (v.image->error.empty() ? "not in its module's PTX" : v.image->error));
    v.size = actual;
  }
  if (address) *address = v.address;
  if (size) *size = v.size;
  return cudaSuccess;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

Function* find_function(const void* p) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  if (const auto found = r.by_host.find(p); found != r.by_host.end()) return found->second;
  auto* function = static_cast<Function*>(const_cast<void*>(p));
  return r.handles.count(function) ? function : nullptr;
}

const char* name_of(const Function& function) { return function.name.c_str(); }

Kernel* load(Function& function, std::string* error) {
  const std::lock_guard lock(registry().mutex);
  if (!function.kernel && function.error.empty()) {
    function.kernel = search(*function.image, function.name,
                             [&](Module* module) { return find_kernel(module, function.name.c_str()); });
    if (!function.kernel)
      function.error = "kernel " + function.name + " cannot be simulated: " +
                       (function.image->error.empty() ? "it is not in its module's PTX" : function.image->error);
  }
  *error = function.error;
  return function.kernel;
}

cudaError_t resources(Function& function, Resources* out) {
  std::string error;
  Kernel* kernel = load(function, &error);
  if (!kernel) return report(cudaErrorNoKernelImageForDevice, error);
  const std::lock_guard lock(registry().mutex);
  read_sass(*function.image);
  out->info = kernel_info(kernel);
  const auto sass = function.image->sass.find(function.name);
  out->registers_exact = sass != function.image->sass.end() && sass->second.registers > 0;
  out->registers = out->registers_exact ? sass->second.registers : guess_registers(out->info);
  out->sass_instructions = out->registers_exact ? sass->second.instructions : 0;
  const size_t fixed = out->info.static_shared_bytes;
  out->max_dynamic_shared = function.max_dynamic_shared >= 0    ? static_cast<size_t>(function.max_dynamic_shared)
                            : fixed < device().shared_per_block ? device().shared_per_block - fixed
                                                                : 0;
  out->non_portable_cluster = function.non_portable_cluster;
  return cudaSuccess;
}

int active_blocks(const Resources& r, int block_size, size_t dynamic_shared) {
  const DeviceSpec& spec = device();
  if (block_size <= 0 ||
      block_size > static_cast<int>(std::min<uint32_t>(r.info.max_threads, spec.max_threads_per_block)))
    return 0;
  if (dynamic_shared > r.max_dynamic_shared) return 0;
  const int warps = (block_size + spec.warp - 1) / spec.warp;
  // Registers are allocated per warp in units of 256, and an SM has four partitions.
  const int per_warp = static_cast<int>(round_up(static_cast<size_t>(r.registers) * spec.warp, 256));
  const int warps_by_registers = spec.registers / 4 / per_warp * 4;
  const size_t shared = round_up(r.info.static_shared_bytes + dynamic_shared + spec.shared_reserved, 128);
  const int by_shared = shared > 0 ? static_cast<int>(spec.shared_per_multiprocessor / shared) : spec.max_blocks;
  return std::min({spec.max_threads / (warps * spec.warp), spec.max_blocks, warps_by_registers / warps, by_shared});
}

int active_clusters(int blocks_per_multiprocessor, int cluster_size) {
  int clusters = 0;
  for (const int sms : device().gpcs) clusters += sms * blocks_per_multiprocessor / cluster_size;
  return clusters;
}

}  // namespace cudasim::runtime

using namespace cudasim::runtime;

// ---- modules of the driver's interface: PTX text, or a container of device code
CUDASIM_API CUresult cuModuleLoadData(CUmodule* out, const void* data) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  Image& image = r.images.emplace_back();
  if (uint32_t magic; std::memcpy(&magic, data, sizeof magic), magic == kFatbinMagic) {
    image.wrapper = new FatbinWrapper{kFatbinWrapperMagic, 1, data, nullptr};
  } else {
    LazyModule& m = image.modules.emplace_back();
    m.loaded = image.unpacked = image.sass_read = true;
    const char* const text = static_cast<const char*>(data);
    m.module = cudasim::load_module(text, std::strlen(text), &image.error);
    if (!m.module) {
      report(cudaErrorInvalidPtx, image.error);
      return CUDA_ERROR_INVALID_PTX;
    }
  }
  *out = reinterpret_cast<CUmodule>(&image);
  return CUDA_SUCCESS;
}
CUDASIM_API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }  // as __cudaUnregisterFatBinary

CUDASIM_API CUresult cuModuleGetFunction(CUfunction* out, CUmodule module, const char* name) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  Function& function = r.functions.emplace_back();
  function.image = reinterpret_cast<Image*>(module);
  function.name = name;
  std::string error;
  if (!load(function, &error)) {
    report(cudaErrorSymbolNotFound, error);
    return CUDA_ERROR_NOT_FOUND;
  }
  r.handles[&function] = true;
  *out = reinterpret_cast<CUfunction>(&function);
  return CUDA_SUCCESS;
}
CUDASIM_API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return static_cast<CUresult>(cudaFuncSetAttribute(function, static_cast<cudaFuncAttribute>(attribute), value));
}

// ---- registration, called by code that nvcc generates
CUDASIM_API void** __cudaRegisterFatBinary(void* data) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  Image& image = r.images.emplace_back();
  image.wrapper = static_cast<const FatbinWrapper*>(data);
  if (image.wrapper->magic != kFatbinWrapperMagic) complain("unknown kind of device code registered");
  return reinterpret_cast<void**>(&image);
}
CUDASIM_API void __cudaRegisterFatBinaryEnd(void**) {}
CUDASIM_API void __cudaUnregisterFatBinary(void**) {}  // at exit, when nothing is worth freeing

CUDASIM_API void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*,
                                        dim3*, dim3*, int*) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  Function& function = r.functions.emplace_back();
  function.image = reinterpret_cast<Image*>(handle);
  function.name = name;
  r.by_host[host] = &function;
  r.handles[&function] = true;
}

CUDASIM_API void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t size, int, int) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  r.variables[host] = {reinterpret_cast<Image*>(handle), name, size};
}
CUDASIM_API void __cudaRegisterHostVar(void**, const char*, char*, size_t) {}

CUDASIM_API void __cudaRegisterManagedVar(void** handle, void** host_pointer, char*, const char* name, int, size_t size,
                                          int, int) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  auto* image = reinterpret_cast<Image*>(handle);
  image->managed.push_back({host_pointer, name});
  r.variables[host_pointer] = {image, name, size};
}

CUDASIM_API char __cudaInitModule(void** handle) {
  const std::lock_guard lock(registry().mutex);
  auto& image = *reinterpret_cast<Image*>(handle);
  for (const Image::ManagedVariable& v : image.managed) {
    size_t size = 0;
    if (void* p = find_variable(image, v.name, &size))
      *v.host_pointer = p;
    else
      complain("managed variable %s: %s", v.name.c_str(), image.error.c_str());
  }
  return 1;
}

// ---- symbols
CUDASIM_API cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  return resolve(symbol, address, nullptr);
}
CUDASIM_API cudaError_t cudaGetSymbolSize(size_t* size, const void* symbol) { return resolve(symbol, nullptr, size); }

// ---- functions
CUDASIM_API cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* host) {
  Function* function = find_function(host);
  *out = reinterpret_cast<cudaKernel_t>(function);
  return function ? cudaSuccess : report(cudaErrorInvalidDeviceFunction);
}
CUDASIM_API cudaError_t cudaGetKernel(cudaKernel_t* out, const void* host) { return __cudaGetKernel(out, host); }
CUDASIM_API cudaError_t cudaGetFuncBySymbol(cudaFunction_t* out, const void* host) {
  return __cudaGetKernel(reinterpret_cast<cudaKernel_t*>(out), host);
}
CUDASIM_API cudaError_t cudaFuncGetName(const char** name, const void* host) {
  Function* function = find_function(host);
  if (!function) return report(cudaErrorInvalidDeviceFunction);
  *name = function->name.c_str();
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* host) {
  Function* function = find_function(host);
  if (!function) return report(cudaErrorInvalidDeviceFunction);
  Resources r;
  if (const cudaError_t error = resources(*function, &r)) return error;
  *out = {};
  out->sharedSizeBytes = r.info.static_shared_bytes;
  out->localSizeBytes = r.info.local_bytes;
  out->maxThreadsPerBlock = static_cast<int>(std::min<size_t>(
      {r.info.max_threads, size_t{1024}, static_cast<size_t>(DeviceSpec::registers / r.registers / 32 * 32)}));
  out->numRegs = r.registers;
  out->binaryVersion = device().arch;
  // Newer PTX counts as the device's, for which a card could not compile it.
  out->ptxVersion = function->image->ptx_arch ? std::min(function->image->ptx_arch, device().arch) : device().arch;
  out->maxDynamicSharedSizeBytes = static_cast<int>(r.max_dynamic_shared);
  out->preferredShmemCarveout = function->carveout;
  out->nonPortableClusterSizeAllowed = r.non_portable_cluster;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  Function* function = find_function(host);
  if (!function) return report(cudaErrorInvalidDeviceFunction);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize: {
      Resources r;
      if (const cudaError_t error = resources(*function, &r)) return error;
      if (value < 0 || static_cast<size_t>(value) + r.info.static_shared_bytes > device().shared_per_block_optin)
        return report(cudaErrorInvalidValue, "kernel " + function->name + ": " + std::to_string(value) + " dynamic + " +
                                                 std::to_string(r.info.static_shared_bytes) +
                                                 " static bytes of shared memory exceed the device's " +
                                                 std::to_string(device().shared_per_block_optin));
      function->max_dynamic_shared = value;
      return cudaSuccess;
    }
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      function->carveout = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      function->non_portable_cluster = value;
      return cudaSuccess;
    default:
      return cudaSuccess;
  }
}
CUDASIM_API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute attribute, int value,
                                                        int) {
  return cudaFuncSetAttribute(kernel, attribute, value);
}
CUDASIM_API cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
CUDASIM_API cudaError_t cudaFuncSetSharedMemConfig(const void*, cudaSharedMemConfig) { return cudaSuccess; }

// ---- occupancy
CUDASIM_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host,
                                                                               int block_size, size_t dynamic_shared,
                                                                               unsigned) {
  Function* function = find_function(host);
  if (!function) return report(cudaErrorInvalidDeviceFunction);
  Resources r;
  if (const cudaError_t error = resources(*function, &r)) return error;
  *blocks = active_blocks(r, block_size, dynamic_shared);
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int block_size,
                                                                      size_t dynamic_shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, block_size, dynamic_shared, 0);
}
CUDASIM_API cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* host, int blocks, int) {
  Function* function = find_function(host);
  if (!function || blocks <= 0) return report(function ? cudaErrorInvalidValue : cudaErrorInvalidDeviceFunction);
  Resources r;
  if (const cudaError_t error = resources(*function, &r)) return error;
  const size_t each = device().shared_per_multiprocessor / static_cast<size_t>(blocks) / 128 * 128;
  const size_t used = device().shared_reserved + r.info.static_shared_bytes;
  *bytes = each > used ? std::min(each - used, device().shared_per_block_optin - r.info.static_shared_bytes) : 0;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void* host, const cudaLaunchConfig_t*) {
  Function* function = find_function(host);
  if (!function) return report(cudaErrorInvalidDeviceFunction);
  if (cluster_support() == Clusters::unknown) return report(cudaErrorNotSupported, "CUDASIM_CLUSTERS=unknown");
  *size = device().arch < 90 ? 1 : function->non_portable_cluster ? 16 : 8;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* host,
                                                       const cudaLaunchConfig_t* config) {
  if (cluster_support() == Clusters::unknown) return report(cudaErrorNotSupported, "CUDASIM_CLUSTERS=unknown");
  int blocks = 0;
  const dim3 block = config->blockDim;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &blocks, host, static_cast<int>(block.x * block.y * block.z), config->dynamicSmemBytes))
    return error;
  int size = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& c = config->attrs[i].val.clusterDim;
      size = static_cast<int>(c.x * c.y * c.z);
    }
  *clusters = active_clusters(blocks, size);
  return cudaSuccess;
}
