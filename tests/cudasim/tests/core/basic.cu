// Ordinary CUDA: arithmetic, control flow, shuffles, shared memory, atomics, calls.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cassert>
#include <cstdio>

extern "C" __global__ void vadd(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}

extern "C" __global__ void reduce_shfl(const float* a, float* out, int n) {
  __shared__ float part[32];
  float s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += a[i];
  for (int o = 16; o; o >>= 1) s += __shfl_down_sync(~0u, s, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
    for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
    if (threadIdx.x == 0) out[blockIdx.x] = s;
  }
}

template <int PAD>
__device__ void transpose_body(const float* a, float* b, int n) {
  __shared__ float t[32][32 + PAD];
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8) t[threadIdx.y + j][threadIdx.x] = a[(y + j) * n + x];
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x;
  y = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8) b[(y + j) * n + x] = t[threadIdx.x][threadIdx.y + j];
}
extern "C" __global__ void transpose_conflict(const float* a, float* b, int n) { transpose_body<0>(a, b, n); }
extern "C" __global__ void transpose_padded(const float* a, float* b, int n) { transpose_body<1>(a, b, n); }

extern "C" __global__ void histogram(const unsigned char* a, unsigned* h, int n) {
  __shared__ unsigned s[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&s[a[i]], 1u);
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&h[i], s[i]);
}

extern "C" __global__ void collatz(const int* a, int* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long v = a[i];
  int steps = 0;
  while (v != 1) {
    if (v & 1)
      v = 3 * v + 1;
    else
      v >>= 1;
    if (++steps > 1000) break;
  }
  out[i] = steps;
}

__device__ __noinline__ int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
typedef int (*op_t)(int);
__device__ __noinline__ int triple(int a) { return a * 3; }
__device__ __noinline__ int plus7(int a) { return a + 7; }
__device__ op_t table[2] = {triple, plus7};
struct Pt {
  int a;
  float b;
  long long c;
  char d[5];
};
__device__ __noinline__ float use_struct(float x, Pt p) { return x * p.b + p.a + p.d[2] + (float)p.c; }

extern "C" __global__ void calls(int* out, float* fout, Pt p) {
  int t = threadIdx.x;
  out[t] = fib(t % 10) + table[t & 1](t);
  int local[16];
  for (int i = 0; i < 16; ++i) local[i] = i * t;
  fout[t] = use_struct((float)t, p) + local[(t * 7) % 16];
}

extern "C" __global__ void jump(const int* in, int* out, int n) {
  int i = threadIdx.x, v = i;
  for (int k = 0; k < n; ++k) {
    switch ((in[k] + i) % 12) {
      case 0:
        v += 1;
        break;
      case 1:
        v ^= 5;
        break;
      case 2:
        v *= 3;
        break;
      case 3:
        v -= 9;
        break;
      case 4:
        v = v / 3;
        break;
      case 5:
        v |= 16;
        break;
      case 6:
        v = ~v;
        break;
      case 7:
        v &= 77;
        break;
      case 8:
        v = in[v & 3];
        break;
      case 9:
        v += i * 7;
        break;
      case 10:
        v = __popc(v);
        break;
      case 11:
        v = __clz(v);
        break;
    }
  }
  out[i] = v;
}

extern "C" __global__ void hello(int n) {
  if (threadIdx.x < n)
    printf("thread %d of %s: %5.2f %lld %c%%\n", threadIdx.x, "hello", threadIdx.x * 1.5, 1ll << 40, 'x');
}
extern "C" __global__ void asserts(int n) { assert(threadIdx.x < n); }

extern "C" __global__ void halfs(const __half2* a, const __half2* b, const __half2* c, __half2* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[8 * i + 0] = __hadd2(a[i], b[i]);
  o[8 * i + 1] = __hsub2(a[i], b[i]);
  o[8 * i + 2] = __hmul2(a[i], b[i]);
  o[8 * i + 3] = __hfma2(a[i], b[i], c[i]);
  o[8 * i + 4] = __hmax2(a[i], b[i]);
  o[8 * i + 5] = __hmin2(a[i], b[i]);
  o[8 * i + 6] = __floats2half2_rn(__low2float(a[i]) * 1.7f, __high2float(b[i]) * 0.3f);
  o[8 * i + 7] = __hneg2(__habs2(c[i]));
}
extern "C" __global__ void bf16s(const __nv_bfloat162* a, const __nv_bfloat162* b, const __nv_bfloat162* c,
                                 __nv_bfloat162* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[8 * i + 0] = __hadd2(a[i], b[i]);
  o[8 * i + 1] = __hsub2(a[i], b[i]);
  o[8 * i + 2] = __hmul2(a[i], b[i]);
  o[8 * i + 3] = __hfma2(a[i], b[i], c[i]);
  o[8 * i + 4] = __hmax2(a[i], b[i]);
  o[8 * i + 5] = __hmin2(a[i], b[i]);
  o[8 * i + 6] = __floats2bfloat162_rn(__low2float(a[i]) * 1.7f, __high2float(b[i]) * 0.3f);
  o[8 * i + 7] = __hneg2(__habs2(c[i]));
}

