// The one device that the simulated machine has.
#include <sys/sysinfo.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "graph.h"
#include "runtime.h"

namespace cudasim::runtime {
namespace {

constexpr size_t KiB = 1024, MiB = 1024 * KiB;

// After T4, A100, H100, B200 and RTX PRO 6000 Blackwell. The first is the default. Which SMs of a GPC work differs from
// card to card: these are examples, and CUDASIM_GPCS sets others.
constexpr DeviceSpec kSpecs[] = {
    {.arch = 90,
     .name = "cudasim (sm_90)",
     .gpcs = {18, 18, 18, 16, 16, 16, 16, 14},
     .shared_per_multiprocessor = 228 * KiB,
     .shared_per_block = 48 * KiB,
     .shared_per_block_optin = 227 * KiB,
     .l2_bytes = 50 * MiB,
     .bus_bits = 5120,
     .clock_khz = 1980000,
     .memory_clock_khz = 2619000,
     .max_threads = 2048,
     .max_blocks = 32},
    {.arch = 75,
     .name = "cudasim (sm_75)",
     .gpcs = {8, 8, 8, 8, 8},
     .shared_per_multiprocessor = 64 * KiB,
     .shared_per_block = 48 * KiB,
     .shared_per_block_optin = 64 * KiB,
     .l2_bytes = 4 * MiB,
     .bus_bits = 256,
     .clock_khz = 1590000,
     .memory_clock_khz = 5001000,
     .max_threads = 1024,
     .max_blocks = 16,
     .shared_reserved = 0},
    {.arch = 80,
     .name = "cudasim (sm_80)",
     .gpcs = {16, 16, 16, 16, 16, 14, 14},
     .shared_per_multiprocessor = 164 * KiB,
     .shared_per_block = 48 * KiB,
     .shared_per_block_optin = 163 * KiB,
     .l2_bytes = 40 * MiB,
     .bus_bits = 5120,
     .clock_khz = 1410000,
     .memory_clock_khz = 1215000,
     .max_threads = 2048,
     .max_blocks = 32},
    {.arch = 100,
     .name = "cudasim (sm_100)",
     .gpcs = {20, 20, 18, 18, 18, 18, 18, 18},
     .shared_per_multiprocessor = 228 * KiB,
     .shared_per_block = 48 * KiB,
     .shared_per_block_optin = 227 * KiB,
     .l2_bytes = 126 * MiB,
     .bus_bits = 8192,
     .clock_khz = 1965000,
     .memory_clock_khz = 3996000,
     .max_threads = 2048,
     .max_blocks = 32},
    {.arch = 120,
     .name = "cudasim (sm_120)",
     .gpcs = {16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 14, 14},
     .shared_per_multiprocessor = 100 * KiB,
     .shared_per_block = 48 * KiB,
     .shared_per_block_optin = 99 * KiB,
     .l2_bytes = 128 * MiB,
     .bus_bits = 512,
     .clock_khz = 2617000,
     .memory_clock_khz = 14001000,
     .max_threads = 1536,
     .max_blocks = 24},
};

thread_local int current_device = 0;
unsigned device_flags = 0;

DeviceSpec of_architecture() {
  const char* arch = std::getenv("CUDASIM_ARCH");
  if (!arch || !*arch) return kSpecs[0];
  for (const DeviceSpec& s : kSpecs)
    if (std::atoi(arch) == s.arch) return s;
  complain("CUDASIM_ARCH=%s is not one of 75, 80, 90, 100, 120: using 90", arch);
  return kSpecs[0];
}

void read_gpcs(DeviceSpec& spec) {
  const char* list = std::getenv("CUDASIM_GPCS");
  if (!list || !*list) return;
  decltype(spec.gpcs) gpcs{};
  size_t n = 0;
  for (const char* p = list;; ++p) {
    char* end = nullptr;
    const long sms = std::strtol(p, &end, 10);
    if (end == p || sms < 1 || sms > 1024 || n == gpcs.size() || (*end && *end != ',')) {
      complain("CUDASIM_GPCS=%s is not a list of at most 16 positive numbers, as in 18,16,16: ignored", list);
      return;
    }
    gpcs[n++] = static_cast<int>(sms);
    if (!*end) break;
    p = end;
  }
  spec.gpcs = gpcs;
}

cudaError_t check_device(int index) { return index == 0 ? cudaSuccess : report(cudaErrorInvalidDevice); }

}  // namespace

const DeviceSpec& device() {
  static const DeviceSpec spec = [] {
    DeviceSpec s = of_architecture();
    read_gpcs(s);
    s.multiprocessors = std::accumulate(s.gpcs.begin(), s.gpcs.end(), 0);
    return s;
  }();
  return spec;
}

// Half of the host's memory, which it can provide: programs may size their buffers by it.
size_t total_memory() {
  static const size_t total = [] {
    struct sysinfo info{};
    if (sysinfo(&info) != 0) return size_t{8} << 30;
    return (static_cast<size_t>(info.totalram) * info.mem_unit) / 2 & ~(MiB - 1);
  }();
  return total;
}

Clusters cluster_support() {
  static const Clusters found = [] {
    const char* const what = std::getenv("CUDASIM_CLUSTERS");
    if (!what || !*what) return Clusters::work;
    if (std::strcmp(what, "refused") == 0) return Clusters::refused;
    if (std::strcmp(what, "unknown") != 0)
      complain("CUDASIM_CLUSTERS=%s is not refused or unknown: taken as unknown", what);
    return Clusters::unknown;
  }();
  return found;
}

}  // namespace cudasim::runtime

