// Device memory is host memory. Each allocation lies far from all others, and addresses are never reused, so an access
// out of bounds or after the free hits no live allocation. New memory is filled with 0xFF (NaN in every floating-point
// format, -1 in integers).
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>

#include "graph.h"
#include "runtime.h"

namespace cudasim::runtime {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kSpacing = size_t{4} << 20;
constexpr uintptr_t kFirst = uintptr_t{0x100000000000}, kLast = uintptr_t{0x500000000000};
constexpr size_t kPoisonLimit = size_t{1} << 30;  // filling more would take too long

struct Table {
  std::mutex mutex;
  std::map<uintptr_t, Range> ranges;
  uintptr_t next = kFirst;
  size_t used = 0;
};
Table& table() {
  static Table& t = *new Table;  // outlives the static objects of its users
  return t;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

cudaError_t allocate(void** out, size_t size, Space space) {
  if (const cudaError_t error = context_error()) return error;
  if (!out) return report(cudaErrorInvalidValue);
  attach_to_torch();
  *out = nullptr;
  if (size == 0) return cudaSuccess;
  const size_t mapped = round_up(size, kPage);
  Table& t = table();
  void* p = MAP_FAILED;
  {
    const std::lock_guard lock(t.mutex);
    const bool fits = size <= total_memory() && t.used <= total_memory() - size;
    for (int attempt = 0; fits && attempt < 1000 && p == MAP_FAILED; ++attempt) {
      if (t.next + mapped + kSpacing > kLast) t.next = kFirst;
      p = mmap(reinterpret_cast<void*>(t.next), mapped, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
      if (p == MAP_FAILED && errno != EEXIST) break;
      t.next += round_up(mapped, kSpacing) + kSpacing;
    }
    if (p == MAP_FAILED)
      return report(cudaErrorMemoryAllocation,
                    "no memory for " + std::to_string(size) + " bytes, " + std::to_string(t.used) + " are in use");
    const auto base = reinterpret_cast<uintptr_t>(p);
    t.ranges[base] = {base, size, space, mapped};
    t.used += mapped;
  }
  std::memset(p, 0xff, std::min(mapped, kPoisonLimit));
  register_allocation(p, size);
  *out = p;
  return cudaSuccess;
}

void unmap(const Range& range) {
  void* const p = reinterpret_cast<void*>(range.base);
  unregister_allocation(p);
  munmap(p, range.mapped);
}

// Work on a stream executes immediately, or is recorded if the stream is being captured.
template <class Work>
cudaError_t on_stream(cudaStream_t stream, cudaGraphNodeType type, const Work& work) {
  cudaError_t error = context_error();
  if (error) return error;
  if (any_capture() && captured(stream, type, work, &error)) return error;
  finish_launches();
  return work();
}

cudaError_t allocate_on(void** p, size_t size, cudaStream_t stream) {
  const cudaError_t error = allocate(p, size, Space::device);
  if (error == cudaSuccess && *p)
    if (Capture* c = capture_of(stream)) keep(c, *p);
  return error;
}
cudaError_t allocate_now(void** p, size_t size, Space space, const char* what) {
  if (const cudaError_t error = check_unsafe(what)) return error;
  return allocate(p, size, space);
}
cudaError_t release(void* p, const char* what);
cudaError_t release_now(void* p, const char* what) {
  if (const cudaError_t error = context_error()) return error;
  if (p)
    if (const cudaError_t error = check_unsafe(what)) return error;
  return release(p, what);
}

cudaError_t release(void* p, const char* what) {
  if (!p) return take_pending_fault();
  Table& t = table();
  Range range;
  {
    const std::lock_guard lock(t.mutex);
    const auto found = t.ranges.find(reinterpret_cast<uintptr_t>(p));
    if (found == t.ranges.end() || found->second.mapped == 0 || found->second.freed)
      return report(cudaErrorInvalidValue,
                    std::string(what) + " of a pointer that is not the start of a live allocation");
    range = found->second;
    if (range.in_graph) {
      found->second.freed = true;
      return cudaSuccess;
    }
    t.ranges.erase(found);
    t.used -= range.mapped;
  }
  unmap(range);
  return cudaSuccess;
}

// Checks that the n bytes at p lie within one allocation, or in plain host memory where that is allowed.
bool check_span(const void* p, size_t n, bool must_be_device, const char* what) {
  Range range;
  if (find_range(p, &range)) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(p) - range.base;
    if (n <= range.size - offset) return true;
    report(cudaErrorInvalidValue, std::string(what) + " of " + std::to_string(n) + " bytes at offset " +
                                      std::to_string(offset) + " of an allocation of " + std::to_string(range.size) +
                                      " bytes");
    return false;
  }
  if (!must_be_device && p) return true;
  report(cudaErrorInvalidValue, std::string(what) + " at an address that is not (or no longer) device memory");
  return false;
}

bool needs_device_destination(cudaMemcpyKind kind) {
  return kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
}
bool needs_device_source(cudaMemcpyKind kind) {
  return kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
}

cudaError_t copy_2d(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width, size_t height,
                    cudaMemcpyKind kind) {
  if (width == 0 || height == 0) return cudaSuccess;
  if (height > 1 && (width > dst_pitch || width > src_pitch)) return report(cudaErrorInvalidPitchValue);
  if (!check_span(dst, dst_pitch * (height - 1) + width, needs_device_destination(kind), "copy to") ||
      !check_span(src, src_pitch * (height - 1) + width, needs_device_source(kind), "copy from"))
    return cudaErrorInvalidValue;
  for (size_t row = 0; row < height; ++row)
    std::memmove(static_cast<char*>(dst) + row * dst_pitch, static_cast<const char*>(src) + row * src_pitch, width);
  return cudaSuccess;
}

cudaError_t copy(void* dst, const void* src, size_t n, cudaMemcpyKind kind) {
  return copy_2d(dst, n, src, n, n, 1, kind);
}

cudaError_t fill_2d(void* dst, size_t pitch, int value, size_t width, size_t height) {
  if (width == 0 || height == 0) return cudaSuccess;
  if (!check_span(dst, pitch * (height - 1) + width, true, "memset")) return cudaErrorInvalidValue;
  for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(dst) + row * pitch, value, width);
  return cudaSuccess;
}

cudaError_t copy_3d(const cudaMemcpy3DParms* p) {
  if (p->srcArray || p->dstArray) return report(cudaErrorNotSupported, "CUDA arrays are not simulated");
  for (size_t z = 0; z < p->extent.depth; ++z) {
    const auto at = [z](const cudaPitchedPtr& ptr, const cudaPos& pos) {
      return static_cast<char*>(ptr.ptr) + ((z + pos.z) * ptr.ysize + pos.y) * ptr.pitch + pos.x;
    };
    if (const cudaError_t error = copy_2d(at(p->dstPtr, p->dstPos), p->dstPtr.pitch, at(p->srcPtr, p->srcPos),
                                          p->srcPtr.pitch, p->extent.width, p->extent.height, p->kind))
      return error;
  }
  return cudaSuccess;
}

// A synchronous call also reports the fault of an earlier kernel.
cudaError_t synchronous(cudaError_t error) {
  const cudaError_t fault = take_pending_fault();
  return fault != cudaSuccess ? fault : error;
}

cudaMemPool_t default_pool() {
  static char pool;
  return reinterpret_cast<cudaMemPool_t>(&pool);
}

}  // namespace

