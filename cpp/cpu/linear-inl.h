// The fused linear layer and its gradients. Included inside an anonymous namespace, once an instruction set, after
// codec-inl.h.

inline double to_float(double x) { return x; }
inline void from_float(double x, double* out) { *out = x; }
using qlora::from_float;
using qlora::to_float;

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

// Weights are decoded to float32 and rounded once to the compute dtype.
template <class T>
inline typename AccumulatorOf<T>::type weight_at(const Weight& w, int64_t i) {
  T rounded;
  from_float(kNf4.value[nf4_code_at(w.packed, i)] * scale_at(w.scales, i / w.scales.block_size), &rounded);
  return to_float(rounded);
}

inline bool dropped(const Dropout& d, int64_t index) {
  return d.active() && !d.keeps(philox4x32_10(d.seed, static_cast<uint64_t>(index) >> 2).lane[index & 3]);
}

// out [m, r] = round(factor · in · aᵀ), a [r, k]; with dropout on `in` where its mask is active.
template <class T>
void project(const Pool& pool, const T* in, int64_t m, int64_t k, const T* a, int64_t r, int64_t a_row, int64_t a_col,
             double factor, const Dropout& d, T* out) {
  using A = typename AccumulatorOf<T>::type;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < r; ++j) {
        A sum = 0;
        for (int64_t c = 0; c < k; ++c)
          if (!dropped(d, i * k + c)) sum += to_float(in[i * k + c]) * to_float(a[j * a_row + c * a_col]);
        from_float(static_cast<A>(sum * factor * d.keep_scale), &out[i * r + j]);
      }
    }
  };
  pool(m, 1, body);
}

template <class T>
T* scratch(int64_t count) {
  return static_cast<T*>(__builtin_malloc(static_cast<size_t>(count > 0 ? count : 1) * sizeof(T)));
}

template <class T>
T* lora_h(const Pool& pool, const Lora& l, const T* x, int64_t m, int64_t k) {
  T* h = scratch<T>(m * l.rank);
  project(pool, x, m, k, static_cast<const T*>(l.a), l.rank, k, 1, l.scaling, l.dropout, h);
  return h;
}

template <class T>
T* lora_g(const Pool& pool, const Lora& l, const T* dy, int64_t m, int64_t n) {
  T* g = scratch<T>(m * l.rank);
  project(pool, dy, m, n, static_cast<const T*>(l.b), l.rank, 1, l.rank, l.scaling, Dropout{}, g);
  return g;
}

template <class T>
void linear(const Pool& pool, const LinearProblem& p) {
  using A = typename AccumulatorOf<T>::type;
  const int64_t m = p.m, n = p.w.n, k = p.w.k, r = p.lora.rank;
  const T* x = static_cast<const T*>(p.x);
  const T* b = static_cast<const T*>(p.lora.b);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  T* h = lora_h(pool, p.lora, x, m, k);
  auto body = [&](int64_t begin, int64_t end) {
    constexpr int64_t kTileM = 32, kTileK = 512;
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t i0 = 0; i0 < m; i0 += kTileM) {
        const int64_t rows = m - i0 < kTileM ? m - i0 : kTileM;
        A sum[kTileM] = {}, w[kTileK];
        for (int64_t c0 = 0; c0 < k; c0 += kTileK) {
          const int64_t cols = k - c0 < kTileK ? k - c0 : kTileK;
          for (int64_t c = 0; c < cols; ++c) w[c] = weight_at<T>(p.w, j * k + c0 + c);
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < cols; ++c) sum[i] += to_float(x[(i0 + i) * k + c0 + c]) * w[c];
        }
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t q = 0; q < r; ++q) sum[i] += to_float(h[(i0 + i) * r + q]) * to_float(b[j * r + q]);
          if (bias) sum[i] += to_float(bias[j]);
          from_float(sum[i], &y[(i0 + i) * n + j]);
        }
      }
    }
  };
  pool(n, 8, body);
  __builtin_free(h);
}

