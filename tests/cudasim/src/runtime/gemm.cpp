// Matrix products on the CPU for the stand-in cuBLAS libraries.
#include "gemm.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

namespace cudasim::blas {
namespace {

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// 8-bit floats with `exponent_bits`; E4M3 has no infinities.
float fp8_to_float(uint8_t bits, int exponent_bits) {
  const int mantissa_bits = 7 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = bits & ((1 << mantissa_bits) - 1);
  const float sign = bits & 0x80 ? -1.f : 1.f;
  if (exponent_bits == 5 && exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent_bits == 4 && (bits & 0x7f) == 0x7f) return NAN;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits);
  return sign * std::ldexp(static_cast<float>(mantissa + (1 << mantissa_bits)), exponent - bias - mantissa_bits);
}
// Rounds a mantissa to the bits that the tensor cores keep.
float round_mantissa(float value, int kept_bits) {
  if (!std::isfinite(value)) return value;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const int drop = 23 - kept_bits;
  bits += (1u << (drop - 1)) - 1 + (bits >> drop & 1);
  bits &= ~((1u << drop) - 1);
  std::memcpy(&value, &bits, 4);
  return value;
}

// c (m x n) = a (m x k) * b (k x n), dense and column-major.
template <class T>
__attribute__((always_inline)) inline void multiply_block(int64_t m, int64_t n, int64_t k, const T* a, const T* b,
                                                          T* c) {
  constexpr int64_t rows = 256, columns = 4;
  for (int64_t j = 0; j < n; j += columns)
    for (int64_t i = 0; i < m; i += rows) {
      const int64_t height = std::min(rows, m - i), width = std::min(columns, n - j);
      T sum[columns][rows] = {};
      for (int64_t p = 0; p < k; ++p) {
        const T* column = a + p * m + i;
        T factor[columns] = {};
        for (int64_t q = 0; q < width; ++q) factor[q] = b[(j + q) * k + p];
        for (int64_t r = 0; r < height; ++r) {
          sum[0][r] += column[r] * factor[0];
          sum[1][r] += column[r] * factor[1];
          sum[2][r] += column[r] * factor[2];
          sum[3][r] += column[r] * factor[3];
        }
      }
      for (int64_t q = 0; q < width; ++q) std::copy_n(sum[q], height, c + (j + q) * m + i);
    }
}
#define CUDASIM_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
CUDASIM_CLONES void multiply(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c) {
  multiply_block(m, n, k, a, b, c);
}
CUDASIM_CLONES void multiply(int64_t m, int64_t n, int64_t k, const double* a, const double* b, double* c) {
  multiply_block(m, n, k, a, b, c);
}
CUDASIM_CLONES void multiply(int64_t m, int64_t n, int64_t k, const int32_t* a, const int32_t* b, int32_t* c) {
  multiply_block(m, n, k, a, b, c);
}

int64_t at(const Matrix& x, int64_t row, int64_t column) {
  return x.row_major ? row * x.ld + column : column * x.ld + row;
}

const char* base_of(const Matrix& x, int64_t batch) {
  if (x.pointers) return static_cast<const char*>(x.pointers[batch]);
  return static_cast<const char*>(x.data) + batch * x.batch_stride * static_cast<int64_t>(size_of(x.type));
}

// op(x) as a dense column-major matrix.
template <class T>
std::vector<T> gather(const Matrix& x, int64_t rows, int64_t columns, int64_t batch, int kept_bits) {
  std::vector<T> out(static_cast<size_t>(rows * columns));
  const char* base = base_of(x, batch);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      T value = static_cast<T>(load(base, x.transposed ? at(x, j, i) : at(x, i, j), x.type));
      if (kept_bits) value = static_cast<T>(round_mantissa(static_cast<float>(value), kept_bits));
      out[static_cast<size_t>(j * rows + i)] = value;
    }
  return out;
}