bool find_range(const void* p, Range* out) {
  Table& t = table();
  const std::lock_guard lock(t.mutex);
  const auto address = reinterpret_cast<uintptr_t>(p);
  auto next = t.ranges.upper_bound(address);
  if (next == t.ranges.begin()) return false;
  const Range& range = std::prev(next)->second;
  if (address - range.base >= range.size) return false;
  *out = range;
  return true;
}

void share_with_graph(void* base) {
  Table& t = table();
  const std::lock_guard lock(t.mutex);
  if (const auto found = t.ranges.find(reinterpret_cast<uintptr_t>(base)); found != t.ranges.end())
    found->second.in_graph = true;
}
void release_from_graph(void* base) {
  Table& t = table();
  Range range;
  {
    const std::lock_guard lock(t.mutex);
    const auto found = t.ranges.find(reinterpret_cast<uintptr_t>(base));
    if (found == t.ranges.end()) return;
    found->second.in_graph = false;
    if (!found->second.freed) return;
    range = found->second;
    t.ranges.erase(found);
    t.used -= range.mapped;
  }
  unmap(range);
}

void add_symbol_range(void* base, size_t size) {
  Table& t = table();
  const std::lock_guard lock(t.mutex);
  const auto address = reinterpret_cast<uintptr_t>(base);
  t.ranges.try_emplace(address, Range{address, size, Space::symbol, 0});
}

}  // namespace cudasim::runtime

using namespace cudasim::runtime;

// Bytes of device memory in use, in whole pages. Tests use this.
CUDASIM_API size_t cudasim_memory() {
  const std::lock_guard lock(table().mutex);
  return table().used;
}

