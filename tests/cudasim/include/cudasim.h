// cudasim: runs compiled CUDA kernels (PTX) on a CPU, with the checks of a sanitizer and the
// counters of a profiler. This header is the seam between its two halves:
//   src/core/     parses PTX and executes launches                     (implements this header)
//   src/runtime/  a stand-in for libcudart / libcublas that loads fatbins and calls this header
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace cudasim {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

struct Module;  // one PTX translation unit
struct Kernel;  // one .entry of a module

// Parse PTX text (need not be NUL terminated). Returns nullptr and fills `error` on failure.
// An instruction the core does not know is not a parse error: it fails only when executed,
// with the instruction's text in the message.
Module* load_module(const char* ptx, size_t size, std::string* error);
void unload_module(Module*);

Kernel* find_kernel(Module*, const char* mangled_name);  // nullptr if absent
std::vector<std::string> kernel_names(const Module*);

struct KernelInfo {
  std::vector<uint32_t> param_sizes;  // bytes of each .param, in order
  std::vector<uint32_t> param_aligns;
  uint32_t static_shared_bytes = 0;
  uint32_t local_bytes = 0;         // .local depot per thread
  uint32_t registers_estimate = 0;  // virtual registers declared, not ptxas' allocation
  uint32_t max_threads = 1024;      // .maxntid product where given
  uint32_t instructions = 0;        // in its code and that of the functions it reaches
};
KernelInfo kernel_info(const Kernel*);

// Address and size of a module-scope .global/.const variable, backed by host memory.
void* find_global(Module*, const char* mangled_name, size_t* size);

// The launches that may still run when a programmatic dependent launch starts.
struct Unfinished;

struct LaunchConfig {
  Dim3 grid, block, cluster;
  uint32_t dynamic_shared_bytes = 0;
  uint32_t registers = 0;                   // per thread at launch; 0: unknown, and setmaxnreg is not checked
  int arch = 90;                            // the device, for CUDASIM_MMA=card
  std::shared_ptr<const Unfinished> after;  // null: every earlier launch has finished
  // As cudaLaunchKernel: args[i] points at the i-th parameter's bytes.
  void* const* args = nullptr;
};

// What one launch did. Counts are exact for the PTX executed (not SASS).
struct Profile {
  std::string kernel;
  Dim3 grid, block;
  uint64_t warp_instructions = 0, thread_instructions = 0;
  uint64_t busiest_cluster_instructions = 0;  // warp instructions of the cluster that executed the most
  // warp instructions by class
  uint64_t integer = 0, fp32 = 0, half = 0, convert = 0, special = 0, control = 0, mma = 0, load_global = 0,
           store_global = 0, load_shared = 0, store_shared = 0, load_local = 0, store_local = 0, load_const = 0,
           async_copy = 0, barrier = 0, shuffle = 0, atomic = 0;
  uint64_t mma_flops = 0;                              // 2*m*n*k summed over mma/wgmma/tcgen05
  uint64_t tcgen05_flops = 0, tcgen05_wavefronts = 0;  // of them by tcgen05, and what it reads of shared memory
  uint64_t global_sectors_read = 0, global_sectors_written = 0;              // 32-byte sectors, summed over requests
  uint64_t global_sectors_read_ideal = 0, global_sectors_written_ideal = 0;  // ceil(bytes asked / 32)
  uint64_t unique_bytes_read = 0, unique_bytes_written = 0;                  // footprint in 32-byte sectors * 32
  // Of the sectors read, those that cp.async and bulk copies asked L2 for, and how many arrived in shared memory:
  // a multicast copy asks once for all blocks.
  uint64_t async_sectors_read = 0, async_sectors_received = 0;
  uint64_t constant_wavefronts = 0;                             // distinct addresses of each warp's constant load
  uint64_t shared_wavefronts = 0, shared_wavefronts_ideal = 0;  // conflicts = the difference
  double seconds = 0;                                           // host time of the simulation, for its own tuning
};

enum class Fault {
  none,
  unsupported_instruction,
  global_out_of_bounds,
  shared_out_of_bounds,
  misaligned,
  uninitialized_shared,
  shared_race,
  barrier_deadlock,
  bad_launch,
  trap,
  internal,
  grid_race,
  grid_same_value,
  non_coherent,
  registers,        // setmaxnreg or wgmma.fence
  shared_lifetime,  // shared memory of a block that has not begun or has ended
  tensor_memory     // allocation, lanes, waits and descriptors of tcgen05
};

struct LaunchResult {
  Fault fault = Fault::none;
  std::string message;  // kernel, block, thread, PTX line, instruction and address where known
  Profile profile;
  std::shared_ptr<const Unfinished> unfinished;  // `after` of a programmatic dependent launch; only with CHECK=grid
};

// Runs the whole grid before it returns. Environment:
//   CUDASIM_CHECK=race,init   also check races on shared and tensor memory and reads of what nobody has written there;
//                 fence       tcgen05.fence and tcgen05.wait::ld, as the ISA wants them (with race);
//                 grid        and races between blocks on global memory (`benign`: not those of equal values)
//   CUDASIM_SEED=n            shuffles block and warp scheduling, to expose order dependence
//   CUDASIM_THREADS=n         host threads (default: all); 1 makes the order of atomics repeatable
//   CUDASIM_MMA=card          mma and wgmma add with the arithmetic of the device's tensor cores (core/card_sum.h)
//   CUDASIM_TIMEOUT=seconds   ends a launch that does not finish, saying where every warp stands
LaunchResult launch(Kernel*, const LaunchConfig&);

// Device memory the runtime has handed out. Every global access must fall wholly inside one live
// range (or inside a module variable), else Fault::global_out_of_bounds.
void register_allocation(const void* base, size_t size);
void unregister_allocation(const void* base);

// Tensor maps: cuTensorMapEncodeTiled's arguments, as the runtime packs them into the opaque
// 128-byte CUtensorMap; the core reads the same struct back in cp.async.bulk.tensor.
struct TensorMap {
  uint64_t magic = 0x43554441534d5450ull;
  uint64_t global_address = 0;
  uint32_t global_dim[5] = {};
  uint64_t global_stride_bytes[4] = {};  // of dims 1..4; dim 0 is dense
  uint16_t box_dim[5] = {}, element_stride[5] = {};
  uint8_t rank = 0, dtype = 0, element_bytes = 0, interleave = 0, swizzle = 0, l2_promotion = 0, oob_fill = 0;
};

}  // namespace cudasim
