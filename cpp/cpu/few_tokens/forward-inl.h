// y = x · wᵀ + h · bᵀ + bias for few rows of x: every packed byte is read once, decoded in registers and met with all
// rows of x. Included after small_common-inl.h and small_lora-inl.h.
//
// A tile is kTileRows rows of W of one shift (rows n, n + period, ...). For each row of the tile and of x one vector of
// partial sums is kept; at the end of the tile kTileRows of them are summed at once into kTileRows outputs.

inline constexpr int kTileRows = kLanes;
inline constexpr int64_t kChunkBytes = kChunk / 2;

// How a chunk of codes meets x, with x arranged in the order in which codes are decoded. `arrange` takes a block of x,
// up to 1024 values in memory order, to a chunk every `stride` elements, and says what sums are to be multiplied by.
// Whatever x is, no product x * w may be off by more than a rounding of w to the dtype of x would make it: arrange
// returns false where it cannot promise that, and the call is left to another kernel (Outcome::kUneven).

// The largest |x| of a block, by its bits: a NaN counts as larger than everything.
inline uint32_t largest_bits(const float* x, int64_t count) {
  Ints seen = round_to_ints(zero());
  for (int64_t c = 0; c < count; c += kLanes) seen = max_bits(seen, load(x + c));
  uint32_t bits[kLanes], largest = 0;
  __builtin_memcpy(bits, &seen, sizeof(bits));
  for (uint32_t b : bits) largest = b > largest ? b : largest;
  return largest;
}
inline constexpr uint32_t kInfinityBits = 0x7F800000u;
constexpr uint32_t power_of_two_bits(int exponent) { return static_cast<uint32_t>(127 + exponent) << 23; }

// x rounded to 15 bits of the largest value of its block and multiplied by integer codes, exactly in int32 over a
// lane's eight weights: an eighth of a float32 decode's work.
//
// A value is then off by up to largest / 65534, 0.29 of that step in the mean square. In T a product is allowed a
// rounding of w, 0.42 of a unit 2^-8 (bfloat16) or 2^-11 (float16) of |x w| in the mean square. So it serves where most
// values are no smaller than largest / kSpread: at the worst, 5/8 of the values that small and the others next to
// nothing, the two squares are 7.6e-11 and 9.6e-11 of largest² w² a value. Numbers from N(0, 1), the
// largest of 1024 of which is 3 to 5, are far from it. A block with an outlier goes elsewhere, and so does one whose
// values are so small or large that factors would leave float32's range.
template <class T, class Order>
struct IntProducts {
  using X = int16_t;
  static constexpr int kMaxRows = kMaxIntRows, kMaxPairedRows = kMaxPairedIntRows;
  static constexpr bool kMayOverflow = true;  // where scales are beyond 2^90, though y is finite
  static constexpr float kSpread = kMantissaBits<T> == 7 ? 128.0f : 16.0f;

  IntCodebook book{kIntCodes.value};
  using Codes = IntCodes;
  Codes codes(Ints chunk) const { return decode(chunk, book, Order{}); }

  // product[w] = a chunk of row w of W · the same chunk of a row of x, lane by lane
  template <int kWeightRows>
  static void multiply(const Codes (&codes)[kWeightRows], const X* x, Floats (&product)[kWeightRows]) {
    Ints sum[kWeightRows];
    unroll<4>([&](auto s) {
      const int16_t* const at = x + s * 2 * kLanes;
      const Ints x_s = kWeightRows > 1 ? load_pairs_once(at) : load_pairs(at);
      unroll<kWeightRows>([&](auto w) {
        if constexpr (s == 0)
          sum[w] = dot(codes[w].v[s], x_s);
        else
          sum[w] = dot(sum[w], codes[w].v[s], x_s);
      });
    });
    unroll<kWeightRows>([&](auto w) { product[w] = to_floats(sum[w]); });
  }

