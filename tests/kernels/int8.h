// What Activations::kInt8 asks of the linear operators: x (dX: dy · scale) rounded to int8, met by W's codes as int8.
#pragma once

#include <cmath>
#include <vector>

#include "cpp/cpu/dispatch.h"
#include "cpp/format/code_tables.h"
#include "cpp/format/problem.h"
#include "tests/kernels/accuracy.h"
#include "tests/kernels/numbers.h"
#include "tests/kernels/pools.h"

namespace kernels_test {

// The integers of rows that are rounded in segments, and the unit of each.
struct Int8Rows {
  Matrix integer, unit;

  explicit Int8Rows(const Matrix& x) : integer(x), unit(x) {
    for (int64_t row = 0; row < x.rows; ++row) {
      for (int64_t first = 0; first < x.columns; first += kInt8Segment) {
        const int64_t last = first + kInt8Segment < x.columns ? first + kInt8Segment : x.columns;
        float largest = 0.0f;
        for (int64_t i = first; i < last; ++i)
          largest = std::fmax(largest, std::fabs(static_cast<float>(x.at(row, i))));
        const float factor = largest < 0x1p-100f ? 0x1p60f : 1.0f, scaled = largest * factor;
        const float inverse = scaled > 0.0f ? 127.0f / scaled : 0.0f;
        for (int64_t i = first; i < last; ++i) {
          integer.at(row, i) = std::nearbyint(static_cast<float>(x.at(row, i)) * factor * inverse);
          unit.at(row, i) = scaled / 127.0f / factor;
        }
      }
    }
  }
  // The rounded rows, with units times `factor`, in float32.
  Matrix values(float factor = 1.0f) const {
    Matrix out = integer;
    for (size_t i = 0; i < out.value.size(); ++i)
      out.value[i] *= static_cast<double>(static_cast<float>(unit.value[i]) * factor);
    return out;
  }
};

// A weight's integers, and the scale and offset of each.
struct Int8Weight {
  Matrix integer, scale, offset;
  double per_one;
  int64_t group;  // columns under one scale per row in dX

  Int8Weight(const Weight& w, const Matrix& decoded)
      : integer(decoded),
        scale(decoded),
        offset(decoded),
        per_one(int8_codes(w.code).per_one),
        group(w.scales.block_size < kInt8Segment ? w.scales.block_size : kInt8Segment) {
    std::vector<float> scales(ceil_div(w.n * w.k, w.scales.block_size));
    cpu::scalar_kernels().codec->dequantize_absmax(kOneThread, w.scales, static_cast<int64_t>(scales.size()),
                                                   scales.data());
    for (int64_t i = 0; i < w.n * w.k; ++i) {
      const int code = code_at(w.packed, i);
      integer.value[i] = int8_codes(w.code).value[code], scale.value[i] = scales[i / w.scales.block_size];
      offset.value[i] = w.scales.offsets ? decoded.value[i] - w.table().value[code] * scale.value[i] : 0.0;
    }
  }
  float one() const { return static_cast<float>(1.0 / per_one); }
  Matrix values() const {
    Matrix out = offset;
    for (size_t i = 0; i < out.value.size(); ++i) out.value[i] += integer.value[i] / per_one * scale.value[i];
    return out;
  }
};

// Multiples of a 32767th of the largest magnitude, or zeros where that is below 2^-48 or above 2^62.
struct Fractions {
  float largest = 0.0f;
  std::vector<int32_t> of;

