// Kernels of the test extension: each shows one thing that the simulation must run or catch.
#include <cooperative_groups.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <cstdio>

#include "ops.h"

namespace {

__global__ void add_kernel(const float* a, const float* b, float* out, int n, bool checked) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (checked && i >= n) return;  // without this the last block writes past the end
  out[i] = a[i] + b[i];
}

__global__ void sum_kernel(const float* in, float* out, int n, bool synchronized) {
  __shared__ float partial[256];
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += in[i];
  partial[threadIdx.x] = sum;
  for (int step = blockDim.x / 2; step > 0; step /= 2) {
    if (synchronized) __syncthreads();
    if (threadIdx.x < step) partial[threadIdx.x] += partial[threadIdx.x + step];
  }
  __syncthreads();
  if (threadIdx.x == 0) *out = partial[0];
}

// Reads one element of shared memory that nobody wrote.
__global__ void uninitialized_kernel(float* out) {
  __shared__ float values[64];
  if (threadIdx.x < 32) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + 1];
}

__global__ void silu_kernel(const __nv_bfloat16* in, __nv_bfloat16* out, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const float x = __bfloat162float(in[i]);
    out[i] = __float2bfloat16(x / (1 + __expf(-x)));
  }
}

// One warp: d (16 x 8) = a (16 x 16, by rows) * b (16 x 8, by columns).
__global__ void mma_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  const int group = threadIdx.x / 4, lane = threadIdx.x % 4;
  const auto pair = [](const __nv_bfloat16* p) { return *reinterpret_cast<const uint32_t*>(p); };
  uint32_t fa[4], fb[2];
  fa[0] = pair(a + group * 16 + lane * 2);
  fa[1] = pair(a + (group + 8) * 16 + lane * 2);
  fa[2] = pair(a + group * 16 + lane * 2 + 8);
  fa[3] = pair(a + (group + 8) * 16 + lane * 2 + 8);
  fb[0] = pair(b + group * 16 + lane * 2);
  fb[1] = pair(b + group * 16 + lane * 2 + 8);
  float fd[4] = {};
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(fd[0]), "+f"(fd[1]), "+f"(fd[2]), "+f"(fd[3])
      : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  d[group * 8 + lane * 2] = fd[0];
  d[group * 8 + lane * 2 + 1] = fd[1];
  d[(group + 8) * 8 + lane * 2] = fd[2];
  d[(group + 8) * 8 + lane * 2 + 1] = fd[3];
}

// Reverses a row that has to fit in dynamic shared memory.
__global__ void reverse_kernel(const float* in, float* out, int n) {
  extern __shared__ float row[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) row[i] = in[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = row[n - 1 - i];
}

__device__ int launches = 0;
__constant__ float factors[4];

__global__ void count_kernel(float* out) {
  if (threadIdx.x == 0) atomicAdd(&launches, 1);
  out[threadIdx.x] = factors[threadIdx.x % 4];
}

__global__ void __launch_bounds__(128) bounded_kernel(float* out) { out[threadIdx.x] = threadIdx.x; }

__global__ void assert_kernel(const float* in) {
  printf("thread %d has %g\n", threadIdx.x, in[threadIdx.x]);
  assert(in[threadIdx.x] < 3);
}

// Every block writes the same places, and with step 0 the same values.
__global__ void overlap_kernel(float* out, float step) { out[threadIdx.x] = 1 + blockIdx.x * step; }

// Waits for a flag that nobody sets.
__global__ void spin_kernel(const float* flag) {
  while (*reinterpret_cast<const volatile float*>(flag) == 0) {
  }
}

// Each block of a cluster adds its rank + 1 to the first block's shared memory.
__global__ void cluster_kernel(float* out) {
#if __CUDA_ARCH__ >= 900
  __shared__ int total;
  const auto cluster = cooperative_groups::this_cluster();
  total = 0;
  cluster.sync();
  if (threadIdx.x == 0) atomicAdd(cluster.map_shared_rank(&total, 0), static_cast<int>(cluster.block_rank()) + 1);
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x == 0) out[blockIdx.x / cluster.num_blocks()] = total;
#endif
}

// Starts before the launch before it has ended.
__global__ void dependent_kernel(const float* in, float* out, int n, bool waits) {
#if __CUDA_ARCH__ >= 900
  if (waits) asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = in[i];
#endif
}

__global__ void grid_kernel(int* arrived, float* out) {
  const auto grid = cooperative_groups::this_grid();
  if (threadIdx.x == 0) atomicAdd(arrived, 1);
  grid.sync();
  if (threadIdx.x == 0) out[blockIdx.x] = *arrived;
}