  static bool arrange(const float* x, int64_t chunks, int64_t stride, X* out, float* scale) {
    const uint32_t bits = largest_bits(x, chunks * kChunk);
    if (bits == 0) {
      *scale = 0.0f;
    } else if (bits < power_of_two_bits(-60) || bits > power_of_two_bits(60)) {
      return false;
    } else {
      const float largest = bits_float(bits);
      int64_t large = 0, nonzero = 0;
      for (int64_t c = 0; c < chunks * kChunk; c += kLanes) {
        large += count_at_least(load(x + c), largest / kSpread);
        nonzero += count_at_least(load(x + c), bits_float(1));
      }
      if (8 * large < 5 * nonzero) return false;
      *scale = static_cast<float>(largest / (32767.0 * kIntCodes.per_one));
    }
    const Floats inverse = splat(bits ? 32767.0f / bits_float(bits) : 0.0f);
    for (int64_t c = 0; c < chunks; ++c) {
      Ints rounded_x[kLaneWeights];
      for (int i = 0; i < kLaneWeights; ++i)
        rounded_x[i] = round_to_ints(mul(load(x + c * kChunk + i * kLanes), inverse));
      store_in_code_order(rounded_x, out + c * stride, Order{});
    }
    return true;
  }
};

#if QLORA_BF16_DOT
// bfloat16 as it is, times codes rounded to bfloat16: less than rounding w would cost, for every x (int_codes.h).
struct Bf16Products {
  using X = int16_t;
  static constexpr int kMaxRows = kMaxIntRows, kMaxPairedRows = kMaxPairedIntRows;
  static constexpr bool kMayOverflow = false;

  IntCodebook book{kBf16Codes.value};
  using Codes = IntCodes;
  Codes codes(Ints chunk) const { return decode(chunk, book, LaneOrder{}); }

  template <int kWeightRows>
  static void multiply(const Codes (&codes)[kWeightRows], const X* x, Floats (&product)[kWeightRows]) {
    unroll<kWeightRows>([&](auto w) { product[w] = zero(); });
    unroll<4>([&](auto s) {
      const int16_t* const at = x + s * 2 * kLanes;
      const Ints x_s = kWeightRows > 1 ? load_pairs_once(at) : load_pairs(at);
      unroll<kWeightRows>([&](auto w) { product[w] = dot_bf16(product[w], codes[w].v[s], x_s); });
    });
  }

  // Multiplied by the power of two that takes the largest value to 2^-8, since the dot product knows no subnormals, and
  // its sums times a scale of W should not overflow where y does not.
  static bool arrange(const float* x, int64_t chunks, int64_t stride, X* out, float* scale) {
    const uint32_t bits = largest_bits(x, chunks * kChunk);
    const bool as_it_is = bits == 0 || bits >= kInfinityBits;
    int exponent = as_it_is ? 0 : __builtin_ilogbf(bits_float(bits)) + 8;
    if (exponent > 126) exponent = 126;  // of a float32
    // In two steps, for the smallest subnormal needs a factor of 2^125 and more.
    const Floats half = splat(__builtin_ldexpf(1.0f, -(exponent / 2)));
    const Floats rest = splat(__builtin_ldexpf(1.0f, exponent / 2 - exponent));
    for (int64_t c = 0; c < chunks; ++c) {
      Ints halves[kLaneWeights];
      for (int i = 0; i < kLaneWeights; ++i)
        halves[i] = upper_halves(mul(mul(load(x + c * kChunk + i * kLanes), half), rest));
      store_in_code_order(halves, out + c * stride, LaneOrder{});
    }
    *scale = static_cast<float>(__builtin_ldexp(1.0 / kBf16Codes.per_one, exponent));
    return true;
  }
};
#endif

// float32 products, which are exact but for float32's own roundings.
struct FloatProducts {
  using X = float;
  static constexpr int kMaxRows = kMaxFloatRows, kMaxPairedRows = 0;
  static constexpr bool kMayOverflow = false;

