// Blackwell: tensor memory and tcgen05. `bug` plants a mistake.
#include <cuda.h>

#include <cstdint>

#include "blackwell_sm100.h"
#include "mbarrier.cuh"

__device__ __forceinline__ void allocate(uint32_t* to, int columns) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(smem(to)), "r"(columns)
               : "memory");
}
__device__ __forceinline__ void relinquish() {
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void deallocate(uint32_t t, int columns) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(t), "r"(columns) : "memory");
}
__device__ __forceinline__ void fence_before() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
__device__ __forceinline__ void fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }
__device__ __forceinline__ void wait_ld() { asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_st() { asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory"); }
#define EIGHT(c, r) c(r[0]), c(r[1]), c(r[2]), c(r[3]), c(r[4]), c(r[5]), c(r[6]), c(r[7])
#define LIST8 "{%0,%1,%2,%3,%4,%5,%6,%7}"
__device__ __forceinline__ void load8(uint32_t (&r)[8], uint32_t t) {
  asm volatile("tcgen05.ld.sync.aligned.32x32b.x8.b32 " LIST8 ", [%8];" : EIGHT("=r", r) : "r"(t) : "memory");
}
__device__ __forceinline__ void store8(const uint32_t (&r)[8], uint32_t t) {
  asm volatile("tcgen05.st.sync.aligned.32x32b.x8.b32 [%8], " LIST8 ";" ::EIGHT("r", r), "r"(t) : "memory");
}
__device__ __forceinline__ void mma(uint32_t d, uint64_t a, uint64_t b, uint32_t idesc, int accumulate) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %4, 0; tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, p;}" ::"r"(d),
               "l"(a), "l"(b), "r"(idesc), "r"(accumulate)
               : "memory");
}
__device__ __forceinline__ void mma_from_tmem(uint32_t d, uint32_t a, uint64_t b, uint32_t idesc, int accumulate,
                                              uint32_t disabled) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %4, 0; tcgen05.mma.cta_group::1.kind::f16 [%0], [%1], %2, %3, {%5, 0, 0, 0}, "
      "p;}" ::"r"(d),
      "r"(a), "l"(b), "r"(idesc), "r"(accumulate), "r"(disabled)
      : "memory");
}
__device__ __forceinline__ void commit(uint64_t* b) {
  asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(smem(b)) : "memory");
}
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// out[lane][columns] = what tensor memory holds after `steps` products of M x N x 16 onto `initial`.
extern "C" __global__ void __launch_bounds__(128)
    product(Operand a, Operand b, uint32_t idesc, int steps, int columns, const uint32_t* initial, uint32_t disabled,
            uint32_t* out, int bug) {
  extern __shared__ __align__(1024) unsigned char raw[];
  __shared__ uint32_t base;
  __shared__ uint64_t bar;
  const int t = threadIdx.x, warp = t / 32;
  unsigned char *sa = raw, *sb = raw + (a.bytes + 1023) / 1024 * 1024;
  if (warp == 0) {
    allocate(&base, bug == ODD_COLUMNS ? 48 : 512);
    relinquish();
    if (bug == AFTER_RELINQUISH) allocate(&base, 32);
  }
  if (t == 0) mbar_init(&bar, 1);
  for (int i = t; i < a.bytes / 16; i += 128) ((uint4*)sa)[i] = ((const uint4*)a.image)[i];
  for (int i = t; i < b.bytes / 16; i += 128) ((uint4*)sb)[i] = ((const uint4*)b.image)[i];
  if (bug != NO_PROXY_FENCE) proxy_fence();
  __syncthreads();
  const uint32_t tm = base, own = tm + (warp << 21), ta = tm + 256;
  uint32_t r[8];
  if (a.bytes == 0)
    for (int s = 0; s < steps; ++s) {
      for (int i = 0; i < 8; ++i) r[i] = ((const uint32_t*)a.image)[t * 8 * steps + 8 * s + i];
      store8(r, own + 256 + 8 * s);
    }
  if (initial)
    for (int c = 0; c < columns; c += 8) {
      for (int i = 0; i < 8; ++i) r[i] = initial[t * columns + c + i];
      store8(r, own + c);
    }
  if (bug != NO_STORE_WAIT) wait_st();
  if (bug != NO_FENCE_BEFORE) fence_before();
  if (bug != NO_SYNC) __syncthreads();
  fence_after();
  if (warp == 0) {
    unsigned elected;
    asm volatile("{.reg .pred p; elect.sync _|p, -1; selp.b32 %0, 1, 0, p;}" : "=r"(elected));
    if (elected) {
      for (int s = 0; s < steps; ++s) {
        const uint64_t db = b.descriptor + ((smem(sb) + s * b.step) >> 4);
        if (a.bytes)
          mma(tm, a.descriptor + ((smem(sa) + s * a.step) >> 4), db, idesc, s || initial);
        else
          mma_from_tmem(tm, ta + 8 * s, db, idesc, s || initial, disabled);
      }
      if (bug == TF32)
        asm volatile("tcgen05.mma.cta_group::1.kind::tf32 [%0], %1, %1, %2, 1;" ::"r"(tm), "l"(b.descriptor),
                     "r"(idesc));
      commit(&bar);
    }
    __syncwarp();
    if (bug == DEALLOC_EARLY) deallocate(tm, 512);
  }
  if (bug == OVERWRITE) {
    __syncthreads();
    sb[t] = 0;
  }
  if (bug != NO_COMMIT_WAIT) mbar_wait(&bar, 0);
  if (bug != NO_FENCE_AFTER) fence_after();
  for (int c = 0; c < columns; c += 8) {
    load8(r, bug == QUARTER ? tm : bug == COLUMN ? own + 512 : bug == UNEVEN_ADDRESS ? own + (t & 1) : own + c);
    if (bug != NO_LOAD_WAIT) wait_ld();
    for (int i = 0; i < 8; ++i) out[t * columns + c + i] = r[i];
  }
  wait_ld();
  fence_before();
  __syncthreads();
  if (warp == 0 && bug != NO_DEALLOC) deallocate(tm, 512);
}

