// LoRA's skinny products for few rows: h = round(scaling · dropout(x) · aᵀ) and g = round(scaling · dy · b), kept as
// float32 with zeros behind the rank, h as [padded rank / kLanes, m, kLanes] and g as [m, padded rank]. Included after
// small_common-inl.h.

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
void dots(const T* x, const T* a, int64_t k, float factor, float* h) {
  constexpr int64_t kChain = 8 * kLanes;  // float32 results should have no larger errors than a library's
  Floats sums[kRows][kColumns];
  unroll<kRows>([&](auto i) { unroll<kColumns>([&](auto j) { sums[i][j] = zero(); }); });
  for (int64_t first = 0; first < k; first += kChain) {
    Floats chain[kRows][kColumns];
    unroll<kRows>([&](auto i) { unroll<kColumns>([&](auto j) { chain[i][j] = zero(); }); });
    for (int64_t c = first; c < k && c < first + kChain; c += kLanes) {
      Floats row[kRows];
      unroll<kRows>([&](auto i) { row[i] = load(x + i * k + c, k - c); });
      unroll<kColumns>([&](auto j) {
        const Floats column = load(a + j * k + c, k - c);
        unroll<kRows>([&](auto i) { chain[i][j] = fma(row[i], column, chain[i][j]); });
      });
    }
    unroll<kRows>([&](auto i) { unroll<kColumns>([&](auto j) { sums[i][j] = add(sums[i][j], chain[i][j]); }); });
  }
  unroll<kRows>(
      [&](auto i) { unroll<kColumns>([&](auto j) { h[i * kLanes + j] = rounded<T>(sum(sums[i][j]) * factor); }); });
}

// A group of kDotRows rows and one of kDotColumns columns: the unit in which h is shared out to threads.
inline constexpr int kDotRows = kLanes == 16 ? 4 : 2;
inline constexpr int kDotColumns = 4;
template <class T>
void lora_h(const Lora& l, const T* x, int64_t m, int64_t k, int64_t row_group, int64_t column_group, float* h) {
  const int64_t i = row_group * kDotRows, j = column_group * kDotColumns;
  const float factor = static_cast<float>(l.scaling * l.dropout.keep_scale);
  with_rows<kDotRows>(m - i < kDotRows ? m - i : kDotRows, [&](auto rows) {
    with_rows<kDotColumns>(l.rank - j < kDotColumns ? l.rank - j : kDotColumns, [&](auto columns) {
      dots<rows, columns>(x + i * k, static_cast<const T*>(l.a) + j * k, k, factor,
                          h + (j / kLanes * m + i) * kLanes + j % kLanes);
    });
  });
}

// g = round(scaling · dy · b), [m, padded rank]. Rows of b are summed in slices whose bounds depend on the shape alone.
template <class T>
void lora_g(const Pool& pool, const LinearDxProblem& p, float* partial, int64_t slices, float* g) {
  const int64_t n = p.w.n, rank = p.lora.rank, padded = padded_rank(rank), per_slice = ceil_div(n, slices);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      float* sums = partial + s * p.m * padded;
      for (int64_t i = 0; i < p.m * padded; i += kLanes) store(sums + i, zero());
      const int64_t last = (s + 1) * per_slice < n ? (s + 1) * per_slice : n;
      for (int64_t row = s * per_slice; row < last; row += 4) {
        const int64_t rows = last - row < 4 ? last - row : 4;
        for (int64_t j = 0; j < rank; j += kLanes) {
          Floats b[4];
          for (int64_t r = 0; r < 4; ++r)
            b[r] = r < rows ? load(static_cast<const T*>(p.lora.b) + (row + r) * rank + j, rank - j) : zero();
          for (int64_t i = 0; i < p.m; ++i) {
            const T* dy = static_cast<const T*>(p.dy) + i * n + row;
            Floats sum = load(sums + i * padded + j);
            for (int64_t r = 0; r < rows; ++r) sum = fma(splat(to_float(dy[r])), b[r], sum);
            store(sums + i * padded + j, sum);
          }
        }
      }
    }
  };
  run(pool, p.m * n * rank > kWorthThreads, slices, 1, body);
  for (int64_t i = 0; i < p.m * padded; ++i) {
    float sum = 0.0f;
    for (int64_t s = 0; s < slices; ++s) sum += partial[s * p.m * padded + i];
    g[i] = rounded<T>(sum * static_cast<float>(p.lora.scaling));
  }
}