  FloatCodebook book{kNf4.value};
  using Codes = FloatCodes;
  Codes codes(Ints chunk) const { return decode(chunk, book); }

  template <int kWeightRows>
  static void multiply(const Codes (&codes)[kWeightRows], const X* x, Floats (&product)[kWeightRows]) {
    unroll<kWeightRows>([&](auto w) {
      product[w] = mul(codes[w].v[0], load(x));
      unroll<kLaneWeights - 1>(
          [&](auto s) { product[w] = fma(codes[w].v[s + 1], load(x + (s + 1) * kLanes), product[w]); });
    });
  }

  static bool arrange(const float* x, int64_t chunks, int64_t stride, X* out, float* scale) {
    // Eight products are summed before a scale of W makes them small.
    const uint32_t bits = largest_bits(x, chunks * kChunk);
    const bool huge = bits > power_of_two_bits(100) && bits < kInfinityBits;
    const float factor = huge ? 0x1p-20f : 1.0f;
    for (int64_t c = 0; c < chunks; ++c)
      for (int s = 0; s < kLaneWeights; ++s)
        for (int lane = 0; lane < kLanes; ++lane)
          out[c * stride + s * kLanes + lane] = x[c * kChunk + lane * kLaneWeights + (s ^ 1)] * factor;
    *scale = 1.0f / factor;
    return true;
  }
};

// Rows of x go through the kernel in groups of equal size, as many as the registers can sum.
struct RowGroups {
  int64_t m, count;
  RowGroups(int64_t m_, int max_rows) : m(m_), count(ceil_div(m_, max_rows)) {}
  int64_t first(int64_t group) const { return m * group / count; }
  int64_t rows(int64_t group) const { return first(group + 1) - first(group); }
};

template <class Products>
struct ForwardPlan {
  Rows rows;
  RowGroups groups;
  int64_t chunks;        // of a row with the largest shift
  int64_t block_chunks;  // chunks of a block of x: with all rows of a group it takes a third of the L1 cache
  int64_t blocks;

  ForwardPlan(int64_t m, int64_t k)
      : rows(k), groups(m, Products::kMaxRows), chunks(ceil_div(k + rows.max_shift(), kChunk)) {
    const int64_t most_rows = ceil_div(m, groups.count);
    int64_t weights = 1024;
    while (weights > 256 && weights * most_rows * static_cast<int64_t>(sizeof(typename Products::X)) > 16384)
      weights /= 2;
    block_chunks = weights / kChunk;
    blocks = ceil_div(chunks, block_chunks);
  }
  // Of one shift: x [group][chunk][row in group][kChunk], then the multipliers of sums [group][block][row in group].
  int64_t copy_elements() const { return groups.m * chunks * kChunk; }
  int64_t copy_scales() const { return groups.m * blocks; }
};

template <class Products>
struct PreparedX {
  typename Products::X* x;
  float* scale;
  float* h;      // as lora_h lays it out, or null
  bool* uneven;  // set by any thread that meets what Products cannot serve
};
inline void set(bool* flag) { __atomic_store_n(flag, true, __ATOMIC_RELAXED); }

// Row i of x, arranged for rows of W of one shift.
template <class Products, class T>
void prepare_row(const ForwardPlan<Products>& plan, const T* x, int64_t i, int copy, const PreparedX<Products>& out) {
  int64_t group = 0;
  while (plan.groups.first(group + 1) <= i) ++group;
  const int64_t first = plan.groups.first(group), rows = plan.groups.rows(group), k = plan.rows.k;
  alignas(64) float block[1024 + kLanes];
  const int shift = copy * (8 / plan.rows.period);
  for (int64_t b = 0; b < plan.blocks; ++b) {
    const int64_t chunk = b * plan.block_chunks;
    const int64_t chunks = plan.chunks - chunk < plan.block_chunks ? plan.chunks - chunk : plan.block_chunks;
    // Position p of the shifted row holds x[p - shift]; outside of the row it is 0.
    const int64_t begin = chunk * kChunk - shift, lead = begin < 0 ? -begin : 0;
    for (int64_t p = 0; p < lead; p += kLanes) store(block + p, zero());
    for (int64_t p = lead; p < chunks * kChunk; p += kLanes) {
      const int64_t left = k - begin - p;
      store(block + p, left > 0 ? load(x + i * k + begin + p, left) : zero());
    }
    typename Products::X* to =
        out.x + copy * plan.copy_elements() + (first * plan.chunks + chunk * rows + i - first) * kChunk;
    float* const scale = out.scale + copy * plan.copy_scales() + first * plan.blocks + b * rows + i - first;
    if (!Products::arrange(block, chunks, rows * kChunk, to, scale)) return set(out.uneven);
  }
}

