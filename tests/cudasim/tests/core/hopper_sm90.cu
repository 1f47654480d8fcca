// Hopper: TMA, mbarrier, wgmma, clusters.
#include <cuda.h>
#include <cstdint>

#include "mbarrier.cuh"

__device__ __forceinline__ void tma_load(void* dst, const CUtensorMap* m, uint64_t* bar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(smem(dst)),
      "l"(m), "r"(smem(bar)), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void wg_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wg_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wg_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ uint64_t desc(uint32_t addr, int lbo, int sbo, int type) {
  return (uint64_t)((addr & 0x3ffff) >> 4) | (uint64_t)(lbo >> 4) << 16 | (uint64_t)(sbo >> 4) << 32 |
         (uint64_t)type << 62;
}
#define ACC32                                                                                                 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define D32                                                                                                          \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%" \
  "30,%31}"
template <bool BF, int TRANS_B>
__device__ __forceinline__ void wgmma64(float (&d)[32], uint64_t a, uint64_t b, int scale) {
  if (BF)
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " D32
                 ", %32, %33, p, 1, 1, 0, %35;}"
                 : ACC32
                 : "l"(a), "l"(b), "r"(scale), "n"(TRANS_B));
  else
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " D32
                 ", %32, %33, p, 1, 1, 0, %35;}"
                 : ACC32
                 : "l"(a), "l"(b), "r"(scale), "n"(TRANS_B));
}
__device__ __forceinline__ void wgmma64_ra(float (&d)[32], const unsigned (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " D32 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
               : ACC32
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void store_tile(const float (&d)[32], float* C, int m0, int n0, int M, int N) {
  int t = threadIdx.x % 128, w = t / 32, l = t % 32;
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i) {
      int m = m0 + 16 * w + l / 4 + 8 * (i / 2), n = n0 + 8 * j + 2 * (l % 4) + i % 2;
      if (m < M && n < N) C[(size_t)m * N + n] = d[4 * j + i];
    }
}

constexpr int ST = 4;
// All threads of one warpgroup; thread 0 also issues the copies. MODE: 0 f16, 1 bf16, 2 B is K x N,
// 3 A from registers. BUG 1: accumulators stored without waiting; 2: full barrier not awaited.
template <int MODE, int BUG>
__device__ void gemm_simple(const CUtensorMap& ma, const CUtensorMap& mb, float* C, int M, int N, int K) {
  extern __shared__ __align__(1024) unsigned char raw[];
  __shared__ uint64_t full[ST];
  unsigned char* base = (unsigned char*)(((uintptr_t)raw + 1023) / 1024 * 1024);
  unsigned char *sA = base, *sB = base + ST * 8192;
  int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64, T = (K + 63) / 64;
  if (threadIdx.x == 0) {
    for (int i = 0; i < ST; ++i) mbar_init(&full[i], 1);
    asm volatile("fence.mbarrier_init.release.cluster;");
    asm volatile("fence.proxy.async.shared::cta;");
  }
  __syncthreads();
  auto issue = [&](int t) {
    int s = t % ST;
    mbar_expect(&full[s], 2 * 8192);
    tma_load(sA + s * 8192, &ma, &full[s], t * 64, m0);
    if (MODE == 2)
      tma_load(sB + s * 8192, &mb, &full[s], n0, t * 64);
    else
      tma_load(sB + s * 8192, &mb, &full[s], t * 64, n0);
  };
  if (threadIdx.x == 0)
    for (int t = 0; t < ST - 1 && t < T; ++t) issue(t);
  float d[32];
  for (int i = 0; i < 32; ++i) d[i] = 0;
  for (int t = 0; t < T; ++t) {
    int s = t % ST;
    if (BUG != 2) mbar_wait(&full[s], t / ST & 1);
    uint32_t a = smem(sA + s * 8192), b = smem(sB + s * 8192);
    wg_fence();
    for (int k = 0; k < 4; ++k) {
      uint64_t db = MODE == 2 ? desc(b + k * 16 * 128, 8192, 1024, 1) : desc(b + k * 32, 16, 1024, 1);
      if (MODE == 3) {
        int w = threadIdx.x / 32, l = threadIdx.x % 32;
        unsigned r[4];
        for (int i = 0; i < 4; ++i) {
          int row = 16 * w + l / 4 + 8 * (i & 1), col = k * 16 + 2 * (l % 4) + 8 * (i / 2);
          int off = row * 128 + col * 2;
          off ^= (off >> 7 & 7) << 4;
          r[i] = *(unsigned*)(sA + s * 8192 + off);
        }
        wg_fence();
        wgmma64_ra(d, r, db);
        wg_commit();
        wg_wait<0>();
      } else {
        wgmma64<MODE == 1, MODE == 2>(d, desc(a + k * 32, 16, 1024, 1), db, t + k > 0);
      }
    }
    wg_commit();
    wg_wait<1>();
    // the stage read two iterations ago is free once everybody has passed this point
    __syncthreads();
    if (threadIdx.x == 0 && t + ST - 1 < T && t > 0) issue(t + ST - 1);
    if (threadIdx.x == 0 && t == 0 && ST - 1 < T) issue(ST - 1);
  }
  if (BUG != 1) wg_wait<0>();
  store_tile(d, C, m0, n0, M, N);
}
extern "C" __global__ void __launch_bounds__(128)
    tma_gemm_f16(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, float* C, int M, int N,
                 int K) {
  gemm_simple<0, 0>(ma, mb, C, M, N, K);
}
extern "C" __global__ void __launch_bounds__(128)
    tma_gemm_bf16(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, float* C, int M,
                  int N, int K) {
  gemm_simple<1, 0>(ma, mb, C, M, N, K);
}
extern "C" __global__ void __launch_bounds__(128)
    tma_gemm_mn(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, float* C, int M, int N,
                int K) {
  gemm_simple<2, 0>(ma, mb, C, M, N, K);
}
extern "C" __global__ void __launch_bounds__(128)
    tma_gemm_ra(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, float* C, int M, int N,
                int K) {
  gemm_simple<3, 0>(ma, mb, C, M, N, K);
}
extern "C" __global__ void __launch_bounds__(128)
    tma_gemm_no_mma_wait(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, float* C,
                         int M, int N, int K) {
  gemm_simple<0, 1>(ma, mb, C, M, N, K);
}
extern "C" __global__ void __launch_bounds__(128)
    tma_gemm_no_full_wait(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, float* C,
                          int M, int N, int K) {
  gemm_simple<0, 2>(ma, mb, C, M, N, K);
}

// Warp-specialised: a producer warp and a consumer warpgroup. BUG 1: stages released before the
// wgmma that reads them has finished.
template <int BUG>
__device__ void gemm_ws(const CUtensorMap& ma, const CUtensorMap& mb, float* C, int M, int N, int K) {
  extern __shared__ __align__(1024) unsigned char raw[];
  __shared__ uint64_t full[ST], empty[ST];
  unsigned char* base = (unsigned char*)(((uintptr_t)raw + 1023) / 1024 * 1024);
  unsigned char *sA = base, *sB = base + ST * 8192;
  int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64, T = (K + 63) / 64;
  if (threadIdx.x == 0) {
    for (int i = 0; i < ST; ++i) {
      mbar_init(&full[i], 1);
      mbar_init(&empty[i], 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0)
      for (int t = 0; t < T; ++t) {
        int s = t % ST;
        mbar_wait(&empty[s], (t / ST & 1) ^ 1);
        mbar_expect(&full[s], 2 * 8192);
        tma_load(sA + s * 8192, &ma, &full[s], t * 64, m0);
        tma_load(sB + s * 8192, &mb, &full[s], t * 64, n0);
      }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    float d[32];
    for (int i = 0; i < 32; ++i) d[i] = 0;
    for (int t = 0; t < T; ++t) {
      int s = t % ST;
      mbar_wait(&full[s], t / ST & 1);
      uint32_t a = smem(sA + s * 8192), b = smem(sB + s * 8192);
      wg_fence();
      for (int k = 0; k < 4; ++k)
        wgmma64<false, 0>(d, desc(a + k * 32, 16, 1024, 1), desc(b + k * 32, 16, 1024, 1), t + k > 0);
      wg_commit();
      if (BUG == 1) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbar_arrive(&empty[s]);
        wg_wait<ST + 3>();
      } else {
        wg_wait<1>();
        __syncwarp();
        if (t && threadIdx.x % 32 == 0) mbar_arrive(&empty[(t - 1) % ST]);
      }
    }
    wg_wait<0>();
    store_tile(d, C, m0, n0, M, N);
  }
}
extern "C" __global__ void __launch_bounds__(256)
    tma_gemm_ws(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, float* C, int M, int N,
                int K) {
  gemm_ws<0>(ma, mb, C, M, N, K);
}
extern "C" __global__ void __launch_bounds__(256)
    tma_gemm_early_release(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, float* C,
                           int M, int N, int K) {
  gemm_ws<1>(ma, mb, C, M, N, K);
}

extern "C" __global__ void swizzles(const __grid_constant__ CUtensorMap mi, const __grid_constant__ CUtensorMap mo,
                                    unsigned short* out, int mode, int cols, int c0, int c1) {
  extern __shared__ __align__(1024) unsigned char raw[];
  __shared__ uint64_t bar;
  unsigned char* s = (unsigned char*)(((uintptr_t)raw + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) mbar_init(&bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbar_expect(&bar, 32 * cols * 2);
    tma_load(s, &mi, &bar, c0, c1);
  }
  mbar_wait(&bar, 0);
  for (int i = threadIdx.x; i < 32 * cols; i += blockDim.x) {
    int off = i * 2;
    off ^= (off >> 7 & ((1 << mode) - 1)) << 4;
    out[i] = *(unsigned short*)(s + off);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("fence.proxy.async.shared::cta;");
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&mo), "r"(smem(s)),
                 "r"(c0), "r"(c1)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
extern "C" __global__ void bulk_copy(const float* in, float* out) {
  __shared__ __align__(128) float s[1024];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    mbar_init(&bar, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbar_expect(&bar, 4096);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem(s)),
        "l"(in), "r"(4096), "r"(smem(&bar))
        : "memory");
  }
  mbar_wait(&bar, 0);
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) s[i] *= 2;
  asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(out), "r"(smem(s)),
                 "r"(2048)
                 : "memory");
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out + 512), "r"(smem(s + 512)),
                 "r"(2048)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}
