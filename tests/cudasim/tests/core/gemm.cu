// Tensor-core code for sm_80: ldmatrix, mma.sync, cp.async pipelines, wmma.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

__device__ __forceinline__ unsigned smem(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void cp16(unsigned dst, const void* src, bool ok) {
  int n = ok ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(n));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int N>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N));
}
__device__ __forceinline__ void ldsm4(unsigned (&r)[4], unsigned a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a));
}
__device__ __forceinline__ void ldsm4t(unsigned (&r)[4], unsigned a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a));
}
template <bool BF>
__device__ __forceinline__ void mma16816(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if (BF)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C[M,N] = A[M,K] * B; B is N x K (TN) or K x N (NN). Tiles 128 x 128 x 32, 3 stages, 4 warps of
// 64 x 64, XOR-swizzled shared memory. BUG 1: no wait_group; 2: no barrier after the wait.
template <bool BF, bool TN, int BUG>
__device__ void gemm_body(const unsigned short* A, const unsigned short* B, float* C, int M, int N, int K) {
  constexpr int BM = 128, BN = 128, BK = 32, ST = 3;
  extern __shared__ __align__(1024) unsigned short sm[];
  unsigned short* sA = sm;                 // [ST][BM][BK]
  unsigned short* sB = sm + ST * BM * BK;  // [ST][BN][BK] or [ST][BK][BN]
  int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, wm = warp / 2 * 64, wn = warp % 2 * 64;
  int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  float acc[4][8][4] = {};
  // 64-byte rows: 4 chunks of 16 bytes; chunk ^= (row / 2) % 4
  auto atK = [&](unsigned short* s, int row, int chunk) { return smem(s + row * BK + ((chunk ^ (row / 2 & 3)) * 8)); };
  auto atN = [&](unsigned short* s, int k, int chunk) { return smem(s + k * BN + ((chunk ^ (k & 7)) * 8)); };
  auto load = [&](int t, int st) {
    for (int i = tid; i < BM * 4; i += 128) {
      int r = i / 4, c = i % 4, m = m0 + r, k = t * BK + c * 8;
      bool ok = m < M && k < K;
      cp16(atK(sA + st * BM * BK, r, c), A + (ok ? (size_t)m * K + k : 0), ok);
    }
    if (TN) {
      for (int i = tid; i < BN * 4; i += 128) {
        int r = i / 4, c = i % 4, n = n0 + r, k = t * BK + c * 8;
        bool ok = n < N && k < K;
        cp16(atK(sB + st * BN * BK, r, c), B + (ok ? (size_t)n * K + k : 0), ok);
      }
    } else {
      for (int i = tid; i < BK * 16; i += 128) {
        int r = i / 16, c = i % 16, n = n0 + c * 8, k = t * BK + r;
        bool ok = n < N && k < K;
        cp16(atN(sB + st * BN * BK, r, c), B + (ok ? (size_t)k * N + n : 0), ok);
      }
    }
    commit();
  };
  int T = (K + BK - 1) / BK;
  for (int s = 0; s < ST - 1; ++s) {
    if (s < T)
      load(s, s);
    else
      commit();
  }
  for (int t = 0; t < T; ++t) {
    if (BUG != 1) wait<ST - 2>();
    if (BUG != 2) __syncthreads();
    int st = t % ST;
    if (t + ST - 1 < T)
      load(t + ST - 1, (t + ST - 1) % ST);
    else
      commit();
    for (int kk = 0; kk < 2; ++kk) {
      unsigned a[4][4], b[4][4];
      for (int i = 0; i < 4; ++i) ldsm4(a[i], atK(sA + st * BM * BK, wm + i * 16 + lane % 16, kk * 2 + lane / 16));
      for (int j = 0; j < 4; ++j) {
        if (TN)
          ldsm4(b[j], atK(sB + st * BN * BK, wn + j * 16 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
        else
          ldsm4t(b[j], atN(sB + st * BN * BK, kk * 16 + lane % 16, (wn + j * 16) / 8 + lane / 16));
      }
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 8; ++j) mma16816<BF>(acc[i][j], a[i], b[j / 2][(j & 1) * 2], b[j / 2][(j & 1) * 2 + 1]);
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 8; ++j)
      for (int h = 0; h < 2; ++h) {
        int m = m0 + wm + i * 16 + lane / 4 + h * 8, n = n0 + wn + j * 8 + lane % 4 * 2;
        if (m < M && n < N) *(float2*)&C[(size_t)m * N + n] = make_float2(acc[i][j][h * 2], acc[i][j][h * 2 + 1]);
      }
}
extern "C" __global__ void __launch_bounds__(128)
    gemm_f16_tn(const unsigned short* A, const unsigned short* B, float* C, int M, int N, int K) {
  gemm_body<false, true, 0>(A, B, C, M, N, K);
}
extern "C" __global__ void __launch_bounds__(128)
    gemm_bf16_tn(const unsigned short* A, const unsigned short* B, float* C, int M, int N, int K) {
  gemm_body<true, true, 0>(A, B, C, M, N, K);
}
extern "C" __global__ void __launch_bounds__(128)
    gemm_f16_nn(const unsigned short* A, const unsigned short* B, float* C, int M, int N, int K) {
  gemm_body<false, false, 0>(A, B, C, M, N, K);
}
extern "C" __global__ void __launch_bounds__(128)
    gemm_no_wait(const unsigned short* A, const unsigned short* B, float* C, int M, int N, int K) {
  gemm_body<false, true, 1>(A, B, C, M, N, K);
}
extern "C" __global__ void __launch_bounds__(128)
    gemm_no_barrier(const unsigned short* A, const unsigned short* B, float* C, int M, int N, int K) {
  gemm_body<false, true, 2>(A, B, C, M, N, K);
}

// One mma of each kind on fragments gathered by definition. A is 16 x k, B is k x 8, row-major.
extern "C" __global__ void mma_tf32(const float* A, const float* B, float* C) {
  int l = threadIdx.x, g = l / 4, t = l % 4;
  unsigned a[4], b[2];
  auto T = [](float x) {
    unsigned r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
  };
  a[0] = T(A[g * 8 + t]);
  a[1] = T(A[(g + 8) * 8 + t]);
  a[2] = T(A[g * 8 + t + 4]);
  a[3] = T(A[(g + 8) * 8 + t + 4]);
  b[0] = T(B[t * 8 + g]);
  b[1] = T(B[(t + 4) * 8 + g]);
  float c[4] = {};
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  C[g * 8 + 2 * t] = c[0];
  C[g * 8 + 2 * t + 1] = c[1];
  C[(g + 8) * 8 + 2 * t] = c[2];
  C[(g + 8) * 8 + 2 * t + 1] = c[3];
}
extern "C" __global__ void mma_s8(const signed char* A, const signed char* B, int* C) {
  int l = threadIdx.x, g = l / 4, t = l % 4;
  unsigned a[4], b[2];
  auto row = [&](int r, int c) { return *(const unsigned*)(A + r * 32 + c); };
  a[0] = row(g, 4 * t);
  a[1] = row(g + 8, 4 * t);
  a[2] = row(g, 4 * t + 16);
  a[3] = row(g + 8, 4 * t + 16);
  for (int h = 0; h < 2; ++h) {
    b[h] = 0;
    for (int e = 0; e < 4; ++e) b[h] |= (unsigned)(unsigned char)B[(4 * t + 16 * h + e) * 8 + g] << (8 * e);
  }
  int c[4] = {1, 2, 3, 4};
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  C[g * 8 + 2 * t] = c[0];
  C[g * 8 + 2 * t + 1] = c[1];
  C[(g + 8) * 8 + 2 * t] = c[2];
  C[(g + 8) * 8 + 2 * t + 1] = c[3];
}
extern "C" __global__ void mma_f64(const double* A, const double* B, double* C) {
  int l = threadIdx.x, g = l / 4, t = l % 4;
  double c0 = 0, c1 = 0;
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1},{%2},{%3},{%0,%1};"
               : "+d"(c0), "+d"(c1)
               : "d"(A[g * 4 + t]), "d"(B[t * 8 + g]));
  C[g * 8 + 2 * t] = c0;
  C[g * 8 + 2 * t + 1] = c1;
}
extern "C" __global__ void mma_f16acc(const unsigned short* A, const unsigned short* B,
                                      unsigned short* C) {  // 16x8 A, 8x8 B
  int l = threadIdx.x, g = l / 4, t = l % 4;
  unsigned a0 = *(const unsigned*)(A + g * 8 + 2 * t), a1 = *(const unsigned*)(A + (g + 8) * 8 + 2 * t),
           b = B[2 * t * 8 + g] | (unsigned)B[(2 * t + 1) * 8 + g] << 16, c0 = 0, c1 = 0;
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1},{%2,%3},{%4},{%0,%1};"
               : "+r"(c0), "+r"(c1)
               : "r"(a0), "r"(a1), "r"(b));
  *(unsigned*)(C + g * 8 + 2 * t) = c0;
  *(unsigned*)(C + (g + 8) * 8 + 2 * t) = c1;
}
extern "C" __global__ void wmma_gemm(const half* A, const half* B, float* C,
                                     half* D) {  // 16 x 32 times 32 x 16 (col-major)
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, half, row_major> a;
  fragment<matrix_b, 16, 16, 16, half, col_major> b;
  fragment<accumulator, 16, 16, 16, float> c;
  fragment<accumulator, 16, 16, 16, half> d;
  fill_fragment(c, 0.f);
  fill_fragment(d, __float2half(0.f));
  for (int k = 0; k < 32; k += 16) {
    load_matrix_sync(a, A + k, 32);
    load_matrix_sync(b, B + k, 32);
    mma_sync(c, a, b, c);
    mma_sync(d, a, b, d);
  }
  for (int i = 0; i < c.num_elements; ++i) c.x[i] *= 2;
  store_matrix_sync(C, c, 16, mem_row_major);
  store_matrix_sync(D, d, 16, mem_col_major);
}
