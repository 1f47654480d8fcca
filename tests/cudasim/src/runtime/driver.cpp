// The few driver functions that programs reach through cudaGetDriverEntryPoint or libcuda.so.1.
#include <cuda.h>

#include <cstring>
#include <unordered_map>

#include "graph.h"
#include "runtime.h"

using namespace cudasim::runtime;

namespace {

unsigned element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 0;
  }
}

CUresult not_supported() {
  log("a driver function that is not simulated was called");
  return CUDA_ERROR_NOT_SUPPORTED;
}

}  // namespace

CUDASIM_API CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                            const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                            const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                            CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                            CUtensorMapFloatOOBfill fill) {
  const unsigned bytes = element_bytes(type);
  const auto refuse = [](const char* why) {
    complain("cuTensorMapEncodeTiled: %s", why);
    return CUDA_ERROR_INVALID_VALUE;
  };
  if (bytes == 0) return refuse("this element type is not simulated");
  if (!out || rank < 1 || rank > 5) return refuse("rank must be 1 to 5");
  if (reinterpret_cast<uintptr_t>(out) % 64) return refuse("the map must be 64-byte aligned");
  if (reinterpret_cast<uintptr_t>(address) % 16) return refuse("the global address must be 16-byte aligned");
  cudasim::TensorMap map;
  map.global_address = reinterpret_cast<uintptr_t>(address);
  map.rank = static_cast<uint8_t>(rank);
  map.dtype = static_cast<uint8_t>(type);
  map.element_bytes = static_cast<uint8_t>(bytes);
  map.interleave = static_cast<uint8_t>(interleave);
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.l2_promotion = static_cast<uint8_t>(promotion);
  map.oob_fill = static_cast<uint8_t>(fill);
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (dims[i] == 0 || dims[i] > (uint64_t{1} << 32)) return refuse("a global dimension is out of range");
    if (box[i] == 0 || box[i] > 256) return refuse("a box dimension must be 1 to 256");
    if (element_strides[i] == 0 || element_strides[i] > 8) return refuse("an element stride must be 1 to 8");
    map.global_dim[i] = static_cast<uint32_t>(dims[i]);
    map.box_dim[i] = static_cast<uint16_t>(box[i]);
    map.element_stride[i] = static_cast<uint16_t>(element_strides[i]);
    if (i + 1 < rank) {
      if (strides[i] % 16 || strides[i] >= (uint64_t{1} << 40))
        return refuse("a global stride must be a multiple of 16 below 2^40");
      map.global_stride_bytes[i] = strides[i];
    }
  }
  const uint64_t inner = uint64_t{box[0]} * bytes;
  if (interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && inner % 16)
    return refuse("the box's inner dimension must be a multiple of 16 bytes");
  const uint64_t span = swizzle == CU_TENSOR_MAP_SWIZZLE_32B    ? 32
                        : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                        : swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0
                                                                : 128;
  if (span && inner > span) return refuse("the box's inner dimension exceeds the swizzle span");
  static_assert(sizeof map <= sizeof *out);
  std::memset(out, 0, sizeof *out);
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