// ---- allocation
CUDASIM_API cudaError_t cudaMalloc(void** p, size_t size) { return allocate_now(p, size, Space::device, "cudaMalloc"); }
CUDASIM_API cudaError_t cudaMallocManaged(void** p, size_t size, unsigned) {
  return allocate_now(p, size, Space::managed, "cudaMallocManaged");
}
CUDASIM_API cudaError_t cudaMallocHost(void** p, size_t size) {
  return allocate_now(p, size, Space::pinned, "cudaMallocHost");
}
CUDASIM_API cudaError_t cudaHostAlloc(void** p, size_t size, unsigned) {
  return allocate_now(p, size, Space::pinned, "cudaHostAlloc");
}
CUDASIM_API cudaError_t cudaMallocAsync(void** p, size_t size, cudaStream_t stream) {
  return allocate_on(p, size, stream);
}
CUDASIM_API cudaError_t cudaMallocFromPoolAsync(void** p, size_t size, cudaMemPool_t, cudaStream_t stream) {
  return allocate_on(p, size, stream);
}
CUDASIM_API cudaError_t cudaMallocPitch(void** p, size_t* pitch, size_t width, size_t height) {
  *pitch = round_up(width, 512);
  return allocate_now(p, *pitch * height, Space::device, "cudaMallocPitch");
}
CUDASIM_API cudaError_t cudaMalloc3D(cudaPitchedPtr* out, cudaExtent extent) {
  *out = {nullptr, round_up(extent.width, 512), extent.width, extent.height};
  return allocate_now(&out->ptr, out->pitch * extent.height * extent.depth, Space::device, "cudaMalloc3D");
}
CUDASIM_API cudaError_t cudaFree(void* p) { return release_now(p, "cudaFree"); }
CUDASIM_API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return release(p, "cudaFreeAsync"); }
CUDASIM_API cudaError_t cudaFreeHost(void* p) { return release_now(p, "cudaFreeHost"); }
CUDASIM_API int cudasim_in_graph(const void* p) {
  Range range;
  return find_range(p, &range) && range.in_graph;
}
// For libcudasim_torch, whose memory comes from the graph's pool during a capture, as PyTorch's does.
CUDASIM_API int cudasim_torch_malloc(void** p, size_t size, cudaStream_t stream) {
  return allocate_on(p, size, stream);
}
CUDASIM_API int cudasim_torch_free(void* p) { return release(p, "free"); }