template <class T>
void linear_dx(const Pool& pool, const LinearDxProblem& p) {
  using A = typename AccumulatorOf<T>::type;
  const int64_t m = p.m, n = p.w.n, k = p.w.k, r = p.lora.rank;
  const T* dy = static_cast<const T*>(p.dy);
  const T* a = static_cast<const T*>(p.lora.a);
  T* dx = static_cast<T*>(p.dx);
  T* g = lora_g(pool, p.lora, dy, m, n);
  constexpr int64_t kTileM = 16, kTileK = 64;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t c0 = tile * kTileK, cols = k - c0 < kTileK ? k - c0 : kTileK;
      for (int64_t i0 = 0; i0 < m; i0 += kTileM) {
        const int64_t rows = m - i0 < kTileM ? m - i0 : kTileM;
        A sum[kTileM][kTileK] = {}, w[kTileK];
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t c = 0; c < cols; ++c) {
            for (int64_t q = 0; q < r; ++q) sum[i][c] += to_float(g[(i0 + i) * r + q]) * to_float(a[q * k + c0 + c]);
            sum[i][c] = dropped(p.lora.dropout, (i0 + i) * k + c0 + c) ? 0 : sum[i][c] * p.lora.dropout.keep_scale;
          }
        }
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t c = 0; c < cols; ++c) w[c] = weight_at<T>(p.w, j * k + c0 + c);
          for (int64_t i = 0; i < rows; ++i) {
            const A gradient = to_float(dy[(i0 + i) * n + j]);
            for (int64_t c = 0; c < cols; ++c) sum[i][c] += gradient * w[c];
          }
        }
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t c = 0; c < cols; ++c) from_float(sum[i][c], &dx[(i0 + i) * k + c0 + c]);
      }
    }
  };
  pool(ceil_div(k, kTileK), 1, body);
  __builtin_free(g);
}

template <class T>
void lora_gradients(const Pool& pool, const LoraGradProblem& p) {
  using A = typename AccumulatorOf<T>::type;
  const int64_t m = p.m, n = p.n, k = p.k, r = p.lora.rank;
  const T* x = static_cast<const T*>(p.x);
  const T* dy = static_cast<const T*>(p.dy);
  T* da = static_cast<T*>(p.da);
  T* db = static_cast<T*>(p.db);
  T* h = lora_h(pool, p.lora, x, m, k);
  T* g = lora_g(pool, p.lora, dy, m, n);
  auto columns = [&](int64_t begin, int64_t end) {
    for (int64_t q = 0; q < r; ++q) {
      for (int64_t c = begin; c < end; ++c) {
        A sum = 0;
        for (int64_t i = 0; i < m; ++i)
          if (!dropped(p.lora.dropout, i * k + c)) sum += to_float(g[i * r + q]) * to_float(x[i * k + c]);
        from_float(static_cast<A>(sum * p.lora.dropout.keep_scale), &da[q * k + c]);
      }
    }
  };
  pool(k, 16, columns);
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t q = 0; q < r; ++q) {
        A sum = 0;
        for (int64_t i = 0; i < m; ++i) sum += to_float(dy[i * n + j]) * to_float(h[i * r + q]);
        from_float(sum, &db[j * r + q]);
      }
    }
  };
  pool(n, 16, rows);
  __builtin_free(h);
  __builtin_free(g);
}

#define QLORA_BY_DTYPE(function)          \
  switch (p.dtype) {                      \
    case DType::kFloat32:                 \
      return function<float>(pool, p);    \
    case DType::kBFloat16:                \
      return function<bfloat16>(pool, p); \
    case DType::kFloat16:                 \
      return function<float16>(pool, p);  \
    case DType::kFloat64:                 \
      return function<double>(pool, p);   \
  }

void linear_nf4(const Pool& pool, const LinearProblem& p) { QLORA_BY_DTYPE(linear) }
void linear_nf4_dx(const Pool& pool, const LinearDxProblem& p) { QLORA_BY_DTYPE(linear_dx) }
void linear_nf4_dlora(const Pool& pool, const LoraGradProblem& p) { QLORA_BY_DTYPE(lora_gradients) }
#undef QLORA_BY_DTYPE