// The blocks of x that go over a row of W before the next row does, and where the rows of a tile have them.
struct Stretch {
  const uint8_t* packed;  // of the first row
  const float* scales;    // a granule's each
  int64_t first_weight;   // of the first row, counted from the first granule of `scales`
  int64_t row_weights;    // from a row to the next: whole bytes
  int log2_granule;
  int64_t chunks;  // the last may be part of one
  int64_t block_chunks;
  int64_t last_weights;    // of the last chunk
  int64_t prefetch_ahead;  // bytes
};

// sums[i] += sum over blocks of scale_of_x[block][i] * (row of W · x[i]), lane by lane, for kRows rows of x and `rows`
// rows of W, kWeightRows at a time, whose sums lie kLanes apart. A function of its own, or what its loops need is kept
// in memory.
template <int kRows, int kWeightRows, class Products>
[[gnu::noinline, gnu::flatten]] void accumulate(const Stretch& stretch, int64_t rows, const typename Products::X* x,
                                                const float* scale_of_x, float* sums) {
  const Products products;
  const int64_t row_bytes = stretch.row_weights / 2, prefetch_ahead = stretch.prefetch_ahead;
  const int64_t granules_per_chunk = kChunk >> stretch.log2_granule;
  const uint8_t* first_packed = stretch.packed;
  int64_t first_weight = stretch.first_weight;
  for (int64_t t = 0; t + kWeightRows <= rows; t += kWeightRows, sums += kWeightRows * kLanes) {
    const float* scales[kWeightRows];
    Ints granules[kWeightRows];
    unroll<kWeightRows>([&](auto w) {
      const int64_t weight = first_weight + w * stretch.row_weights, granule = weight >> stretch.log2_granule;
      scales[w] = stretch.scales + granule;
      granules[w] =
          granule_of_lanes(static_cast<int>(weight - (granule << stretch.log2_granule)), stretch.log2_granule);
    });
    const uint8_t* packed = first_packed;
    const typename Products::X* block_of_x = x;
    const float* block_scale = scale_of_x;
    for (int64_t left = stretch.chunks; left > 0; block_scale += kRows) {
      Floats acc[kRows][kWeightRows];
      unroll<kRows>([&](auto i) { unroll<kWeightRows>([&](auto w) { acc[i][w] = zero(); }); });
      const int64_t left_after = left < stretch.block_chunks ? 0 : left - stretch.block_chunks;
      for (; left > left_after; --left) {
        typename Products::Codes codes[kWeightRows];
        Floats scale[kWeightRows];
        unroll<kWeightRows>([&](auto w) {
          const uint8_t* const at = packed + w * row_bytes;
          const bool whole = left > 1;
          codes[w] = products.codes(whole ? load_chunk(at) : load_chunk(at, ceil_div(stretch.last_weights, 2)));
          scale[w] = whole ? lane_scales(scales[w], granules[w])
                           : lane_scales(scales[w], granules[w], ceil_div(stretch.last_weights, kLaneWeights));
          scales[w] += granules_per_chunk;
          __builtin_prefetch(at + prefetch_ahead, 0, 3);  // before the loads it would hold them up
        });
        unroll<kRows>([&](auto i) {
          Floats product[kWeightRows];
          Products::multiply(codes, block_of_x + i * kChunk, product);
          unroll<kWeightRows>([&](auto w) { acc[i][w] = fma(product[w], scale[w], acc[i][w]); });
        });
        packed += kChunkBytes, block_of_x += kRows * kChunk;
      }
      // Or GCC keeps the sums in registers, of which there are none left, over all blocks.
      __atomic_signal_fence(__ATOMIC_SEQ_CST);
      unroll<kRows>([&](auto i) {
        unroll<kWeightRows>([&](auto w) {
          float* sum = sums + (i * kTileRows + w) * kLanes;
          store(sum, fma(acc[i][w], splat(block_scale[i]), load(sum)));
        });
      });
    }
    first_packed += kWeightRows * row_bytes, first_weight += kWeightRows * stretch.row_weights;
  }
}