using namespace cudasim::runtime;

CUDASIM_API cudaError_t cudaGetDeviceCount(int* count) {
  if (!count) return report(cudaErrorInvalidValue);
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  const bool hidden = visible && (!*visible || *visible == '-');
  *count = hidden ? 0 : 1;
  return hidden ? report(cudaErrorNoDevice) : cudaSuccess;
}

CUDASIM_API cudaError_t cudaGetDevice(int* index) {
  if (!index) return report(cudaErrorInvalidValue);
  *index = current_device;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaSetDevice(int index) {
  if (const cudaError_t error = check_device(index)) return error;
  current_device = index;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaInitDevice(int index, unsigned, unsigned) { return check_device(index); }
CUDASIM_API cudaError_t cudaSetValidDevices(int*, int) { return cudaSuccess; }

CUDASIM_API cudaError_t cudaChooseDevice(int* index, const cudaDeviceProp*) {
  *index = 0;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int index) {
  if (!out) return report(cudaErrorInvalidValue);
  if (const cudaError_t error = check_device(index)) return error;
  attach_to_torch();
  const DeviceSpec& spec = device();
  cudaDeviceProp p{};
  std::snprintf(p.name, sizeof p.name, "%s", spec.name);
  std::memcpy(p.uuid.bytes, "cudasim-device-0", 16);
  p.totalGlobalMem = total_memory();
  p.sharedMemPerBlock = spec.shared_per_block;
  p.sharedMemPerBlockOptin = spec.shared_per_block_optin;
  p.sharedMemPerMultiprocessor = spec.shared_per_multiprocessor;
  p.reservedSharedMemPerBlock = spec.shared_reserved;
  p.regsPerBlock = p.regsPerMultiprocessor = spec.registers;
  p.warpSize = spec.warp;
  p.memPitch = 0x7fffffff;
  p.maxThreadsPerBlock = spec.max_threads_per_block;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
  p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 0x7fffffff;
  p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.totalConstMem = 64 * KiB;
  p.major = spec.arch / 10;
  p.minor = spec.arch % 10;
  p.textureAlignment = 512;
  p.texturePitchAlignment = 32;
  p.multiProcessorCount = spec.multiprocessors;
  p.canMapHostMemory = 1;
  p.surfaceAlignment = 512;
  p.concurrentKernels = 1;
  p.ECCEnabled = 1;
  p.asyncEngineCount = 3;
  p.unifiedAddressing = 1;
  p.memoryBusWidth = spec.bus_bits;
  p.l2CacheSize = static_cast<int>(spec.l2_bytes);
  p.persistingL2CacheMaxSize = static_cast<int>(spec.l2_bytes * 5 / 8);
  p.maxThreadsPerMultiProcessor = spec.max_threads;
  p.streamPrioritiesSupported = 1;
  p.globalL1CacheSupported = p.localL1CacheSupported = 1;
  p.managedMemory = 1;
  p.concurrentManagedAccess = 1;
  p.computePreemptionSupported = 1;
  p.canUseHostPointerForRegisteredMem = 1;
  p.cooperativeLaunch = 1;
  p.maxBlocksPerMultiProcessor = spec.max_blocks;
  p.accessPolicyMaxWindowSize = 128 * MiB;
  p.hostRegisterSupported = 1;
  p.memoryPoolsSupported = 1;
  p.clusterLaunch = spec.arch >= 90;
  p.unifiedFunctionPointers = 1;
  p.deviceNumaId = -1;
  p.hostNumaId = -1;
  *out = p;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (!value) return report(cudaErrorInvalidValue);
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, index)) return error;
  const DeviceSpec& spec = device();
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = p.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxBlockDimX:
      *value = p.maxThreadsDim[0];
      break;
    case cudaDevAttrMaxBlockDimY:
      *value = p.maxThreadsDim[1];
      break;
    case cudaDevAttrMaxBlockDimZ:
      *value = p.maxThreadsDim[2];
      break;
    case cudaDevAttrMaxGridDimX:
      *value = p.maxGridSize[0];
      break;
    case cudaDevAttrMaxGridDimY:
      *value = p.maxGridSize[1];
      break;
    case cudaDevAttrMaxGridDimZ:
      *value = p.maxGridSize[2];
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(p.sharedMemPerBlock);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(p.sharedMemPerBlockOptin);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(p.sharedMemPerMultiprocessor);
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = static_cast<int>(p.reservedSharedMemPerBlock);
      break;
    case cudaDevAttrTotalConstantMemory:
      *value = static_cast<int>(p.totalConstMem);
      break;
    case cudaDevAttrWarpSize:
      *value = p.warpSize;
      break;
    case cudaDevAttrMaxPitch:
      *value = static_cast<int>(p.memPitch);
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = p.regsPerBlock;
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = p.regsPerMultiprocessor;
      break;
    case cudaDevAttrClockRate:
      *value = spec.clock_khz;
      break;
    case cudaDevAttrMemoryClockRate:
      *value = spec.memory_clock_khz;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *value = p.memoryBusWidth;
      break;
    case cudaDevAttrTextureAlignment:
      *value = static_cast<int>(p.textureAlignment);
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = p.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = p.maxBlocksPerMultiProcessor;
      break;
    case cudaDevAttrL2CacheSize:
      *value = p.l2CacheSize;
      break;
    case cudaDevAttrMaxPersistingL2CacheSize:
      *value = p.persistingL2CacheMaxSize;
      break;
    case cudaDevAttrMaxAccessPolicyWindowSize:
      *value = p.accessPolicyMaxWindowSize;
      break;
    case cudaDevAttrAsyncEngineCount:
      *value = p.asyncEngineCount;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = p.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = p.minor;
      break;
    case cudaDevAttrClusterLaunch:
      *value = p.clusterLaunch;
      break;
    case cudaDevAttrSingleToDoublePrecisionPerfRatio:
      *value = 2;
      break;
    case cudaDevAttrNumaId:
    case cudaDevAttrHostNumaId:
      *value = -1;
      break;
    case cudaDevAttrGpuOverlap:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrEccEnabled:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrGlobalL1CacheSupported:
    case cudaDevAttrLocalL1CacheSupported:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrComputePreemptionSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrMemSyncDomainCount:
      *value = 1;
      break;
    default:
      *value = 0;
      break;
  }
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  struct sysinfo info{};
  sysinfo(&info);
  const size_t available = static_cast<size_t>(info.freeram + info.bufferram) * info.mem_unit;
  if (total) *total = total_memory();
  if (free) *free = std::min(available, total_memory());
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaDeviceReset() { return take_pending_fault(); }
CUDASIM_API cudaError_t cudaDeviceSynchronize() {
  if (const cudaError_t error = check_wait_device("cudaDeviceSynchronize")) return error;
  return take_pending_fault();
}

