#define QLORA_ISA scalar  // compiled without flags of a set

#include "cpp/cpu/float64/linear.h"

#include <vector>

#include "cpp/cpu/codec/scales-inl.h"
#include "cpp/cpu/shared/dropout.h"

namespace qlora::cpu::float64 {
namespace {

// As dequantize_nf4 decodes it.
double weight_at(const Weight& w, int64_t i) {
  const int64_t block = i / w.scales.block_size;
  const int code = code_at(w.packed, i, w.bits());
  const float value = is_wide(w.code) ? wide_value(wide_code(w.code), code) : w.table().value[code];
  float scale = 0.0f, offset = 0.0f;
  scalar::read_scales(w.scales, block, 1, &scale);
  if (w.scales.offsets.form == OffsetForm::kZeroPoint8) {
    scalar::read_zero_points(w.scales, block, 1, &offset);
    return double{(value + offset) * scale};
  }
  scalar::read_offsets(w.scales, block, 1, &scale, &offset);
  return double{w.scales.offsets ? value * scale + offset : value * scale};
}

// out [m, r] = factor · dropout(in) · aᵀ, element (j, c) of a at a[j * a_row + c * a_column]. `memory` is made to hold
// it where out is null. Returns out.
const double* low_rank(const Pool& pool, const double* in, int64_t m, int64_t k, const void* a, int64_t r,
                       int64_t a_row, int64_t a_column, double factor, const Dropout& d, void* to,
                       std::vector<double>* memory) {
  if (!to) memory->resize(static_cast<size_t>(m * r));
  double* const out = to ? static_cast<double*>(to) : memory->data();
  const double* weights = static_cast<const double*>(a);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < r; ++j) {
        double sum = 0;
        for (int64_t c = 0; c < k; ++c)
          if (!dropped(d, i * k + c)) sum += in[i * k + c] * weights[j * a_row + c * a_column];
        out[i * r + j] = sum * factor * d.keep_scale;
      }
    }
  };
  pool(m, 1, body);
  return out;
}

}  // namespace

Outcome forward(const Pool& pool, const LinearProblem& p) {
  const int64_t n = p.w.n, k = p.w.k, r = p.lora.rank;
  const double *x = static_cast<const double*>(p.x), *b = static_cast<const double*>(p.lora.b);
  const double* bias = static_cast<const double*>(p.bias);
  double* y = static_cast<double*>(p.y);
  std::vector<double> memory;
  const double* const h = low_rank(pool, x, p.m, k, p.lora.a, r, k, 1, p.lora.scaling, p.lora.dropout, p.h, &memory);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t i = 0; i < p.m; ++i) {
        double sum = bias ? bias[j] : 0;
        for (int64_t c = 0; c < k; ++c) sum += x[i * k + c] * weight_at(p.w, j * k + c);
        for (int64_t q = 0; q < r; ++q) sum += h[i * r + q] * b[j * r + q];
        y[i * n + j] = sum;
      }
    }
  };
  pool(n, 8, body);
  return Outcome::kDone;
}

Outcome dx(const Pool& pool, const LinearDxProblem& p) {
  const int64_t n = p.w.n, k = p.w.k, r = p.lora.rank;
  const double *dy = static_cast<const double*>(p.dy), *a = static_cast<const double*>(p.lora.a);
  double* out = static_cast<double*>(p.dx);
  std::vector<double> memory;
  const double* const g = low_rank(pool, dy, p.m, n, p.lora.b, r, 1, r, p.lora.scaling, Dropout{}, p.g, &memory);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t i = 0; i < p.m; ++i) {
        double sum = 0;
        for (int64_t q = 0; q < r; ++q) sum += g[i * r + q] * a[q * k + c];
        sum = dropped(p.lora.dropout, i * k + c) ? 0 : sum * p.lora.dropout.keep_scale;
        for (int64_t j = 0; j < n; ++j) sum += dy[i * n + j] * weight_at(p.w, j * k + c);
        out[i * k + c] = sum;
      }
    }
  };
  pool(k, 8, body);
  return Outcome::kDone;
}

Outcome dlora(const Pool& pool, const LoraGradProblem& p) {
  const int64_t m = p.m, n = p.n, k = p.k, r = p.lora.rank;
  const Dropout& drop = p.lora.dropout;
  const double *x = static_cast<const double*>(p.x), *dy = static_cast<const double*>(p.dy);
  double *da = static_cast<double*>(p.da), *db = static_cast<double*>(p.db);
  std::vector<double> h_memory, g_memory;
  const double *h = static_cast<const double*>(p.h), *g = static_cast<const double*>(p.g);
  if (!h) h = low_rank(pool, x, m, k, p.lora.a, r, k, 1, p.lora.scaling, drop, nullptr, &h_memory);
  if (!g) g = low_rank(pool, dy, m, n, p.lora.b, r, 1, r, p.lora.scaling, Dropout{}, nullptr, &g_memory);
  auto columns = [&](int64_t begin, int64_t end) {
    for (int64_t q = 0; q < r; ++q) {
      for (int64_t c = begin; c < end; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < m; ++i)
          if (!dropped(drop, i * k + c)) sum += g[i * r + q] * x[i * k + c];
        da[q * k + c] = sum * drop.keep_scale;
      }
    }
  };
  pool(k, 16, columns);
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t q = 0; q < r; ++q) {
        double sum = 0;
        for (int64_t i = 0; i < m; ++i) sum += dy[i * n + j] * h[i * r + q];
        db[j * r + q] = sum;
      }
    }
  };
  pool(n, 16, rows);
  return Outcome::kDone;
}

}  // namespace qlora::cpu::float64