  explicit Fractions(const std::vector<float>& values) : of(values.size()) {
    for (const float x : values) largest = std::fmax(largest, std::fabs(x));
    if (!(largest >= 0x1p-48f && largest <= 0x1p62f)) return;
    const float inverse = 32767.0f / largest;
    for (size_t i = 0; i < values.size(); ++i) of[i] = static_cast<int32_t>(std::nearbyint(values[i] * inverse));
  }
};
inline int32_t product_of_fractions(int32_t a, int32_t b) { return (a * b + 16384) >> 15; }

// dy · scale of the group of columns that begins at `column`, rounded: by fractions, unless their products are small.
inline Int8Rows rounded_dy(const Matrix& dy, const Int8Weight& w, int64_t column) {
  Matrix scaled = dy;
  for (int64_t t = 0; t < dy.rows; ++t)
    for (int64_t row = 0; row < dy.columns; ++row)
      scaled.at(t, row) = static_cast<float>(dy.at(t, row)) * static_cast<float>(w.scale.at(row, column));
  Int8Rows rounded(scaled);
  for (int64_t first = 0; first < dy.columns; first += kInt8Segment) {
    const int64_t rows = dy.columns - first < kInt8Segment ? dy.columns - first : kInt8Segment;
    std::vector<float> values(rows);
    for (int64_t i = 0; i < rows; ++i) values[i] = static_cast<float>(w.scale.at(first + i, column));
    const Fractions scales(values);
    for (int64_t t = 0; t < dy.rows; ++t) {
      for (int64_t i = 0; i < rows; ++i) values[i] = static_cast<float>(dy.at(t, first + i));
      const Fractions fractions(values);
      std::vector<int32_t> products(rows);
      int32_t largest = 0;
      for (int64_t i = 0; i < rows; ++i) {
        products[i] = product_of_fractions(fractions.of[i], scales.of[i]);
        largest = products[i] > largest ? products[i] : -products[i] > largest ? -products[i] : largest;
      }
      if (largest < 4096) continue;
      const int32_t factor = 127 * 32768 / largest;
      const float unit = static_cast<float>(32768.0 * 32768.0 / (32767.0 * 32767.0)) * scales.largest *
                         fractions.largest / static_cast<float>(factor);
      for (int64_t i = 0; i < rows; ++i) {
        rounded.integer.at(t, first + i) = product_of_fractions(products[i], factor);
        rounded.unit.at(t, first + i) = unit;
      }
    }
  }
  return rounded;
}
// The products whose sum is dx. Beside offsets, codes are counted from their middle, and dy meets what that leaves.
inline std::vector<Product> int8_dx_products(const Matrix& dy, const Int8Weight& w, const Weight& weight) {
  const Int8CodeTable& codes = int8_codes(weight.code);
  const int middle = weight.scales.offsets ? (codes.least + codes.most + 1) / 2 : 0;
  std::vector<Product> products;
  for (int64_t first = 0; first < weight.k; first += w.group) {
    Matrix of_group(weight.n, weight.k);
    for (int64_t row = 0; row < weight.n; ++row)
      for (int64_t i = first; i < first + w.group; ++i) of_group.at(row, i) = w.integer.at(row, i) - middle;
    products.push_back({given(rounded_dy(dy, w, first).values(w.one())), given(of_group), {}});
  }
  if (weight.scales.offsets) {
    Matrix offset = w.offset;
    for (size_t i = 0; i < offset.value.size(); ++i) offset.value[i] += middle / w.per_one * w.scale.value[i];
    products.push_back({given(dy), given(offset), {}});
  }
  return products;
}

// y and dx bit for bit, without low rank, bias and offsets: the order of the sums is part of the contract. Plain C++
// does not fuse a product and a sum, every other set does.
inline float multiply_add(float a, float b, float c, bool fused) { return fused ? std::fmaf(a, b, c) : a * b + c; }
inline Matrix int8_forward_bits(const Matrix& x, const Int8Weight& w, bool fused) {
  const Int8Rows rounded(x);
  Matrix y(x.rows, w.integer.rows);
  for (int64_t t = 0; t < y.rows; ++t) {
    for (int64_t row = 0; row < y.columns; ++row) {
      float total = 0.0f;
      for (int64_t first = 0; first < x.columns; first += w.group) {
        double sum = 0;
        for (int64_t i = first; i < first + w.group; ++i) sum += rounded.integer.at(t, i) * w.integer.at(row, i);
        const float scale = static_cast<float>(w.scale.at(row, first)) * w.one();
        total =
            multiply_add(static_cast<float>(sum) * scale, static_cast<float>(rounded.unit.at(t, first)), total, fused);
      }
      y.at(t, row) = total;
    }
  }
  return y;
}
inline Matrix int8_dx_bits(const Matrix& dy, const Int8Weight& w, bool fused) {
  Matrix dx(dy.rows, w.integer.columns);
  for (int64_t group = 0; group < dx.columns; group += w.group) {
    const Int8Rows rounded = rounded_dy(dy, w, group);
    for (int64_t t = 0; t < dx.rows; ++t) {
      for (int64_t column = group; column < group + w.group; ++column) {
        float total = 0.0f;
        for (int64_t first = 0; first < dy.columns; first += kInt8Segment) {
          double sum = 0;
          for (int64_t row = first; row < first + kInt8Segment && row < dy.columns; ++row)
            sum += rounded.integer.at(t, row) * w.integer.at(row, column);
          const float unit = static_cast<float>(rounded.unit.at(t, first)) * w.one();
          total = multiply_add(static_cast<float>(sum), unit, total, fused);
        }
        dx.at(t, column) = total;
      }
    }
  }
  return dx;
}

}  // namespace kernels_test
