// Measures rates of the hardware on which the kernels' plans depend, and prints one JSON object per line:
//
//   cuda_micro clusters   how many clusters of 1 to 8 CTAs run at once, one CTA per SM as in the kernels for Hopper
//   cuda_micro all        the same, and passes of constant and shared loads, and bytes per cycle that TMA brings to an
//   SM cuda_micro tiny       all, with so little work that the numbers mean nothing: for the kernel simulator
//
// bench/cuda_micro.py compiles and runs it.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "cuda/ptx/address.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace {

using qlora::ptx::shared_address;

constexpr int kThreads = 256, kUnroll = 16;
constexpr int kChunk = 16 << 10, kStages = 6;  // bytes per copy by TMA, and copies in flight per SM
constexpr int kClusterThreads = 384;           // as in the kernels for Hopper

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

void print(const char* what, double value, const char* unit) {
  std::printf("{\"what\": \"%s\", \"value\": %.4g, \"unit\": \"%s\"}\n", what, value, unit);
}

__constant__ int g_constant[256];  // as large as the table of 8-bit scales

// Each warp loads from kLanes addresses of constant memory at a time.
template <int kLanes>
__global__ void __launch_bounds__(kThreads) constant_loads(int turns, int64_t* cycles, int* sink) {
  const int lane = threadIdx.x % kLanes;
  int sum = 0;
  __syncthreads();
  const int64_t start = clock64();
  for (int turn = 0; turn < turns; ++turn) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) sum += g_constant[(turn + i * 37 + lane) & 255];
  }
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// Each warp loads 16 bytes per lane from shared memory, where kEqual neighbouring lanes share an address.
template <int kEqual>
__global__ void __launch_bounds__(kThreads) shared_loads(int turns, int64_t* cycles, int* sink) {
  __shared__ uint4 table[1024];
  for (int i = threadIdx.x; i < 1024; i += kThreads) table[i] = make_uint4(i, i, i, i);
  const int place = threadIdx.x % 32 / kEqual;
  uint4 sum = make_uint4(0, 0, 0, 0);
  __syncthreads();
  const int64_t start = clock64();
  for (int turn = 0; turn < turns; ++turn) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const uint4 v = table[((turn + i) * 32 + place) & 1023];
      sum.x ^= v.x, sum.y ^= v.y, sum.z ^= v.z, sum.w ^= v.w;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
  sink[blockIdx.x * kThreads + threadIdx.x] = sum.x ^ sum.y ^ sum.z ^ sum.w;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Arrives at the barrier at the same place in the cluster's CTA `rank`.
__device__ void arrive_at(uint32_t barrier, int rank) {
  asm volatile(
      "{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n\t}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Copies to this CTA, or to the same place in each CTA of the cluster that `mask` names.
template <bool kMulticast>
__device__ void copy(uint32_t shared, const char* from, int bytes, uint32_t barrier, uint16_t mask) {
  if constexpr (kMulticast) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared),
        "l"(from), "r"(bytes), "r"(barrier), "h"(mask)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
  }
}

#endif

// One thread per CTA copies `chunks` chunks from a buffer that fits L2 through a ring in shared memory. With kCtas = 2,
// each CTA of a pair copies half of every chunk to both, so the same bytes arrive and half of them leave L2.
template <int kCtas>
__global__ void __launch_bounds__(32) bulk_copies(const char* source, int64_t bytes, int chunks) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char ring[];
  __shared__ uint64_t full[kStages], empty[kStages];
  const uint32_t base = shared_address(ring), is_full = shared_address(full), is_empty = shared_address(empty);
  const int rank = blockIdx.x % kCtas, pair = blockIdx.x / kCtas;
  constexpr int kPart = kChunk / kCtas;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      qlora::ptx::mbarrier_init(is_full + 8 * s, 1);
      qlora::ptx::mbarrier_init(is_empty + 8 * s, kCtas);
    }
    qlora::ptx::mbarrier_init_fence();
  }
  __syncwarp();
  qlora::ptx::cluster_sync();
  if (threadIdx.x == 0) {
    for (int i = 0; i < chunks + kStages; ++i) {
      const int s = i % kStages, round = i / kStages;
      if (i >= kStages) {
        qlora::ptx::mbarrier_wait<0>(is_full + 8 * s, (round - 1) & 1);
        for (int peer = 0; kCtas > 1 && peer < kCtas; ++peer) arrive_at(is_empty + 8 * s, peer);
      }
      if (i >= chunks) continue;
      if (kCtas > 1 && i >= kStages) qlora::ptx::mbarrier_wait<0>(is_empty + 8 * s, (round - 1) & 1);
      qlora::ptx::mbarrier_arrive_expect(is_full + 8 * s, kChunk);
      const int64_t from = (static_cast<int64_t>(pair) * 37 + i) * kChunk % bytes + rank * kPart;
      copy<(kCtas > 1)>(base + s * kChunk + rank * kPart, source + from, kPart, is_full + 8 * s, (1 << kCtas) - 1);
    }
  }
  __syncwarp();
  qlora::ptx::cluster_sync();  // a peer's copies and arrivals reach this CTA's shared memory