template <class T, class Products>
class Forward {
 public:
  using Plan = ForwardPlan<Products>;
  Forward(const LinearProblem& p, const Plan& plan, const PreparedX<Products>& x) : p_(p), plan_(plan), x_(x) {}

  static int64_t super_rows(const Rows& rows) { return int64_t{kTileRows} * rows.period; }
  static int64_t scale_floats(const LinearProblem& p, const Rows& rows) {
    return ceil_div(super_rows(rows) * p.w.k, ScaleReader(p.w.scales).granule()) + 2 + kLanes;
  }

  // Super-tiles (`period` tiles whose rows interleave) begin .. end - 1.
  void operator()(int64_t begin, int64_t end) const {
    constexpr int kMaxRows = Products::kMaxRows;
    Carver memory(scratch(ScratchUse::kThread, static_cast<int64_t>(sizeof(float)) *
                                                   (scale_floats(p_, plan_.rows) + kMaxRows * kTileRows * kLanes)));
    float* sums = memory.take<float>(kMaxRows * kTileRows * kLanes);
    float* scales = memory.take<float>(scale_floats(p_, plan_.rows));
    ScaleReader reader(p_.w.scales);
    const int64_t super = super_rows(plan_.rows);
    PagesAhead pages(p_.w, begin * super, end * super < p_.w.n ? end * super : p_.w.n, 0, p_.w.k);
    for (int64_t s = begin; s < end; ++s) {
      // The lines of a super-tile are fetched while the one before it is worked on.
      pages.know((s + 2) * super);
      const int64_t first = s * super, last = first + super < p_.w.n ? first + super : p_.w.n;
      const int64_t first_granule = plan_.rows.first_weight(first) >> reader.log2_granule();
      const int64_t end_granule = ceil_div(last * p_.w.k, reader.granule());
      reader.read(first_granule, end_granule - first_granule, scales);
      for (int64_t group = 0; group < plan_.groups.count; ++group) {
        with_rows<kMaxRows>(plan_.groups.rows(group), [&](auto rows) {
          for (int64_t n = first; n < last && n < first + plan_.rows.period; ++n)
            tile<rows>(n, ceil_div(last - n, plan_.rows.period), group, reader, scales, first_granule, sums);
        });
      }
    }
  }