// NF4: 16-entry table by shuffle and by byte permute
__constant__ float nf4[16] = {-1.0f,        -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                              -0.09105004f, 0.0f,        0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                              0.44070983f,  0.562617f,   0.72295684f,  1.0f};
extern "C" __global__ void nf4_dequant(const unsigned* q, const float* absmax, float* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float mine = nf4[threadIdx.x & 15];
  unsigned v = i < n ? q[i] : 0;
  float s = i < n ? absmax[i / 8] : 0;
  for (int k = 0; k < 8; ++k) {
    float x = __shfl_sync(~0u, mine, (v >> (4 * k)) & 15);
    if (i < n) o[i * 8 + k] = x * s;
  }
}
extern "C" __global__ void prmts(const unsigned* a, unsigned* o) {
  int i = threadIdx.x;
  unsigned x = a[2 * i], y = a[2 * i + 1];
  o[i * 8 + 0] = __byte_perm(x, y, 0x5410);
  o[i * 8 + 1] = __byte_perm(x, y, y & 0x7777);
  unsigned r;
  asm("prmt.b32.rc16 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(i & 3));
  o[i * 8 + 2] = r;
  asm("prmt.b32 %0, %1, %2, 0xba98;" : "=r"(r) : "r"(x), "r"(y));
  o[i * 8 + 3] = r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(x), "r"(y), "r"(i * 77));
  o[i * 8 + 4] = r;
  o[i * 8 + 5] = __funnelshift_r(x, y, i);
  asm("bfe.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(i % 32), "r"(i % 11));
  o[i * 8 + 6] = r;
  asm("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(x), "r"(y), "r"(i % 32), "r"(i % 11));
  o[i * 8 + 7] = r;
}

extern "C" __global__ void int_math(const int* a, const int* b, long long* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int x = a[i], y = b[i];
  long long lx = (long long)x << 20 | y, ly = y | 1;
  o[12 * i + 0] = x / (y ? y : 1);
  o[12 * i + 1] = x % (y ? y : 1);
  o[12 * i + 2] = (unsigned)x / ((unsigned)y | 1);
  o[12 * i + 3] = lx / ly;
  o[12 * i + 4] = lx % ly;
  o[12 * i + 5] = __mulhi(x, y);
  o[12 * i + 6] = __umulhi((unsigned)x, (unsigned)y);
  o[12 * i + 7] = (long long)__mul64hi(lx, ly);
  o[12 * i + 8] = __brev(x) ^ __popcll(lx) ^ __clzll(ly) ^ __ffs(x);
  o[12 * i + 9] = __dp4a(x, y, 5) + (int)__usad(x, y, 3);
  o[12 * i + 10] = (unsigned long long)lx * 0x9e3779b97f4a7c15ull >> (y & 63);
  o[12 * i + 11] = min(x, y) + max((short)x, (short)y) + abs(x >> 1);
}

extern "C" __global__ void fp_math(const float* a, const float* b, float* o, double* d, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float x = a[i], y = b[i];
  o[16 * i + 0] = __fadd_rz(x, y);
  o[16 * i + 1] = __fmul_ru(x, y);
  o[16 * i + 2] = fmaf(x, y, 1.5f);
  o[16 * i + 3] = x / y;
  o[16 * i + 4] = sqrtf(fabsf(x));
  o[16 * i + 5] = expf(x);
  o[16 * i + 6] = logf(fabsf(x) + 1e-3f);
  o[16 * i + 7] = sinf(x * 10);
  o[16 * i + 8] = tanhf(y);
  o[16 * i + 9] = rintf(x * 100);
  o[16 * i + 10] = (float)__float2int_rn(x * 1e3f);
  o[16 * i + 11] = (float)__float2uint_rz(x * 1e3f);
  o[16 * i + 12] = fminf(x, y) + fmaxf(x, -y);
  o[16 * i + 13] = __saturatef(x + y);
  o[16 * i + 14] = powf(fabsf(x), y);
  o[16 * i + 15] = __fsqrt_rd(fabsf(y));
  d[4 * i + 0] = (double)x * y + 1.0;
  d[4 * i + 1] = sqrt((double)fabsf(x));
  d[4 * i + 2] = exp((double)y);
  d[4 * i + 3] = (double)(long long)(x * 1e12) / 3.0;
}

extern "C" __global__ void warp_ops(unsigned* o) {
  unsigned t = threadIdx.x, lane = t & 31;
  o[t * 8 + 0] = __ballot_sync(~0u, t % 3 == 0);
  o[t * 8 + 1] = __any_sync(~0u, t == 40) * 2 + __all_sync(~0u, t < 64);
  o[t * 8 + 2] = __match_any_sync(~0u, t % 5);
  int pred;
  o[t * 8 + 3] = __match_all_sync(~0u, t / 32, &pred) + pred;
  o[t * 8 + 4] = __reduce_add_sync(~0u, t) ^ __reduce_max_sync(~0u, t * 7 % 31);
  o[t * 8 + 5] = __shfl_up_sync(~0u, t, 3, 8);
  if (lane & 1) {
    o[t * 8 + 6] = __shfl_xor_sync(0xaaaaaaaau, t, 2) + __activemask();
    __syncwarp(0xaaaaaaaau);
  } else {
    o[t * 8 + 6] = __shfl_down_sync(0x55555555u, t, 4, 16);
    __syncwarp(0x55555555u);
  }
  o[t * 8 + 7] = __syncthreads_count(t & 1) * 4 + __syncthreads_or(t == 5) + __syncthreads_and(t < 1000) * 2;
}

// a lock taken by several lanes of one warp needs independent progress of lanes
extern "C" __global__ void spin_lock(int* lock, int* counter) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      volatile int* c = counter;
      *c = *c + 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}

// split-K with a semaphore: block k waits for block k - 1 of its tile
extern "C" __global__ void split_k(const float* a, float* out, int* sem, int k_len, int splits) {
  int tile = blockIdx.x, part = blockIdx.y;
  float s = 0;
  for (int k = part; k < k_len; k += splits) s += a[(tile * k_len + k) * blockDim.x + threadIdx.x];
  if (threadIdx.x == 0)
    while (atomicAdd(&sem[tile], 0) != part) {
    }
  __syncthreads();
  float prev = part ? ((volatile float*)out)[tile * blockDim.x + threadIdx.x] : 0.f;
  ((volatile float*)out)[tile * blockDim.x + threadIdx.x] = prev + s;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicExch(&sem[tile], part + 1);
}
// the reverse: low blocks wait for high ones, so all must become resident
extern "C" __global__ void grid_barrier(int* count, int* out) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(count, 1);
    while (*(volatile int*)count < (int)gridDim.x) {
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = *(volatile int*)count;
}

extern "C" __global__ void named_barriers(int* out) {
  __shared__ int s[64];
  int t = threadIdx.x;
  if (t < 64) {
    s[t] = t * 2;
    asm volatile("bar.sync 1, 64;" ::: "memory");
    out[t] = s[63 - t];
    asm volatile("bar.arrive 2, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 2, 128;" ::: "memory");
    out[t] = s[t - 64] + 1;
  }
}
extern "C" __global__ void early_exit(int* out, int n) {
  __shared__ int s[128];
  int t = threadIdx.x;
  s[t] = t;
  if (t >= n) return;
  __syncthreads();
  out[t] = s[t ^ 1];
}
extern "C" __global__ void float_atomics(float* f, double* d, __half2* h, unsigned long long* u, int* i) {
  int t = threadIdx.x + blockIdx.x * blockDim.x;
  atomicAdd(f, 1.0f);
  atomicAdd(d, 0.5);
  atomicAdd(h, __floats2half2_rn(1.f, 0.f));
  atomicMax(u, (unsigned long long)t);
  atomicMin(i, -t);
  atomicInc((unsigned*)i + 1, 99);
  atomicXor(i + 2, t);
}
__device__ int dev_counter = 41;
extern "C" __global__ void bump() { dev_counter++; }

extern "C" __global__ void alu_speed(float* out, int n) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  float x = t * 0.001f, y = 1.0001f;
  unsigned u = t;
  for (int i = 0; i < n; ++i) {
    x = fmaf(x, y, 0.5f);
    u = u * 1664525u + 1013904223u;
    y = y * 0.999f + x * 1e-6f;
    u ^= u >> 13;
    x += (float)(u & 255);
    u += i << 3;
  }
  out[t] = x + y + u;
}
