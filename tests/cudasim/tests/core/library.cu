// Code from the CUDA toolkit's own libraries: CUB, cooperative groups, cuda::barrier / pipeline.
#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cooperative_groups/reduce.h>
#include <cuda_fp8.h>
#include <cub/cub.cuh>
#include <cuda/barrier>
#include <cuda/pipeline>

namespace cg = cooperative_groups;

extern "C" __global__ void cub_reduce(const float* a, float* out, int n) {
  using BR = cub::BlockReduce<float, 256>;
  __shared__ typename BR::TempStorage tmp;
  int i = blockIdx.x * 256 + threadIdx.x;
  float v = i < n ? a[i] : 0.f;
  float s = BR(tmp).Sum(v);
  __syncthreads();
  float m = BR(tmp).Reduce(v, [](float x, float y) { return x > y ? x : y; });
  if (threadIdx.x == 0) {
    out[2 * blockIdx.x] = s;
    out[2 * blockIdx.x + 1] = m;
  }
}
extern "C" __global__ void cub_scan_sort(int* a, int* scan, int* sorted) {
  using BS = cub::BlockScan<int, 128>;
  using SORT = cub::BlockRadixSort<int, 128, 4>;
  using BL = cub::BlockLoad<int, 128, 4, cub::BLOCK_LOAD_WARP_TRANSPOSE>;
  using ST = cub::BlockStore<int, 128, 4, cub::BLOCK_STORE_TRANSPOSE>;
  __shared__ union {
    typename BS::TempStorage s;
    typename SORT::TempStorage r;
    typename BL::TempStorage l;
    typename ST::TempStorage o;
  } tmp;
  int v[4], w[4];
  BL(tmp.l).Load(a, v);
  __syncthreads();
  BS(tmp.s).InclusiveSum(v, w);
  __syncthreads();
  ST(tmp.o).Store(scan, w);
  __syncthreads();
  SORT(tmp.r).Sort(v);
  __syncthreads();
  ST(tmp.o).Store(sorted, v);
}
extern "C" __global__ void groups(const int* a, int* out) {
  auto block = cg::this_thread_block();
  auto tile = cg::tiled_partition<8>(block);
  int v = a[block.thread_rank()];
  int s = cg::reduce(tile, v, cg::plus<int>());
  int bits = 0;
  if (v & 1) {
    auto c = cg::coalesced_threads();
    bits = c.size() * 100 + c.thread_rank();
    if (v & 2) bits += cg::reduce(cg::coalesced_threads(), 1, cg::plus<int>()) * 10000;
  }
  auto lab = cg::labeled_partition(cg::tiled_partition<32>(block), v % 3);
  int l = cg::reduce(lab, v, cg::plus<int>());
  out[block.thread_rank() * 3] = s;
  out[block.thread_rank() * 3 + 1] = bits;
  out[block.thread_rank() * 3 + 2] = l;
}
extern "C" __global__ void grid_sync(int* a, int n) {
  auto g = cg::this_grid();
  for (int k = 0; k < n; ++k) {
    if (threadIdx.x == 0) atomicAdd(&a[(blockIdx.x + k) % gridDim.x], 1);
    g.sync();
    if (threadIdx.x == 0 && a[blockIdx.x] != k + 1) a[gridDim.x] = 1;
    g.sync();
  }
}
extern "C" __global__ void async_pipeline(const int* a, int* out, int tiles) {
  __shared__ int buf[2][128];
  auto block = cg::this_thread_block();
  __shared__ cuda::pipeline_shared_state<cuda::thread_scope_block, 2> st;
  auto pipe = cuda::make_pipeline(block, &st);
  int s = 0;
  for (int f = 0, c = 0; c < tiles; ++c) {
    for (; f < tiles && f < c + 2; ++f) {
      pipe.producer_acquire();
      cuda::memcpy_async(block, buf[f % 2], a + f * 128, sizeof(int) * 128, pipe);
      pipe.producer_commit();
    }
    pipe.consumer_wait();
    s += buf[c % 2][127 - threadIdx.x];
    pipe.consumer_release();
  }
  out[threadIdx.x] = s;
}
extern "C" __global__ void block_barrier(int* out) {
  __shared__ cuda::barrier<cuda::thread_scope_block> bar;
  __shared__ int s[64];
  if (threadIdx.x == 0) init(&bar, blockDim.x);
  __syncthreads();
  for (int k = 0; k < 3; ++k) {
    s[threadIdx.x] = threadIdx.x + k;
    auto tok = bar.arrive();
    bar.wait(std::move(tok));
    out[threadIdx.x] = s[63 - threadIdx.x];
    bar.arrive_and_wait();
  }
}
extern "C" __global__ void fp8(const float* a, unsigned char* o, float* back, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  __nv_fp8_e4m3 x(a[i]);
  __nv_fp8_e5m2 y(a[i]);
  o[2 * i] = x.__x;
  o[2 * i + 1] = y.__x;
  back[2 * i] = float(x);
  back[2 * i + 1] = float(y);
}