// Each shape of tcgen05.st writes what it is given, register by register: in[shape][thread][4] to out[shape][lane][8].
extern "C" __global__ void __launch_bounds__(128) shapes(const uint32_t* in, uint32_t* out, uint32_t* back) {
  __shared__ uint32_t base;
  const int t = threadIdx.x, warp = t / 32;
  if (warp == 0) allocate(&base, 32);
  __syncthreads();
  const uint32_t own = base + (warp << 21);
  for (int shape = 0; shape < 6; ++shape) {
    uint32_t r[8], z[8] = {}, v[4];
    store8(z, own);
    wait_st();
    for (int i = 0; i < 4; ++i) v[i] = in[(shape * 128 + t) * 4 + i];
#define STORE(s) \
  asm volatile("tcgen05.st.sync.aligned." s " {%1,%2,%3,%4};" ::"r"(own), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]))
    if (shape == 0) STORE("16x64b.x4.b32 [%0],");
    if (shape == 1) STORE("16x128b.x2.b32 [%0],");
    if (shape == 2) STORE("16x256b.x1.b32 [%0],");
    if (shape == 3) STORE("16x32bx2.x4.b32 [%0], 4,");
    if (shape == 4) STORE("32x32b.x4.b32 [%0],");
    if (shape == 5) STORE("32x32b.x4.unpack::16b.b32 [%0],");
    wait_st();
    load8(r, own);
    uint32_t w[4] = {};
#define LOAD(s) asm volatile("tcgen05.ld.sync.aligned." s : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(own))
    if (shape == 0) LOAD("16x64b.x4.b32 {%0,%1,%2,%3}, [%4];");
    if (shape == 1) LOAD("16x128b.x2.b32 {%0,%1,%2,%3}, [%4];");
    if (shape == 2) LOAD("16x256b.x1.b32 {%0,%1,%2,%3}, [%4];");
    if (shape == 3) LOAD("16x32bx2.x4.b32 {%0,%1,%2,%3}, [%4], 4;");
    if (shape == 4) LOAD("32x32b.x4.b32 {%0,%1,%2,%3}, [%4];");
    if (shape == 5) LOAD("32x32b.x4.pack::16b.b32 {%0,%1,%2,%3}, [%4];");
    wait_ld();
    for (int i = 0; i < 8; ++i) out[(shape * 128 + t) * 8 + i] = r[i];
    for (int i = 0; i < 4; ++i) back[(shape * 128 + t) * 4 + i] = w[i];
  }
  __syncthreads();
  if (warp == 0) deallocate(base, 32);
}

