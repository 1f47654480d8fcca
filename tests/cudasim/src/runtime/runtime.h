// Shared by the parts of the stand-in libcudart.
#pragma once
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "cudasim.h"

#define CUDASIM_API extern "C" __attribute__((visibility("default")))

namespace cudasim::runtime {

// ---- errors (error.cpp)
// Remembers `error` as the calling thread's last error, as every runtime call does; returns it.
cudaError_t report(cudaError_t error);
// The same, with a text that cudaGetErrorString then adds for this thread.
cudaError_t report(cudaError_t error, const std::string& detail);
// A fault inside a kernel. The next synchronizing call reports it, too, unless it was queried before.
cudaError_t report_kernel_fault(cudaError_t error, const std::string& detail);
cudaError_t take_pending_fault();
// With CUDASIM_STICKY=1: the fault that ended the process's context, which every later call returns.
cudaError_t context_error();

bool logging();
[[gnu::format(printf, 1, 2)]] void log(const char* format, ...);       // only with CUDASIM_LOG=1
[[gnu::format(printf, 1, 2)]] void complain(const char* format, ...);  // always

// ---- the simulated device (device.cpp)
struct DeviceSpec {
  int arch;  // 90
  const char* name;
  std::array<int, 16> gpcs;  // the SMs of each GPC: a cluster's CTAs run within one
  int multiprocessors = 0;   // their sum
  size_t shared_per_multiprocessor, shared_per_block, shared_per_block_optin;
  size_t l2_bytes;
  int bus_bits, clock_khz, memory_clock_khz;
  int max_threads, max_blocks;    // resident on an SM
  size_t shared_reserved = 1024;  // per CTA, by the system
  static constexpr int registers = 65536, warp = 32;
  static constexpr int max_threads_per_block = 1024;
};
const DeviceSpec& device();
size_t total_memory();
// What the driver does with clusters, set by CUDASIM_CLUSTERS: by default they work. `refused` rejects their launches,
// but answers queries about them; `unknown` rejects both.
enum class Clusters { work, refused, unknown };
Clusters cluster_support();

// ---- memory (memory.cpp)
enum class Space { device, managed, pinned, registered, symbol };
struct Range {
  uintptr_t base;
  size_t size;
  Space space;
  size_t mapped;                         // bytes to unmap, 0 if not ours
  bool in_graph = false, freed = false;  // a graph keeps it; the program has freed it
};
// The live range that holds `p`, if any.
bool find_range(const void* p, Range* out);
void add_symbol_range(void* base, size_t size);
// Memory that a graph uses lives until both the program and the graph have released it.
void share_with_graph(void* base);
void release_from_graph(void* base);

// ---- device code (module.cpp)
struct Function;  // a registered __global__ function
Function* find_function(const void* host_or_handle);
// Loads the function's module if that has not been done. Fills `error` on failure.
Kernel* load(Function&, std::string* error);
const char* name_of(const Function&);  // mangled
struct Resources {
  KernelInfo info;
  int registers;  // by ptxas if the binary has SASS for this device
  bool registers_exact;
  uint32_t sass_instructions;  // in its code; 0 without SASS for this device
  size_t max_dynamic_shared;
  bool non_portable_cluster;
};
cudaError_t resources(Function&, Resources* out);  // reports its own errors
int active_blocks(const Resources&, int block_size, size_t dynamic_shared);
// Clusters that are resident at once, if each SM has room for so many of their CTAs.
int active_clusters(int blocks_per_multiprocessor, int cluster_size);

// ---- launches (launch.cpp)
// All launches have finished, so a programmatic dependent launch does not overlap with them: for everything that waits
// for a stream, or submits other work to it.
void finish_launches();

// ---- driver entry points (driver.cpp)
void* driver_function(const std::string& name);  // nullptr if unknown

// ---- PyTorch (torch_hook.cpp): hands PyTorch's own CUDA operators to its CPU ones.
void attach_to_torch();

}  // namespace cudasim::runtime
