// Matrices of doubles, random numbers, and their conversion to the operators' types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpp/format/dtypes.h"

namespace kernels_test {

using namespace qlora;

// Row-major.
struct Matrix {
  int64_t rows = 0, columns = 0;
  std::vector<double> value;

  Matrix() = default;
  Matrix(int64_t rows_, int64_t columns_) : rows(rows_), columns(columns_), value(rows_ * columns_) {}
  double& at(int64_t i, int64_t j) { return value[i * columns + j]; }
  double at(int64_t i, int64_t j) const { return value[i * columns + j]; }
};

inline Matrix transposed(const Matrix& m) {
  Matrix t(m.columns, m.rows);
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.columns; ++j) t.at(j, i) = m.at(i, j);
  return t;
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {  // SplitMix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  double uniform() { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; }
  double normal() { return std::sqrt(-2.0 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()); }

 private:
  uint64_t state_;
};

// A double, rounded to a type.
inline double rounded(double x, DType dtype) {
  const float f = static_cast<float>(x);
  switch (dtype) {
    case DType::kFloat64:
      return x;
    case DType::kBFloat16: {
      bfloat16 b;
      from_float(f, &b);
      return to_float(b);
    }
    case DType::kFloat16: {
      float16 h;
      from_float(f, &h);
      return to_float(h);
    }
    default:
      return f;
  }
}

// The most by which rounding to the type changes a number.
inline double rounding(double x, DType dtype) {
  const double unit = dtype == DType::kBFloat16 ? 0x1p-8 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-24;
  const double least = dtype == DType::kFloat16 ? 0x1p-24 : dtype == DType::kBFloat16 ? 0x1p-133 : 0x1p-149;
  return x == 0 ? 0 : std::fmax(unit * std::fabs(x), least / 2);
}

// A matrix in the type that an operator takes and gives, with a fence after it.
class Tensor {
 public:
  Tensor(DType dtype, int64_t rows, int64_t columns)
      : dtype_(dtype),
        rows_(rows),
        columns_(columns),
        bytes_(rows * columns * dtype_bytes(dtype) + kFence, kUntouched) {}
  Tensor(DType dtype, const Matrix& m) : Tensor(dtype, m.rows, m.columns) {
    for (size_t i = 0; i < m.value.size(); ++i) set(i, m.value[i]);
  }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  Matrix matrix() const {
    Matrix m(rows_, columns_);
    for (size_t i = 0; i < m.value.size(); ++i) m.value[i] = get(i);
    return m;
  }
  bool operator==(const Tensor& other) const { return bytes_ == other.bytes_; }
  // Whether nothing has been written to the fence.
  bool intact() const {
    for (size_t i = bytes_.size() - kFence; i < bytes_.size(); ++i)
      if (bytes_[i] != kUntouched) return false;
    return true;
  }

 private:
  static constexpr size_t kFence = 64;  // bytes
  static constexpr uint8_t kUntouched = 0xA5;

  void set(size_t i, double x) {
    uint8_t* const to = bytes_.data() + i * dtype_bytes(dtype_);
    if (dtype_ == DType::kFloat64) {
      std::memcpy(to, &x, 8);
    } else if (dtype_ == DType::kFloat32) {
      const float f = static_cast<float>(x);
      std::memcpy(to, &f, 4);
    } else if (dtype_ == DType::kBFloat16) {
      bfloat16 b;
      from_float(static_cast<float>(x), &b);
      std::memcpy(to, &b, 2);
    } else {
      float16 h;
      from_float(static_cast<float>(x), &h);
      std::memcpy(to, &h, 2);
    }
  }
  double get(size_t i) const {
    const uint8_t* const from = bytes_.data() + i * dtype_bytes(dtype_);
    if (dtype_ == DType::kFloat64) {
      double x;
      std::memcpy(&x, from, 8);
      return x;
    }
    if (dtype_ == DType::kFloat32) {
      float f;
      std::memcpy(&f, from, 4);
      return f;
    }
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    return dtype_ == DType::kBFloat16 ? to_float(bfloat16{bits}) : to_float(float16{bits});
  }

  DType dtype_;
  int64_t rows_, columns_;
  std::vector<uint8_t> bytes_;
};

}  // namespace kernels_test