// A pair of CTAs: each holds its rows of A, half of the columns of B, and its rows of D.
extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(128)
    pair(Operand a, Operand b, uint32_t idesc, int steps, int columns, uint32_t* out) {
  extern __shared__ __align__(1024) unsigned char raw[];
  __shared__ uint32_t base;
  __shared__ uint64_t bar;
  const int t = threadIdx.x, warp = t / 32, rank = blockIdx.x;
  unsigned char *sa = raw, *sb = raw + (a.bytes + 1023) / 1024 * 1024;
  if (warp == 0)
    asm volatile("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%0], 512;" ::"r"(smem(&base)) : "memory");
  if (t == 0) mbar_init(&bar, 1);
  for (int i = t; i < a.bytes / 16; i += 128) ((uint4*)sa)[i] = ((const uint4*)a.image)[rank * (a.bytes / 16) + i];
  for (int i = t; i < b.bytes / 16; i += 128) ((uint4*)sb)[i] = ((const uint4*)b.image)[rank * (b.bytes / 16) + i];
  proxy_fence();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  const uint32_t tm = base, own = tm + (warp << 21);
  if (rank == 0 && t == 0) {
    for (int s = 0; s < steps; ++s)
      asm volatile(
          "{.reg .pred p; setp.ne.b32 p, %4, 0; tcgen05.mma.cta_group::2.kind::f16 [%0], %1, %2, %3, p;}" ::"r"(tm),
          "l"(a.descriptor + (((smem(sa) & 0x3ffff) + s * a.step) >> 4)),
          "l"(b.descriptor + (((smem(sb) & 0x3ffff) + s * b.step) >> 4)), "r"(idesc), "r"(s)
          : "memory");
    asm volatile(
        "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;" ::"r"(
            smem(&bar)),
        "h"((unsigned short)3)
        : "memory");
  }
  __syncwarp();
  mbar_wait(&bar, 0);
  fence_after();
  uint32_t r[8];
  for (int c = 0; c < columns; c += 8) {
    load8(r, own + c);
    wait_ld();
    for (int i = 0; i < 8; ++i) out[(rank * 128 + t) * columns + c + i] = r[i];
  }
  fence_before();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (warp == 0) asm volatile("tcgen05.dealloc.cta_group::2.sync.aligned.b32 %0, 512;" ::"r"(tm) : "memory");
}

// Each CTA of a pair copies 16 rows to itself and 16 rows to both. All of it completes on the mbarrier of the first.
extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(128)
    pair_copies(const __grid_constant__ CUtensorMap map, int* out) {
  __shared__ __align__(128) int s[48][16];
  __shared__ uint64_t bar;
  const int t = threadIdx.x, rank = blockIdx.x;
  if (t == 0) mbar_init(&bar, 1);
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (rank == 0 && t == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(&bar)), "r"(2 * (int)sizeof s)
                 : "memory");
  if (t == 0) {
    const uint32_t leader = smem(&bar) & 0xfeffffff;
    asm volatile(
        "cp.async.bulk.tensor.2d.cta_group::2.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {0, "
        "%3}], [%2];" ::"r"(smem(s)),
        "l"(&map), "r"(leader), "r"(16 * rank)
        : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.cta_group::2.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::"
        "cluster "
        "[%0], [%1, {0, %3}], [%2], %4;" ::"r"(smem(s[16 + 16 * rank])),
        "l"(&map), "r"(leader), "r"(32 + 16 * rank), "h"((unsigned short)3)
        : "memory");
  }
  __syncthreads();
  if (rank == 0) mbar_wait(&bar, 0);
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  for (int i = t; i < 48 * 16; i += 128) out[rank * 48 * 16 + i] = s[i / 16][i % 16];
}