// Copies an 8 x 16 tile, whose corner is at (x, y), through a tensor map.
__global__ void tile_kernel(const __grid_constant__ CUtensorMap map, int x, int y, float* out) {
#if __CUDA_ARCH__ >= 900
  __shared__ alignas(128) float tile[8 * 16];
  __shared__ alignas(8) uint64_t barrier;
  const auto address = [](const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); };
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&barrier)) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&barrier)),
                 "r"(uint32_t{sizeof tile})
                 : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(address(tile)),
        "l"(&map), "r"(x), "r"(y), "r"(address(&barrier))
        : "memory");
  }
  __syncthreads();
  uint32_t done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(address(&barrier))
                 : "memory");
  for (int i = threadIdx.x; i < 8 * 16; i += blockDim.x) out[i] = tile[i];
#endif
}

}  // namespace

void add(const float* a, const float* b, float* out, int n, bool checked, cudaStream_t stream) {
  add_kernel<<<(n + 127) / 128, 128, 0, stream>>>(a, b, out, n, checked);
}
void sum(const float* in, float* out, int n, bool synchronized, cudaStream_t stream) {
  sum_kernel<<<1, 256, 0, stream>>>(in, out, n, synchronized);
}
void uninitialized(float* out, cudaStream_t stream) { uninitialized_kernel<<<1, 32, 0, stream>>>(out); }
void silu(const void* in, void* out, int n, cudaStream_t stream) {
  silu_kernel<<<2, 64, 0, stream>>>(static_cast<const __nv_bfloat16*>(in), static_cast<__nv_bfloat16*>(out), n);
}
void mma(const void* a, const void* b, float* d, cudaStream_t stream) {
  mma_kernel<<<1, 32, 0, stream>>>(static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), d);
}
cudaError_t reverse(const float* in, float* out, int n, bool opt_in, cudaStream_t stream) {
  const int bytes = n * static_cast<int>(sizeof(float));
  if (const cudaError_t error =
          cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, opt_in ? bytes : 48 * 1024))
    return error;
  reverse_kernel<<<1, 256, bytes, stream>>>(in, out, n);
  return cudaSuccess;
}
int count(float* out, float factor, cudaStream_t stream) {
  const float values[4] = {factor, 2 * factor, 3 * factor, 4 * factor};
  cudaMemcpyToSymbol(factors, values, sizeof values);
  count_kernel<<<1, 32, 0, stream>>>(out);
  int result = -1;
  cudaMemcpyFromSymbol(&result, launches, sizeof result);
  return result;
}
void bounded(float* out, int threads, cudaStream_t stream) { bounded_kernel<<<1, threads, 0, stream>>>(out); }
int occupancy(int threads, int shared) {
  int blocks = -1;
  cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reverse_kernel, threads, shared);
  return blocks;
}
void check_below_three(const float* in, int n, cudaStream_t stream) { assert_kernel<<<1, n, 0, stream>>>(in); }
void overlap(float* out, float step, cudaStream_t stream) { overlap_kernel<<<4, 64, 0, stream>>>(out, step); }
void spin(const float* flag, cudaStream_t stream) { spin_kernel<<<1, 32, 0, stream>>>(flag); }
cudaError_t cluster(float* out, int size, int clusters, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = size * clusters;
  config.blockDim = 32;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, cluster_kernel, out);
}
int active_clusters(int size) {
  constexpr int kShared = 200 * 1024;  // one block per SM
  cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  cudaLaunchConfig_t config{};
  config.gridDim = size;
  config.blockDim = 256;
  config.dynamicSmemBytes = kShared;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = -1;
  cudaOccupancyMaxActiveClusters(&clusters, reverse_kernel, &config);
  return clusters;
}
cudaError_t dependent(const float* in, float* out, int n, bool waits, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = 64;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, dependent_kernel, in, out, n, waits);
}
cudaError_t grid(int* arrived, float* out, int blocks, cudaStream_t stream) {
  void* args[] = {&arrived, &out};
  return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_kernel), blocks, 64, args, 0, stream);
}
int tile(const float* in, int rows, int columns, int x, int y, float* out, cudaStream_t stream) {
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
  if (found != cudaDriverEntryPointSuccess) return -1;
  CUtensorMap map;
  const cuuint64_t dims[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                   strides[1] = {columns * sizeof(float)};
  const cuuint32_t box[2] = {16, 8}, steps[2] = {1, 1};
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, const_cast<float*>(in), dims, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) return status;
  tile_kernel<<<1, 32, 0, stream>>>(map, x, y, out);
  return 0;
}