 private:
  // Rows n, n + period, ... (`count` of them) of W against one group of rows of x.
  template <int kRows>
  void tile(int64_t n, int64_t count, int64_t group, const ScaleReader& reader, const float* scales,
            int64_t first_granule, float* sums) const {
    const int64_t period = plan_.rows.period, k = p_.w.k, m0 = plan_.groups.first(group);
    const int shift = plan_.rows.shift(n), copy = shift * static_cast<int>(period) / 8;
    const typename Products::X* x = x_.x + copy * plan_.copy_elements() + m0 * plan_.chunks * kChunk;
    const float* scale_of_x = x_.scale + copy * plan_.copy_scales() + m0 * plan_.blocks;
    start<kRows>(n, count, m0, sums);
    // As many blocks of x as stay in the L1 cache go over a row of W before the next row.
    const int64_t block_bytes =
        kRows * plan_.block_chunks * kChunk * static_cast<int64_t>(sizeof(typename Products::X));
    const int64_t most = block_bytes < 12288 ? 24576 / block_bytes : 1;
    const int64_t weights = shift + k, chunks = ceil_div(weights, kChunk);
    const int64_t first_weight = plan_.rows.first_weight(n);
    Stretch stretch;
    stretch.scales = scales;
    stretch.row_weights = period * k;
    stretch.log2_granule = reader.log2_granule();
    stretch.block_chunks = plan_.block_chunks;
    stretch.prefetch_ahead = Forward::super_rows(plan_.rows) * k / 2;
    for (int64_t b = 0; b * plan_.block_chunks < chunks; b += most) {
      const int64_t chunk = b * plan_.block_chunks, first = first_weight + chunk * kChunk;
      stretch.packed = p_.w.packed + first / 2;
      stretch.first_weight = first - (first_granule << reader.log2_granule());
      const bool is_last = chunks - chunk <= most * plan_.block_chunks;
      stretch.chunks = is_last ? chunks - chunk : most * plan_.block_chunks;
      stretch.last_weights = is_last ? weights - (chunks - 1) * kChunk : kChunk;
      const typename Products::X* x_at = x + chunk * kRows * kChunk;
      int64_t t = 0;
      if constexpr (kRows <= Products::kMaxPairedRows) {
        accumulate<kRows, 2, Products>(stretch, count, x_at, scale_of_x + b * kRows, sums);
        t = count & ~int64_t{1};
        stretch.packed += t * stretch.row_weights / 2;
        stretch.first_weight += t * stretch.row_weights;
      }
      if (t < count)
        accumulate<kRows, 1, Products>(stretch, count - t, x_at, scale_of_x + b * kRows, sums + t * kLanes);
    }
    finish(n, count, m0, kRows, sums);
  }

  // The sums start with the lanes of h · bᵀ.
  template <int kRows>
  [[gnu::noinline]] void start(int64_t n, int64_t count, int64_t m0, float* sums) const {
    const int64_t rank = p_.lora.rank, row_stride = plan_.rows.period * rank;
    const T* b = static_cast<const T*>(p_.lora.b) + n * rank;
    for (int64_t t = 0; t < kTileRows; ++t, b += row_stride, sums += kLanes) {
      Floats acc[kRows];
      unroll<kRows>([&](auto i) { acc[i] = zero(); });
      const float* h = x_.h + m0 * kLanes;
      for (int64_t j = 0; t < count && j < rank; j += kLanes, h += p_.m * kLanes) {
        const Floats row = load(b + j, rank - j);
        unroll<kRows>([&](auto i) { acc[i] = fma(row, load(h + i * kLanes), acc[i]); });
      }
      unroll<kRows>([&](auto i) { store(sums + i * kTileRows * kLanes, acc[i]); });
    }
  }

  void finish(int64_t n, int64_t count, int64_t m0, int64_t rows, const float* sums) const {
    const T* bias = static_cast<const T*>(p_.bias);
    const int64_t period = plan_.rows.period;
    for (int64_t i = 0; i < rows; ++i) {
      Floats out = sums_of(sums + i * kTileRows * kLanes);
      if (Products::kMayOverflow && !all_finite(out)) set(x_.uneven);
      T* y = static_cast<T*>(p_.y) + (m0 + i) * p_.w.n + n;
      if (period == 1) {
        if (bias) out = add(out, load(bias + n, count));
        store(y, out, count);
        continue;
      }
      if (bias) {
        float of_row[kLanes] = {};
        for (int64_t t = 0; t < count; ++t) of_row[t] = to_float(bias[n + t * period]);
        out = add(out, load(of_row));
      }
      T value[kLanes];
      store(value, out, kLanes);
      for (int64_t t = 0; t < count; ++t) y[t * period] = value[t];
    }
  }

  const LinearProblem& p_;
  const Plan& plan_;
  const PreparedX<Products> x_;
};