// Is the whole matrix in one device allocation?
bool inside(const Gemm& g, const char* name, const Matrix& x, int64_t rows, int64_t columns, int64_t batch) {
  if (rows == 0 || columns == 0) return true;
  const bool swap = x.transposed;
  const int64_t last = at(x, (swap ? columns : rows) - 1, (swap ? rows : columns) - 1) + 1;
  const size_t needed = static_cast<size_t>(last) * size_of(x.type), there = cudasim_bytes_at(base_of(x, batch));
  if (needed <= there) return true;
  std::fprintf(
      stderr,
      "cudasim: %s: matrix %s (batch %lld) needs %zu bytes of device memory, its allocation has %zu from there\n",
      g.caller, name, static_cast<long long>(batch), needed, there);
  return false;
}

template <class T>
void run_typed(const Gemm& g, int64_t batch) {
  const int kept_bits = g.compute == compute_32f_fast_tf32 || g.compute == compute_32f_fast_16f ? 10
                        : g.compute == compute_32f_fast_16bf                                    ? 7
                                                                                                : 0;
  std::vector<T> product(static_cast<size_t>(g.m * g.n));
  if (g.k > 0) {
    const auto a = gather<T>(g.a, g.m, g.k, batch, g.a.type == CUDA_R_32F ? kept_bits : 0);
    const auto b = gather<T>(g.b, g.k, g.n, batch, g.b.type == CUDA_R_32F ? kept_bits : 0);
    multiply(g.m, g.n, g.k, a.data(), b.data(), product.data());
  }
  const double beta = g.beta_is_zero ? 0 : load(g.beta, 0, g.scale_type);
  const char* c = base_of(g.c, batch);
  char* d = const_cast<char*>(base_of(g.d, batch));
  for (int64_t j = 0; j < g.n; ++j)
    for (int64_t i = 0; i < g.m; ++i) {
      const double alpha = load(g.alpha, g.alpha_is_vector ? i : 0, g.scale_type) * g.factor;
      double value = alpha * static_cast<double>(product[static_cast<size_t>(j * g.m + i)]);
      if (beta != 0) value += beta * load(c, at(g.c, i, j), g.c.type);
      if (g.epilogue & epilogue_bias) value += load(g.bias, batch * g.bias_stride + i, g.bias_type);
      if (g.epilogue & epilogue_relu) value = std::max(value, 0.0);
      if (g.epilogue & epilogue_gelu)
        value = 0.5 * value * (1 + std::tanh(0.7978845608028654 * (value + 0.044715 * value * value * value)));
      store(d, at(g.d, i, j), g.d.type, value);
    }
}

}  // namespace

cudaDataType scale_type_of(int compute) {
  switch (compute) {
    case compute_16f:
    case compute_16f_pedantic:
      return CUDA_R_16F;
    case compute_64f:
    case compute_64f_pedantic:
      return CUDA_R_64F;
    case compute_32i:
    case compute_32i_pedantic:
      return CUDA_R_32I;
    default:
      return CUDA_R_32F;
  }
}

size_t size_of(cudaDataType type) {
  switch (type) {
    case CUDA_R_64F:
      return 8;
    case CUDA_R_32F:
    case CUDA_R_32I:
      return 4;
    case CUDA_R_16F:
    case CUDA_R_16BF:
      return 2;
    case CUDA_R_8I:
    case CUDA_R_8U:
    case CUDA_R_8F_E4M3:
    case CUDA_R_8F_E5M2:
      return 1;
    default:
      return 0;
  }
}

