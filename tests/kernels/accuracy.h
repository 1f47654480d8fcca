// The rules of tests/lib/accuracy.py, without Python. Each entry of a result has to be within the bound that its
// operands give. The squared errors of each row, each column and the whole result must not exceed 1.05 times those of
// the formula.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "tests/kernels/numbers.h"

namespace kernels_test {

inline constexpr double kMargin = 1.05, kChance = 3.0, kUnit32 = 0x1p-24, kTiny32 = 0x1p-150;

struct Expected {
  Matrix exact, formula, bound, noise;
};

// One side of a product. If error and noise are empty, it is exact.
struct Operand {
  Matrix exact, formula, error, noise;
};
inline Operand given(const Matrix& m) { return {m, m, {}, {}}; }
inline Operand transposed(const Operand& o) {
  return {transposed(o.exact), transposed(o.formula), transposed(o.error), transposed(o.noise)};
}
inline Operand weight(const Matrix& w, DType dtype) {
  Operand o = {w, w, w, {}};
  for (double& x : o.formula.value) x = rounded(x, dtype);
  for (double& x : o.error.value) x = rounding(x, dtype);
  return o;
}

struct Product {
  Operand a, b;
  Matrix mask;  // empty: 1 everywhere
};

inline double roundings(double terms) { return std::fmin(terms, 64 + terms / 32); }

// The sum of mask * (a · b) over the products, and of `added` unless it is empty, rounded once.
inline Expected sums(const std::vector<Product>& products, const std::vector<double>& added, DType dtype) {
  const int64_t rows = products[0].a.exact.rows, columns = products[0].b.exact.columns;
  Expected e = {Matrix(rows, columns), Matrix(rows, columns), Matrix(rows, columns), Matrix(rows, columns)};
  double terms = 3;
  for (const Product& p : products) terms += static_cast<double>(p.b.exact.rows);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const double plus = added.empty() ? 0.0 : added[j];
      double exact = plus, formula = plus, magnitude = std::fabs(plus), off = 0, squares = plus * plus, noise = 0;
      for (const Product& p : products) {
        const double mask = p.mask.value.empty() ? 1.0 : p.mask.at(i, j);
        if (mask == 0) continue;
        const int64_t depth = p.b.exact.rows;
        double s_exact = 0, s_formula = 0, s_magnitude = 0, s_off = 0, s_squares = 0, s_noise = 0;
        for (int64_t d = 0; d < depth; ++d) {
          const double a = p.a.exact.at(i, d), b = p.b.exact.at(d, j), ab = a * b;
          s_exact += ab, s_magnitude += std::fabs(ab), s_squares += ab * ab;
          s_formula += p.a.formula.at(i, d) * p.b.formula.at(d, j);
          if (!p.a.error.value.empty()) s_off += p.a.error.at(i, d) * std::fabs(b);
          if (!p.b.error.value.empty()) s_off += std::fabs(a) * p.b.error.at(d, j);
          if (!p.a.noise.value.empty()) s_noise += std::pow(p.a.noise.at(i, d) * b, 2);
          if (!p.b.noise.value.empty()) s_noise += std::pow(a * p.b.noise.at(d, j), 2);
        }
        exact += mask * s_exact, formula += mask * s_formula, magnitude += mask * s_magnitude, off += mask * s_off;
        squares += mask * mask * s_squares, noise += mask * mask * s_noise;
      }
      squares += exact * exact;
      const double tiny = magnitude > 0 ? terms * kTiny32 : 0;
      const double before = off + roundings(terms) * kUnit32 * magnitude + tiny;
      e.exact.at(i, j) = exact;
      e.formula.at(i, j) = rounded(formula, dtype);
      e.bound.at(i, j) = before + rounding(std::fabs(exact) + before, dtype);
      e.noise.at(i, j) = std::sqrt(noise + roundings(terms) / 3 * kUnit32 * kUnit32 * squares) + tiny;
    }
  }
  return e;
}

// h or g: scaling * (x · a), rounded once.
inline Expected low_rank(const Matrix& x, Matrix a, double scaling, DType dtype) {
  for (double& v : a.value) v *= scaling;
  return sums({{given(x), given(a), {}}}, {}, dtype);
}
inline Operand as_operand(const Expected& e) { return {e.exact, e.formula, e.bound, e.noise}; }

// Says which rule `out` breaks, or is empty.
inline std::string failure(const Matrix& out, const Expected& e) {
  const int64_t rows = out.rows, columns = out.columns, count = rows * columns;
  std::vector<double> error(count);
  for (int64_t i = 0; i < count; ++i) {
    error[i] = std::fabs(out.value[i] - e.exact.value[i]);
    if (!std::isfinite(error[i])) error[i] = std::numeric_limits<double>::infinity();
    if (error[i] > e.bound.value[i]) {
      return "entry [" + std::to_string(i / columns) + ", " + std::to_string(i % columns) + "] is " +
             std::to_string(out.value[i]) + ", exact " + std::to_string(e.exact.value[i]) + ", error over bound " +
             std::to_string(error[i] / e.bound.value[i]);
    }
  }
  double largest_bound = 1e-300;
  for (const double bound : e.bound.value) largest_bound = std::fmax(largest_bound, bound);
  for (const bool each : {false, true}) {
    // For each row, each column and the whole: by how much the squared errors exceed what is allowed, and their
    // squares.
    std::vector<double> of_row(rows), of_column(columns), row_squares(rows), column_squares(columns);
    double of_all = 0, all_squares = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const double bound = e.bound.at(i, j), by = each ? (bound > 0 ? bound : 1.0) : largest_bound;
        const double formula = (e.formula.at(i, j) - e.exact.at(i, j)) / by, noise = e.noise.at(i, j) / by;
        const double scaled = error[i * columns + j] / by;
        const double excess = scaled * scaled - kMargin * kMargin * formula * formula - noise * noise;
        of_row[i] += excess, row_squares[i] += excess * excess;
        of_column[j] += excess, column_squares[j] += excess * excess;
        of_all += excess, all_squares += excess * excess;
      }
    }
    const auto exceeds = [](double excess, double squares) { return excess > kChance * std::sqrt(squares); };
    const std::string how = each ? ", each by its bound, is beyond 1.05 times the formula's error"
                                 : " is beyond 1.05 times the formula's error";
    for (int64_t i = 0; i < rows; ++i)
      if (exceeds(of_row[i], row_squares[i])) return "row " + std::to_string(i) + how;
    for (int64_t j = 0; j < columns; ++j)
      if (exceeds(of_column[j], column_squares[j])) return "column " + std::to_string(j) + how;
    if (exceeds(of_all, all_squares)) return "all" + how;
  }
  return "";
}

}  // namespace kernels_test
