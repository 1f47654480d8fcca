// Blocks that hand data to one another through global memory, rightly and wrongly (CUDASIM_CHECK=grid).
__device__ void sum_block(const float* in, int n, float* to) {
  __shared__ float part[128];
  float s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += in[i];
  part[threadIdx.x] = s;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < blockDim.x; ++i) s += part[i];
    *to = s;
  }
}

// The last block to arrive adds the partial sums. fences: 1 before the ticket, 2 after it.
template <int kFences>
__device__ void last_block(const float* in, int n, float* partial, unsigned* ticket, float* out) {
  __shared__ bool last;
  sum_block(in, n, partial + blockIdx.x);
  if (threadIdx.x == 0) {
    if (kFences & 1) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (kFences & 2) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float s = 0;
  for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) s += partial[i];
  atomicAdd(out, s);
}
extern "C" __global__ void last_block_fences(const float* in, int n, float* p, unsigned* t, float* out) {
  last_block<3>(in, n, p, t, out);
}
extern "C" __global__ void last_block_no_fence(const float* in, int n, float* p, unsigned* t, float* out) {
  last_block<0>(in, n, p, t, out);
}
extern "C" __global__ void last_block_no_producer_fence(const float* in, int n, float* p, unsigned* t, float* out) {
  last_block<2>(in, n, p, t, out);
}
extern "C" __global__ void last_block_no_consumer_fence(const float* in, int n, float* p, unsigned* t, float* out) {
  last_block<1>(in, n, p, t, out);
}

// Split sums: every thread of a block writes its partial, one takes the ticket.
enum { FENCE_BARRIER = 1, BARRIER_FENCE = 2, SC = 4, AFTER = 8, NO_BARRIER = 16, ACQ_REL = 32, NC = 64 };
template <int kHow>
__device__ void fence() {
  if (kHow & SC)
    __threadfence();  // membar.gl, which is fence.sc
  else
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
}
template <int kHow>
__device__ void tickets(float* partial, unsigned* ticket, float* out) {
  __shared__ unsigned arrived;
  const int t = threadIdx.x, n = blockDim.x;
  partial[blockIdx.x * n + t] = blockIdx.x + t;
  if (kHow & FENCE_BARRIER) fence<kHow>();
  if (!(kHow & NO_BARRIER)) __syncthreads();
  if (t == 0) {
    if (kHow & BARRIER_FENCE) fence<kHow>();
    if (kHow & ACQ_REL)
      asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(arrived) : "l"(ticket) : "memory");
    else
      arrived = atomicAdd(ticket, 1u);
    if (kHow & BARRIER_FENCE) fence<kHow>();
  }
  __syncthreads();
  if (kHow & AFTER) fence<kHow>();
  if (arrived != gridDim.x - 1) return;
  float s = 0;
  for (int b = 0; b < gridDim.x; ++b) s += kHow & NC ? __ldg(partial + b * n + t) : __ldcg(partial + b * n + t);
  out[t] = s;
}
extern "C" __global__ void tickets_all_fence(float* p, unsigned* t, float* o) {
  tickets<FENCE_BARRIER | SC | AFTER>(p, t, o);
}
extern "C" __global__ void tickets_one_fence(float* p, unsigned* t, float* o) { tickets<BARRIER_FENCE | SC>(p, t, o); }
extern "C" __global__ void tickets_one_acq_rel_fence(float* p, unsigned* t, float* o) {
  tickets<BARRIER_FENCE>(p, t, o);
}
extern "C" __global__ void tickets_atomic_order(float* p, unsigned* t, float* o) { tickets<ACQ_REL>(p, t, o); }
extern "C" __global__ void tickets_nc(float* p, unsigned* t, float* o) { tickets<BARRIER_FENCE | SC | NC>(p, t, o); }
// Only fence.sc reaches across the barrier between the fence and the atomic.
extern "C" __global__ void tickets_all_acq_rel_fence(float* p, unsigned* t, float* o) {
  tickets<FENCE_BARRIER | AFTER>(p, t, o);
}
extern "C" __global__ void tickets_no_fence_after(float* p, unsigned* t, float* o) {
  tickets<FENCE_BARRIER | SC>(p, t, o);
}
extern "C" __global__ void tickets_no_barrier(float* p, unsigned* t, float* o) {
  tickets<BARRIER_FENCE | SC | NO_BARRIER>(p, t, o);
}

// Block 1 waits for block 0's flag.
template <int kFences>
__device__ void flag(int* data, volatile int* ready, int* out) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = threadIdx.x + 1;
    __syncthreads();
    if (threadIdx.x == 0) {
      if (kFences & 1) __threadfence();
      *ready = 1;
    }
  } else {
    if (threadIdx.x == 0) {
      while (!*ready) {
      }
      if (kFences & 2) __threadfence();
    }
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x];
  }
}
extern "C" __global__ void flag_fences(int* d, int* f, int* o) { flag<3>(d, f, o); }
extern "C" __global__ void flag_no_producer_fence(int* d, int* f, int* o) { flag<2>(d, f, o); }
extern "C" __global__ void flag_no_consumer_fence(int* d, int* f, int* o) { flag<1>(d, f, o); }
extern "C" __global__ void flag_release_acquire(int* d, int* f, int* o) {
  if (blockIdx.x == 0) {
    d[threadIdx.x] = threadIdx.x + 1;
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(f) : "memory");
  } else {
    int v = 0;
    if (threadIdx.x == 0)
      while (!v) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(f) : "memory");
    __syncthreads();
    o[threadIdx.x] = d[threadIdx.x];
  }
}
extern "C" __global__ void flag_of_block_scope(int* d, int* f, int* o) {
  if (blockIdx.x == 0) {
    d[threadIdx.x] = threadIdx.x + 1;
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("st.release.cta.global.u32 [%0], 1;" ::"l"(f) : "memory");
  } else {
    int v = 0;
    if (threadIdx.x == 0)
      while (!v) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(f) : "memory");
    __syncthreads();
    o[threadIdx.x] = d[threadIdx.x];
  }
}

extern "C" __global__ void read_then_written(int* data, int* out) {  // block 1 overwrites what block 0 reads
  if (blockIdx.x == 0)
    out[threadIdx.x] = data[threadIdx.x];
  else
    data[threadIdx.x] = 1;
}
extern "C" __global__ void both_write(int* data, int scale) { data[threadIdx.x] = 1 + blockIdx.x * scale; }
extern "C" __global__ void halves_of_words(unsigned short* data) { data[2 * threadIdx.x + blockIdx.x] = threadIdx.x; }
extern "C" __global__ void bytes_of_words(unsigned char* data) { data[4 * threadIdx.x + blockIdx.x] = threadIdx.x; }
extern "C" __global__ void counts(int* data) { atomicAdd(data + threadIdx.x, 1); }
extern "C" __global__ void counts_read_plainly(int* data, int* out) {
  atomicAdd(data + threadIdx.x, 1);
  out[blockIdx.x * blockDim.x + threadIdx.x] = data[threadIdx.x ^ 1];
}
extern "C" __global__ void nc_then_written(int* data, int* out) {  // even by the same thread
  out[threadIdx.x] = __ldg(data + threadIdx.x);
  data[threadIdx.x] = 5;
}
extern "C" __global__ void grid_phases(int* count, int* data, int* out) {
  data[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(count, 1);
    while (*(volatile int*)count < (int)gridDim.x) {
    }
    __threadfence();
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = data[(gridDim.x - 1 - blockIdx.x) * blockDim.x + threadIdx.x];
}