double load(const void* base, int64_t index, cudaDataType type) {
  switch (type) {
    case CUDA_R_64F:
      return static_cast<const double*>(base)[index];
    case CUDA_R_32F:
      return static_cast<const float*>(base)[index];
    case CUDA_R_16F:
      return static_cast<float>(static_cast<const _Float16*>(base)[index]);
    case CUDA_R_16BF:
      return bf16_to_float(static_cast<const uint16_t*>(base)[index]);
    case CUDA_R_32I:
      return static_cast<const int32_t*>(base)[index];
    case CUDA_R_8I:
      return static_cast<const int8_t*>(base)[index];
    case CUDA_R_8U:
      return static_cast<const uint8_t*>(base)[index];
    case CUDA_R_8F_E4M3:
      return fp8_to_float(static_cast<const uint8_t*>(base)[index], 4);
    case CUDA_R_8F_E5M2:
      return fp8_to_float(static_cast<const uint8_t*>(base)[index], 5);
    default:
      return NAN;
  }
}

void store(void* base, int64_t index, cudaDataType type, double value) {
  const auto clamped = [value](double low, double high) { return std::clamp(std::nearbyint(value), low, high); };
  switch (type) {
    case CUDA_R_64F:
      static_cast<double*>(base)[index] = value;
      break;
    case CUDA_R_32F:
      static_cast<float*>(base)[index] = static_cast<float>(value);
      break;
    case CUDA_R_16F:
      static_cast<_Float16*>(base)[index] = static_cast<_Float16>(static_cast<float>(value));
      break;
    case CUDA_R_16BF:
      static_cast<uint16_t*>(base)[index] = float_to_bf16(static_cast<float>(value));
      break;
    case CUDA_R_32I:
      static_cast<int32_t*>(base)[index] = static_cast<int32_t>(clamped(-2147483648.0, 2147483647.0));
      break;
    case CUDA_R_8I:
      static_cast<int8_t*>(base)[index] = static_cast<int8_t>(clamped(-128, 127));
      break;
    case CUDA_R_8U:
      static_cast<uint8_t*>(base)[index] = static_cast<uint8_t>(clamped(0, 255));
      break;
    default:
      break;
  }
}

Status run(const Gemm& g) {
  if (g.m < 0 || g.n < 0 || g.k < 0 || g.batch < 0) return invalid_value;
  for (const cudaDataType type : {g.a.type, g.b.type, g.c.type, g.d.type, g.scale_type})
    if (size_of(type) == 0) return not_supported;
  if (g.d.type == CUDA_R_8F_E4M3 || g.d.type == CUDA_R_8F_E5M2) return not_supported;
  const bool uses_c = !g.beta_is_zero && load(g.beta, 0, g.scale_type) != 0;
  for (int64_t batch = 0; batch < g.batch; ++batch) {
    if (!inside(g, "A", g.a, g.m, g.k, batch) || !inside(g, "B", g.b, g.k, g.n, batch) ||
        (uses_c && !inside(g, "C", g.c, g.m, g.n, batch)) || !inside(g, "D", g.d, g.m, g.n, batch))
      return execution_failed;
    switch (scale_type_of(g.compute)) {
      case CUDA_R_64F:
        run_typed<double>(g, batch);
        break;
      case CUDA_R_32I:
        run_typed<int32_t>(g, batch);
        break;
      default:
        run_typed<float>(g, batch);
        break;
    }
  }
  return success;
}

Status submit(const Gemm& g) {
  if (!cudasim_begin_work(g.stream)) return run(g);
  struct Recorded {
    Gemm g;
    alignas(16) char alpha[16], beta[16];
  };
  auto* r = new Recorded{g, {}, {}};
  // Factors in host memory are read now, by value.
  const auto hold = [&](const void*& p, char* to) {
    if (!p || cudasim_bytes_at(p)) return;
    std::memcpy(to, p, std::min<size_t>(size_of(g.scale_type), 16));
    p = to;
  };
  hold(r->g.alpha, r->alpha);
  hold(r->g.beta, r->beta);
  const auto again = [](void* p) {
    return run(static_cast<Recorded*>(p)->g) == success ? int(cudaSuccess) : int(cudaErrorLaunchFailure);
  };
  return cudasim_record(g.stream, again, r, [](void* p) { delete static_cast<Recorded*>(p); }) == cudaSuccess
             ? success
             : execution_failed;
}

}  // namespace cudasim::blas