CUDASIM_API cudaError_t cudaHostRegister(void* p, size_t size, unsigned) {
  if (!p || size == 0) return report(cudaErrorInvalidValue);
  Range existing;
  if (find_range(p, &existing)) return report(cudaErrorHostMemoryAlreadyRegistered);
  Table& t = table();
  {
    const std::lock_guard lock(t.mutex);
    const auto address = reinterpret_cast<uintptr_t>(p);
    t.ranges[address] = {address, size, Space::registered, 0};
  }
  cudasim::register_allocation(p, size);
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaHostUnregister(void* p) {
  Table& t = table();
  {
    const std::lock_guard lock(t.mutex);
    const auto found = t.ranges.find(reinterpret_cast<uintptr_t>(p));
    if (found == t.ranges.end() || found->second.space != Space::registered)
      return report(cudaErrorHostMemoryNotRegistered);
    t.ranges.erase(found);
  }
  cudasim::unregister_allocation(p);
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaHostGetDevicePointer(void** out, void* host, unsigned) {
  Range range;
  if (!find_range(host, &range)) return report(cudaErrorInvalidValue);
  *out = host;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaHostGetFlags(unsigned* flags, void*) {
  *flags = 0;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* p) {
  if (!out) return report(cudaErrorInvalidValue);
  *out = {};
  Range range;
  if (!find_range(p, &range)) {
    out->type = cudaMemoryTypeUnregistered;
    out->device = -2;
    out->hostPointer = const_cast<void*>(p);
    return cudaSuccess;
  }
  void* const address = const_cast<void*>(p);
  out->device = 0;
  out->devicePointer = address;
  switch (range.space) {
    case Space::device:
    case Space::symbol:
      out->type = cudaMemoryTypeDevice;
      break;
    case Space::managed:
      out->type = cudaMemoryTypeManaged;
      break;
    case Space::pinned:
    case Space::registered:
      out->type = cudaMemoryTypeHost;
      break;
  }
  if (out->type != cudaMemoryTypeDevice) out->hostPointer = address;
  return cudaSuccess;
}

extern "C" __attribute__((visibility("default"))) size_t cudasim_bytes_at(const void* p) {
  Range range;
  return find_range(p, &range) ? range.size - (reinterpret_cast<uintptr_t>(p) - range.base) : 0;
}

// ---- copies
CUDASIM_API cudaError_t cudaMemcpy(void* dst, const void* src, size_t n, cudaMemcpyKind kind) {
  if (const cudaError_t error = check_legacy("cudaMemcpy")) return error;
  return synchronous(copy(dst, src, n, kind));
}
CUDASIM_API cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t n, cudaMemcpyKind kind,
                                        cudaStream_t stream) {
  return on_stream(stream, cudaGraphNodeTypeMemcpy, [=] { return copy(dst, src, n, kind); });
}
CUDASIM_API cudaError_t cudaMemcpyPeer(void* dst, int, const void* src, int, size_t n) {
  return cudaMemcpy(dst, src, n, cudaMemcpyDeviceToDevice);
}
CUDASIM_API cudaError_t cudaMemcpyPeerAsync(void* dst, int, const void* src, int, size_t n, cudaStream_t stream) {
  return cudaMemcpyAsync(dst, src, n, cudaMemcpyDeviceToDevice, stream);
}
CUDASIM_API cudaError_t cudaMemcpy2D(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width,
                                     size_t height, cudaMemcpyKind kind) {
  if (const cudaError_t error = check_legacy("cudaMemcpy2D")) return error;
  return synchronous(copy_2d(dst, dst_pitch, src, src_pitch, width, height, kind));
}
CUDASIM_API cudaError_t cudaMemcpy2DAsync(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width,
                                          size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  return on_stream(stream, cudaGraphNodeTypeMemcpy,
                   [=] { return copy_2d(dst, dst_pitch, src, src_pitch, width, height, kind); });
}
CUDASIM_API cudaError_t cudaMemcpy3D(const cudaMemcpy3DParms* p) {
  if (const cudaError_t error = check_legacy("cudaMemcpy3D")) return error;
  return synchronous(copy_3d(p));
}
CUDASIM_API cudaError_t cudaMemcpy3DAsync(const cudaMemcpy3DParms* p, cudaStream_t stream) {
  return on_stream(stream, cudaGraphNodeTypeMemcpy, [parameters = *p] { return copy_3d(&parameters); });
}
CUDASIM_API cudaError_t cudaMemset2DAsync(void* dst, size_t pitch, int value, size_t width, size_t height,
                                          cudaStream_t stream) {
  return on_stream(stream, cudaGraphNodeTypeMemset, [=] { return fill_2d(dst, pitch, value, width, height); });
}
CUDASIM_API cudaError_t cudaMemset2D(void* dst, size_t pitch, int value, size_t width, size_t height) {
  return cudaMemset2DAsync(dst, pitch, value, width, height, nullptr);
}
CUDASIM_API cudaError_t cudaMemsetAsync(void* dst, int value, size_t n, cudaStream_t stream) {
  return cudaMemset2DAsync(dst, n, value, n, 1, stream);
}
CUDASIM_API cudaError_t cudaMemset(void* dst, int value, size_t n) { return cudaMemsetAsync(dst, value, n, nullptr); }

CUDASIM_API cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* src, size_t n, size_t offset,
                                           cudaMemcpyKind kind) {
  void* base = nullptr;
  if (const cudaError_t error = cudaGetSymbolAddress(&base, symbol)) return error;
  return cudaMemcpy(static_cast<char*>(base) + offset, src, n, kind);
}
CUDASIM_API cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* src, size_t n, size_t offset,
                                                cudaMemcpyKind kind, cudaStream_t stream) {
  void* base = nullptr;
  if (const cudaError_t error = cudaGetSymbolAddress(&base, symbol)) return error;
  return cudaMemcpyAsync(static_cast<char*>(base) + offset, src, n, kind, stream);
}
CUDASIM_API cudaError_t cudaMemcpyFromSymbol(void* dst, const void* symbol, size_t n, size_t offset,
                                             cudaMemcpyKind kind) {
  void* base = nullptr;
  if (const cudaError_t error = cudaGetSymbolAddress(&base, symbol)) return error;
  return cudaMemcpy(dst, static_cast<char*>(base) + offset, n, kind);
}
CUDASIM_API cudaError_t cudaMemcpyFromSymbolAsync(void* dst, const void* symbol, size_t n, size_t offset,
                                                  cudaMemcpyKind kind, cudaStream_t stream) {
  void* base = nullptr;
  if (const cudaError_t error = cudaGetSymbolAddress(&base, symbol)) return error;
  return cudaMemcpyAsync(dst, static_cast<char*>(base) + offset, n, kind, stream);
}

// ---- hints and pools
CUDASIM_API cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) {
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) { return cudaSuccess; }
CUDASIM_API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = default_pool();
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int) {
  *pool = default_pool();
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaDeviceSetMemPool(int, cudaMemPool_t) { return cudaSuccess; }
CUDASIM_API cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  *pool = default_pool();
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaMemPoolDestroy(cudaMemPool_t) { return cudaSuccess; }
CUDASIM_API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
CUDASIM_API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  *static_cast<uint64_t*>(value) = 0;
  return cudaSuccess;
}
CUDASIM_API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
CUDASIM_API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