extern "C" __global__ void cluster_ring(int* out) {  // clusters of 4: read the next block's shared memory
  __shared__ int s[64];
  unsigned rank, n;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  s[threadIdx.x] = blockIdx.x * 1000 + threadIdx.x;
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  unsigned remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem(&s[threadIdx.x])), "r"((rank + 1) % n));
  int v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(remote));
  out[blockIdx.x * 64 + threadIdx.x] = v;
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
extern "C" __global__ void multicast(const float* in, float* out) {  // clusters of 2
  __shared__ __align__(128) float s[256];
  __shared__ uint64_t bar;
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    mbar_init(&bar, 1);
    mbar_expect(&bar, 1024);
  }
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x == 0)  // each block loads half and sends it to both
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(smem(s + rank * 128)),
        "l"(in + rank * 128), "r"(512), "r"(smem(&bar)), "h"((unsigned short)3)
        : "memory");
  mbar_wait(&bar, 0);
  for (int i = threadIdx.x; i < 256; i += blockDim.x) out[blockIdx.x * 256 + i] = s[i];
}
// granules of 16 bytes, no swizzle: ((8 rows) x 16B) blocks; the two k-granules lie LBO apart
template <bool FENCE>
__device__ void tf32_body(const float* A, const float* B, float* C) {
  __shared__ __align__(1024) float sA[64 * 8], sB[16 * 8];
  int t = threadIdx.x;
  for (int i = t; i < 64 * 8; i += 128) {
    int r = i / 8, k = i % 8;
    sA[(k / 4) * 256 + r * 4 + k % 4] = A[i];
  }
  for (int i = t; i < 16 * 8; i += 128) {
    int r = i / 8, k = i % 8;
    sB[(k / 4) * 64 + r * 4 + k % 4] = B[i];
  }
  if (FENCE) asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  float d[8];
  for (int i = 0; i < 8; ++i) d[i] = 0;
  wg_fence();
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1, 1, 1;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
               : "l"(desc(smem(sA), 1024, 128, 0)), "l"(desc(smem(sB), 256, 128, 0)));
  wg_commit();
  wg_wait<0>();
  int w = t / 32, l = t % 32;
  for (int j = 0; j < 2; ++j)
    for (int i = 0; i < 4; ++i) C[(16 * w + l / 4 + 8 * (i / 2)) * 16 + 8 * j + 2 * (l % 4) + i % 2] = d[4 * j + i];
}
extern "C" __global__ void wgmma_tf32(const float* A, const float* B, float* C) { tf32_body<true>(A, B, C); }
extern "C" __global__ void wgmma_no_proxy_fence(const float* A, const float* B, float* C) { tf32_body<false>(A, B, C); }
extern "C" __global__ void wgmma_s8(const signed char* A, const signed char* B,
                                    int* C) {  // rows of 32 bytes, 32B swizzle
  __shared__ __align__(1024) signed char sA[64 * 32], sB[16 * 32];
  int t = threadIdx.x;
  auto sw = [](int off) { return off ^ ((off >> 7 & 1) << 4); };
  for (int i = t; i < 64 * 32; i += 128) sA[sw(i)] = A[i];
  for (int i = t; i < 16 * 32; i += 128) sB[sw(i)] = B[i];
  asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  int d[8];
  for (int i = 0; i < 8; ++i) d[i] = 0;
  wg_fence();
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1;"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7])
               : "l"(desc(smem(sA), 16, 256, 3)), "l"(desc(smem(sB), 16, 256, 3)));
  wg_commit();
  wg_wait<0>();
  int w = t / 32, l = t % 32;
  for (int j = 0; j < 2; ++j)
    for (int i = 0; i < 4; ++i) C[(16 * w + l / 4 + 8 * (i / 2)) * 16 + 8 * j + 2 * (l % 4) + i % 2] = d[4 * j + i];
}
extern "C" __global__ void mbar_deadlock() {
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) mbar_init(&bar, 65);
  __syncthreads();
  mbar_arrive(&bar);
  mbar_wait(&bar, 0);
}
extern "C" __global__ void cp_async_mbar(const int* in, int* out) {
  __shared__ int s[64];
  __shared__ uint64_t bar;
  int t = threadIdx.x;
  if (t == 0) mbar_init(&bar, 64);
  __syncthreads();
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem(&s[t])), "l"(in + t));
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem(&bar)) : "memory");
  mbar_wait(&bar, 0);
  out[t] = s[63 - t];
}