CUDASIM_API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaSetDeviceFlags(unsigned flags) {
  device_flags = flags;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaGetDeviceFlags(unsigned* flags) {
  *flags = device_flags;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
CUDASIM_API cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit limit) {
  switch (limit) {
    case cudaLimitStackSize:
      *value = 1024;
      break;
    case cudaLimitPrintfFifoSize:
      *value = MiB;
      break;
    case cudaLimitMallocHeapSize:
      *value = 8 * MiB;
      break;
    default:
      *value = 0;
      break;
  }
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }
CUDASIM_API cudaError_t cudaDeviceGetCacheConfig(cudaFuncCache* config) {
  *config = cudaFuncCachePreferNone;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaDeviceSetSharedMemConfig(cudaSharedMemConfig) { return cudaSuccess; }
CUDASIM_API cudaError_t cudaDeviceGetSharedMemConfig(cudaSharedMemConfig* config) {
  *config = cudaSharedMemBankSizeFourByte;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaCtxResetPersistingL2Cache() { return cudaSuccess; }

CUDASIM_API cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int index) {
  if (const cudaError_t error = check_device(index)) return error;
  std::snprintf(id, static_cast<size_t>(size), "0000:00:00.0");
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaDeviceGetByPCIBusId(int* index, const char*) {
  *index = 0;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return report(cudaErrorPeerAccessUnsupported); }
CUDASIM_API cudaError_t cudaDeviceDisablePeerAccess(int) { return report(cudaErrorPeerAccessNotEnabled); }
CUDASIM_API cudaError_t cudaDeviceGetP2PAttribute(int* value, cudaDeviceP2PAttr, int, int) {
  *value = 0;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaProfilerStart() { return cudaSuccess; }
CUDASIM_API cudaError_t cudaProfilerStop() { return cudaSuccess; }
