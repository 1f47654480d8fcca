// What a matmul on the CPU gives.
#pragma once
#include "harness.h"

namespace test {

// C = A * B^T or A * B with inputs of 16 bits, in double
inline std::vector<double> gemm_ref(const uint16_t* A, const uint16_t* B, int M, int N, int K, bool bf, bool tn) {
  std::vector<double> c(size_t(M) * N), a(size_t(M) * K), b(size_t(N) * K);
  for (int i = 0; i < M * K; ++i) a[i] = bf ? from_bf16(A[i]) : from_f16(A[i]);
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k) {
      uint16_t h = tn ? B[size_t(n) * K + k] : B[size_t(k) * N + n];
      b[size_t(n) * K + k] = bf ? from_bf16(h) : from_f16(h);
    }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      double s = 0;
      for (int k = 0; k < K; ++k) s += a[size_t(m) * K + k] * b[size_t(n) * K + k];
      c[size_t(m) * N + n] = s;
    }
  return c;
}
inline double worst(const float* got, const std::vector<double>& want) {
  double w = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    double e = std::fabs(got[i] - want[i]) / (1 + std::fabs(want[i]));
    if (!(e <= w)) w = e;
    if (e != e) return 1e30;
  }
  return w;
}

}  // namespace test
