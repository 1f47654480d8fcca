// Deliberately wrong kernels; every one must be reported.
extern "C" __global__ void oob_global(int* a, int n) { a[threadIdx.x + (threadIdx.x == 37 ? n : 0)] = 1; }
extern "C" __global__ void oob_read(const int* a, int* o, int n) { o[threadIdx.x] = a[threadIdx.x + n - 31]; }
extern "C" __global__ void oob_shared(int* o, int i) {
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x + i];
}
extern "C" __global__ void oob_dynamic(int* o, int i) {
  extern __shared__ int d[];
  d[threadIdx.x + i] = 1;
  o[threadIdx.x] = d[threadIdx.x];
}
extern "C" __global__ void misaligned_v4(const float* a, float4* o) {
  o[threadIdx.x] = *(const float4*)(a + threadIdx.x * 4 + 1);
}
extern "C" __global__ void no_sync(int* o) {
  __shared__ int s[128];
  s[threadIdx.x] = threadIdx.x;
  o[threadIdx.x] = s[127 - threadIdx.x];
}
extern "C" __global__ void with_sync(int* o) {
  __shared__ int s[128];
  for (int i = 0; i < 4; ++i) {
    s[threadIdx.x] = threadIdx.x + i;
    __syncthreads();
    o[threadIdx.x] = s[127 - threadIdx.x];
    __syncthreads();
  }
}
extern "C" __global__ void no_second_sync(int* o) {  // write after read
  __shared__ int s[128];
  for (int i = 0; i < 4; ++i) {
    s[threadIdx.x] = threadIdx.x + i;
    __syncthreads();
    o[threadIdx.x] = s[127 - threadIdx.x];
  }
}
extern "C" __global__ void no_syncwarp(int* o) {
  __shared__ volatile int v[32];
  int* s = (int*)v;
  s[threadIdx.x] = threadIdx.x;
  asm volatile("" ::: "memory");
  o[threadIdx.x] = s[31 - threadIdx.x];
}
extern "C" __global__ void with_syncwarp(int* o) {
  __shared__ int s[32];
  s[threadIdx.x] = threadIdx.x;
  __syncwarp();
  o[threadIdx.x] = s[31 - threadIdx.x];
}
extern "C" __global__ void byte_neighbours(unsigned char* o) {  // adjacent bytes of one word: not a race
  __shared__ unsigned char s[256];
  s[threadIdx.x * 2] = threadIdx.x;
  s[(threadIdx.x * 2 + 129) & 255] = threadIdx.x;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x ^ 1];
}
extern "C" __global__ void same_value(int* o) {  // all write the same value: accepted
  __shared__ int flag;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x > 3) flag = 1;
  __syncthreads();
  o[threadIdx.x] = flag;
}
extern "C" __global__ void uninit(int* o, int n) {
  __shared__ int s[64];
  if (threadIdx.x < n) s[threadIdx.x] = 1;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void divergent_sync(int* o) {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
    o[threadIdx.x] = 1;
  } else {
    o[threadIdx.x] = 2;
    __syncthreads();
    o[threadIdx.x] += o[threadIdx.x ^ 16];
  }
}
extern "C" __global__ void missing_sync_warp(int* o, int n) {  // one warp never arrives
  if (threadIdx.x >= 64) {
    while (*(volatile int*)o == n) asm volatile("bar.sync 3, 64;");
  }
  asm volatile("bar.sync 1, 128;");
}
extern "C" __global__ void half_warp_shfl(int* o) {
  int v = threadIdx.x;
  if (threadIdx.x < 16)
    v = __shfl_xor_sync(0xffffffffu, v, 1);
  else
    asm volatile("bar.sync 1, 64;");
  o[threadIdx.x] = v;
}
extern "C" __global__ void traps(int n) {
  if (threadIdx.x == n) __trap();
}
extern "C" __global__ void named_wrong(int* o) {  // consumer barrier used as if it covered the producer's second write
  __shared__ int s[64];
  int t = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    if (t < 64) {
      s[t] = t + i;
      asm volatile("bar.arrive 1, 128;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 128;" ::: "memory");
      o[t] = s[t - 64];
    }
  }
}
