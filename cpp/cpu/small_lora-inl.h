// LoRA's skinny products for few rows: h = round(scaling · dropout(x) · aᵀ) and g = round(scaling · dy · b), kept as
// float32 [m, padded rank] with zeros behind the rank. Included after small_common-inl.h.

inline int64_t padded_rank(int64_t rank) { return ceil_div(rank, kLanes) * kLanes; }

// x with what dropout drops set to zero. `first_row` is the row of the whole x that row 0 here is.
template <class T>
void drop(const Dropout& d, const T* x, int64_t m, int64_t k, int64_t first_row, T* out) {
  for (int64_t i = 0; i < m * k; ++i) {
    const uint64_t index = static_cast<uint64_t>(first_row * k + i);
    out[i] = d.keeps(philox4x32_10(d.seed, index >> 2).lane[index & 3]) ? x[i] : T{};
  }
}

// kRows x kColumns dot products of length k.
template <int kRows, int kColumns, class T>
void dots(const T* x, const T* a, int64_t k, float factor, float* h, int64_t h_stride) {
  Floats sums[kRows][kColumns];
  unroll<kRows>([&](auto i) { unroll<kColumns>([&](auto j) { sums[i][j] = zero(); }); });
  for (int64_t c = 0; c < k; c += kLanes) {
    Floats row[kRows];
    unroll<kRows>([&](auto i) { row[i] = load(x + i * k + c, k - c); });
    unroll<kColumns>([&](auto j) {
      const Floats column = load(a + j * k + c, k - c);
      unroll<kRows>([&](auto i) { sums[i][j] = fma(row[i], column, sums[i][j]); });
    });
  }
  unroll<kRows>(
      [&](auto i) { unroll<kColumns>([&](auto j) { h[i * h_stride + j] = rounded<T>(sum(sums[i][j]) * factor); }); });
}

// Row group `i` of kGroup rows and column group `j` of four: the unit in which h is shared out to threads.
inline constexpr int kDotRows = kLanes == 16 ? 4 : 2;
inline constexpr int kDotColumns = 4;
template <class T>
void lora_h(const Lora& l, const T* x, int64_t m, int64_t k, int64_t row_group, int64_t column_group, float* h) {
  const int64_t i = row_group * kDotRows, j = column_group * kDotColumns;
  const float factor = static_cast<float>(l.scaling * l.dropout.keep_scale);
  with_rows<kDotRows>(m - i < kDotRows ? m - i : kDotRows, [&](auto rows) {
    with_rows<kDotColumns>(l.rank - j < kDotColumns ? l.rank - j : kDotColumns, [&](auto columns) {
      dots<rows, columns>(x + i * k, static_cast<const T*>(l.a) + j * k, k, factor, h + i * padded_rank(l.rank) + j,
                          padded_rank(l.rank));
    });
  });
}