CUDASIM_API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUDASIM_API CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUDASIM_API CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUDASIM_API CUresult cuDeviceGet(CUdevice* out, int) {
  *out = 0;
  return CUDA_SUCCESS;
}
CUDASIM_API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice index) {
  return static_cast<CUresult>(cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), index));
}
CUDASIM_API CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  std::strncpy(name, device().name, static_cast<size_t>(size));
  if (size > 0) name[size - 1] = '\0';
  return CUDA_SUCCESS;
}
CUDASIM_API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUDASIM_API CUresult cuCtxGetCurrent(CUcontext* out) {
  static char context;
  *out = reinterpret_cast<CUcontext>(&context);
  return CUDA_SUCCESS;
}
CUDASIM_API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUDASIM_API CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }
CUDASIM_API CUresult cuCtxPopCurrent_v2(CUcontext* out) { return cuCtxGetCurrent(out); }
CUDASIM_API CUresult cuCtxSynchronize() { return static_cast<CUresult>(cudaDeviceSynchronize()); }
CUDASIM_API CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}
CUDASIM_API CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = cudaGetErrorName(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}
CUDASIM_API CUresult cuMemsetD32Async(CUdeviceptr p, unsigned value, size_t n, CUstream stream) {
  const auto run = [=] {
    finish_launches();
    std::fill_n(reinterpret_cast<unsigned*>(p), n, value);
    return cudaSuccess;
  };
  cudaError_t error;
  return static_cast<CUresult>(captured(stream, cudaGraphNodeTypeMemset, run, &error) ? error : run());
}
CUDASIM_API CUresult cuPointerGetAttribute(void*, CUpointer_attribute, CUdeviceptr) { return CUDA_ERROR_NOT_SUPPORTED; }

// The static CUDA runtime, inside a program or a library, gets the whole driver through this function.
CUDASIM_API CUresult cuGetProcAddress_v2(const char* name, void** out, int, cuuint64_t,
                                         CUdriverProcAddressQueryResult* status) {
  static std::once_flag once;
  std::call_once(once, [] {
    complain(
        "something here is linked with the static CUDA runtime, which cannot be simulated. If it is the code under "
        "test, link it with the shared one (nvcc -cudart shared, CMake's CUDA_RUNTIME_LIBRARY Shared)");
  });
  *out = driver_function(name);
  if (status) *status = *out ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *out ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

namespace cudasim::runtime {

void* driver_function(const std::string& name) {
#define KNOWN(f)                    \
  {                                 \
    #f, reinterpret_cast<void*>(&f) \
  }
  static const std::unordered_map<std::string, void*> known = {
      KNOWN(cuTensorMapEncodeTiled),
      KNOWN(cuInit),
      KNOWN(cuDriverGetVersion),
      KNOWN(cuDeviceGetCount),
      KNOWN(cuDeviceGet),
      KNOWN(cuDeviceGetAttribute),
      KNOWN(cuDeviceGetName),
      KNOWN(cuDevicePrimaryCtxGetState),
      KNOWN(cuCtxGetCurrent),
      KNOWN(cuCtxSetCurrent),
      KNOWN(cuCtxSynchronize),
      KNOWN(cuGetErrorString),
      KNOWN(cuGetErrorName),
      KNOWN(cuPointerGetAttribute),
      KNOWN(cuModuleLoadData),
      KNOWN(cuModuleUnload),
      KNOWN(cuModuleGetFunction),
      KNOWN(cuFuncSetAttribute),
      KNOWN(cuLaunchKernel),
      {"cuCtxPushCurrent", reinterpret_cast<void*>(&cuCtxPushCurrent_v2)},
      {"cuCtxPopCurrent", reinterpret_cast<void*>(&cuCtxPopCurrent_v2)},
      {"cuMemsetD32Async", reinterpret_cast<void*>(&cuMemsetD32Async)},
  };
#undef KNOWN
  const auto found = known.find(name);
  if (found != known.end()) return found->second;
  // PyTorch looks up a list of these at once and gives up if one is missing, even if it never calls it.
  for (const char* prefix : {"cuMem", "cuMulticast", "cuStream", "cuGreenCtx", "cuDev", "cuCtx"})
    if (name.starts_with(prefix)) return reinterpret_cast<void*>(&not_supported);
  return nullptr;
}

}  // namespace cudasim::runtime

CUDASIM_API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned, unsigned long long,
                                                         cudaDriverEntryPointQueryResult* status) {
  *out = driver_function(name);
  if (!*out) log("driver function %s is not simulated", name);
  if (status) *status = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaGetDriverEntryPoint(const char* name, void** out, unsigned long long flags,
                                                cudaDriverEntryPointQueryResult* status) {
  return cudaGetDriverEntryPointByVersion(name, out, CUDA_VERSION, flags, status);
}