#endif
}

__global__ void __launch_bounds__(kClusterThreads) one_per_sm() {}

cudaLaunchConfig_t launch(int grid, int threads, int shared, int cluster, cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = cluster, attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  config.attrs = attribute, config.numAttrs = 1;
  return config;
}

void active_clusters(const cudaDeviceProp& device) {
  const int shared = static_cast<int>(device.sharedMemPerBlockOptin);
  check(cudaFuncSetAttribute(one_per_sm, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
  for (int size = 1; size <= 8; ++size) {
    cudaLaunchAttribute attribute;
    const int grid = device.multiProcessorCount / size * size;
    const cudaLaunchConfig_t config = launch(grid, kClusterThreads, shared, size, &attribute);
    int clusters = 0;
    char what[64];
    std::snprintf(what, sizeof what, "active clusters of %d", size);
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, one_per_sm, &config);
    if (error != cudaSuccess) cudaGetLastError();
    print(what, error == cudaSuccess ? clusters : 0, error == cudaSuccess ? "clusters" : cudaGetErrorName(error));
  }
}

// Cycles of an SM per load of a warp, with all of its schedulers loading.
template <class Kernel>
double cycles_per_load(Kernel kernel, int turns) {
  int64_t* cycles;
  int* sink;
  check(cudaMallocManaged(&cycles, sizeof *cycles), "memory");
  check(cudaMalloc(&sink, kThreads * sizeof *sink), "memory");
  for (int run = 0; run < 2; ++run) kernel<<<1, kThreads>>>(turns, cycles, sink);
  check(cudaDeviceSynchronize(), "loads");
  return static_cast<double>(*cycles) / (static_cast<double>(turns) * kUnroll * (kThreads / 32));
}

template <int kCtas>
void measure_copies(const cudaDeviceProp& device, bool tiny) {
  const int ctas = tiny ? kCtas : device.multiProcessorCount / kCtas * kCtas;
  const int64_t bytes = tiny ? 64 << 10 : 16 << 20;
  const int chunks = tiny ? kStages + 2 : 4096;
  char* source;
  check(cudaMalloc(&source, bytes), "memory");
  check(cudaMemset(source, 1, bytes), "memory");
  const auto kernel = bulk_copies<kCtas>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStages * kChunk), "shared memory");
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = launch(ctas, 32, kStages * kChunk, kCtas, &attribute);
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&end), "event");
  float best = 1e30F;
  for (int run = 0; run < (tiny ? 1 : 5); ++run) {
    check(cudaEventRecord(start), "event");
    check(cudaLaunchKernelEx(&config, kernel, static_cast<const char*>(source), bytes, chunks), "launch");
    check(cudaEventRecord(end), "event");
    check(cudaEventSynchronize(end), "copies");
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, start, end), "event");
    best = std::min(best, milliseconds);
  }
  const double arrived = static_cast<double>(ctas) * chunks * kChunk / (best * 1e-3);
  print(
      kCtas > 1 ? "TMA from L2, multicast to pairs: bytes that arrive in SMs" : "TMA from L2: bytes that arrive in SMs",
      arrived / 1e12, "TB/s");
  print(kCtas > 1 ? "TMA from L2, multicast to pairs: bytes that leave L2" : "TMA from L2: bytes that leave L2",
        arrived / kCtas / 1e12, "TB/s");
  check(cudaFree(source), "memory");
}

}  // namespace

int main(int count, char** arguments) {
  const char mode = count > 1 ? arguments[1][0] : 'a';
  const bool tiny = mode == 't';
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  if (device.major >= 9) active_clusters(device);
  if (mode == 'c') return 0;
  const int turns = tiny ? 1 : 4096;
  print("LDC, 1 address per warp", cycles_per_load(constant_loads<1>, turns), "cycles");
  print("LDC, 32 addresses per warp", cycles_per_load(constant_loads<32>, turns), "cycles");
  print("LDS.128, 32 addresses per warp", cycles_per_load(shared_loads<1>, turns), "cycles");
  print("LDS.128, 4 equal lanes", cycles_per_load(shared_loads<4>, turns), "cycles");
  print("LDS.128, 1 address per warp", cycles_per_load(shared_loads<32>, turns), "cycles");
  if (device.major >= 9) {
    measure_copies<1>(device, tiny);
    measure_copies<2>(device, tiny);
  }
  return 0;
}