// Whether a kernel has done a call. If not, what it has written to y counts for nothing.
enum class Outcome { kDone, kTooLarge, kUneven };

template <class T, class Products>
Outcome forward(const Pool& pool, const LinearProblem& p, int64_t first_row = 0) {
  using Body = Forward<T, Products>;
  const ForwardPlan<Products> plan(p.m, p.w.k);
  const Rows& rows = plan.rows;
  const int64_t k = p.w.k, rank = p.lora.rank;
  const bool drops = rank && p.lora.dropout.active();
  bool uneven = false;
  PreparedX<Products> x{};
  x.uneven = &uneven;
  T* dropped = nullptr;
  const auto lay_out = [&](void* base) {
    Carver memory(base);
    x.x = memory.take<typename Products::X>(plan.copy_elements() * rows.period);
    x.scale = memory.take<float>(plan.copy_scales() * rows.period);
    x.h = memory.take<float>(p.m * padded_rank(rank));
    dropped = memory.take<T>(drops ? p.m * k : 0);
    return memory.used();
  };
  const int64_t bytes = lay_out(nullptr);
  if (bytes > kMaxScratchBytes || 4 * Body::scale_floats(p, rows) > kMaxScratchBytes / 2) {
    if (p.m == 1) return Outcome::kTooLarge;
    LinearProblem half = p;
    half.m = p.m / 2;
    const Outcome outcome = forward<T, Products>(pool, half, first_row);
    if (outcome != Outcome::kDone) return outcome;
    half.x = static_cast<const T*>(p.x) + half.m * k;
    half.y = static_cast<T*>(p.y) + half.m * p.w.n;
    const int64_t done = half.m;
    half.m = p.m - done;
    return forward<T, Products>(pool, half, first_row + done);
  }
  lay_out(scratch(ScratchUse::kCall, bytes));

  const T* in = static_cast<const T*>(p.x);
  for (int64_t i = 0; i < p.m * padded_rank(rank); ++i) x.h[i] = 0.0f;
  if (drops) drop(p.lora.dropout, in, p.m, k, first_row, dropped);
  const int64_t column_groups = ceil_div(rank, kDotColumns), dot_groups = ceil_div(p.m, kDotRows) * column_groups;
  // Dot products and rows of x in turn, so that every thread has its share of both.
  const int64_t arranged = p.m * rows.period, units = dot_groups + arranged;
  auto prepare = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t dots = i * dot_groups / units, row = i - dots;
      if ((i + 1) * dot_groups / units > dots) {
        lora_h(p.lora, drops ? dropped : in, p.m, k, dots / column_groups, dots % column_groups, x.h);
      } else {
        prepare_row(plan, in, row / rows.period, static_cast<int>(row % rows.period), x);
      }
    }
  };
  run(pool, p.m * k * (rank + 16 * rows.period) > kWorthThreads, units, 1, prepare);
  if (uneven) return Outcome::kUneven;
  Body body(p, plan, x);
  const int64_t super = Body::super_rows(rows);
  pool(ceil_div(p.w.n, super), ceil_div(kWorthThreads, super * k * p.m), body);
  return uneven ? Outcome::kUneven : Outcome::kDone;
}

// 16-bit types. Returns whether it has done the call.
template <class T>
bool forward_16_bits(const Pool& pool, const LinearProblem& p) {
#if QLORA_BF16_DOT
  if (panels_dot(p.dtype)) return forward<T, Bf16Products>(pool, p) == Outcome::kDone;
#endif
  const Outcome outcome = p.w.k % kMinBlockSize == 0 ? forward<T, IntProducts<T, HalfOrder>>(pool, p)
                                                     : forward<T, IntProducts<T, LaneOrder>>(pool, p);
  if (outcome == Outcome::kUneven && p.m <= kMaxFloatRows) return forward<T, FloatProducts>(pool, p) == Outcome::kDone;
  return outcome == Outcome::kDone;
}
