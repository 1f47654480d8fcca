// dx = dy · w + mask ∘ (g · a) · keep_scale for few rows of dy. The sum runs over the rows of W, so lanes are outputs:
// a decoded vector is multiplied by one dy and added to the sums of its columns. Included after small_lora-inl.h.
//
// Rows of W are taken in slabs, whose sums are added in their order: a thread that has a slab to itself reads whole
// pages one after another. Within a slab a strip of columns, in chunks, goes down W in tiles of kDxTileRows rows of one
// shift, chunk by chunk, so that the sums of a chunk stay in the L1 cache while a tile passes over them; the bytes of a
// tile are prefetched while the tile above it is worked on.

inline constexpr int kDxTileRows = 16, kDxTokens = 4;
inline constexpr int64_t kMostSlabs = 8, kLeastSlabRows = 512;

// Slabs of `rows` rows, and columns in ranges of `chunks`, so narrow that the sums of all slabs fit in the scratch.
// Neither depends on the number of threads.
struct Slabs {
  int64_t count, rows, chunks, m;
  float* sums = nullptr;  // [slab][row of dy][column of the range]

  Slabs(const LinearDxProblem& p, int64_t tile_rows) : m(p.m) {
    const int64_t fit = kMaxScratchBytes / 2 / (4 * m * kChunk), all = ceil_div(p.w.k, kChunk);
    chunks = all < fit ? all : fit;
    const int64_t most = fit / chunks < kMostSlabs ? fit / chunks : kMostSlabs;
    const int64_t share = ceil_div(p.w.n, most);
    rows = tile_rows * ceil_div(share < kLeastSlabRows ? kLeastSlabRows : share, tile_rows);
    count = ceil_div(p.w.n, rows);
  }
  int64_t stride() const { return chunks * kChunk; }
  int64_t floats() const { return m * stride(); }  // of a slab
};

// Of one slab, [row of dy][column of the range].
struct SlabSums {
  float* sums;
  int64_t stride, first_column;
  float* at(int64_t i, int64_t column) const { return sums + i * stride + column - first_column; }
};

// dx of columns begin .. end - 1: the sum of all slabs + mask ∘ (g · a) · keep_scale, rounded once.
template <class T>
void finish_dx(const LinearDxProblem& p, const float* g, const Slabs& slabs, int64_t first_column, int64_t begin,
               int64_t end) {
  const int64_t rank = p.lora.rank, k = p.w.k;
  const Dropout& dropout = p.lora.dropout;
  const Floats keep_scale = splat(static_cast<float>(dropout.keep_scale));
  float* column = Carver(scratch(ScratchUse::kThread, rank * kLanes * 4)).take<float>(rank * kLanes);
  for (int64_t c = begin; c < end; c += kLanes) {
    const T* a = static_cast<const T*>(p.lora.a) + c;
    for (int64_t j = 0; j < rank; ++j) store(column + j * kLanes, load(a + j * k, end - c));
    for (int64_t i = 0; i < p.m; ++i) {
      const float* sums = slabs.sums + i * slabs.stride() + c - first_column;
      Floats out = load(sums);
      for (int64_t s = 1; s < slabs.count; ++s) out = add(out, load(sums + s * slabs.floats()));
      if (rank) {
        const float* row = g + i * padded_rank(rank);
        Floats lora = zero();
        for (int64_t j = 0; j < rank; ++j) lora = fma(splat(row[j]), load(column + j * kLanes), lora);
        if (dropout.active()) {
          float value[kLanes];
          store(value, mul(lora, keep_scale));
          for (int64_t l = 0; l < kLanes && c + l < end; ++l) {
            const uint64_t at = static_cast<uint64_t>(i * k + c + l);
            if (!dropout.keeps(philox4x32_10(dropout.seed, at >> 2).lane[at & 3])) value[l] = 0.0f;
          }
          lora = load(value);
        }
        out = add(out, lora);
      }
      store(static_cast<T*>(p.dx) + i * k + c, out, end - c);
    }
  }
}

// A kernel sums strips of slabs, each in a call; `strip_chunks` and `tile_rows` say of what size.
template <class T, class Kernel>
void dx_by_slabs(const Pool& pool, const LinearDxProblem& p, const float* g, const Kernel& kernel, const Slabs& slabs) {
  const int64_t all_chunks = ceil_div(p.w.k, kChunk), chunk_work = kChunk * p.m;
  for (int64_t first = 0; first < all_chunks; first += slabs.chunks) {
    const int64_t chunks = all_chunks - first < slabs.chunks ? all_chunks - first : slabs.chunks;
    // Chunks of the first slab, then those of the next one.
    auto sum = [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t slab = begin / chunks, chunk = begin % chunks, row = slab * slabs.rows;
        int64_t count = chunks - chunk < end - begin ? chunks - chunk : end - begin;
        if (count > kernel.strip_chunks()) count = kernel.strip_chunks();
        kernel(row, p.w.n - row < slabs.rows ? p.w.n : row + slabs.rows, first + chunk, first + chunk + count,
               SlabSums{slabs.sums + slab * slabs.floats(), slabs.stride(), first * kChunk});
        begin += count;
      }
    };
    pool(slabs.count * chunks, ceil_div(kWorthThreads, chunk_work * slabs.rows), sum);
    auto finish = [&](int64_t begin, int64_t end) {
      const int64_t last = (first + end) * kChunk;
      finish_dx<T>(p, g, slabs, first * kChunk, (first + begin) * kChunk, last < p.w.k ? last : p.w.k);
    };
    pool(chunks, ceil_div(kWorthThreads, chunk_work * (slabs.count + p.lora.rank)), finish);
  }
}

// Exact float32 products, for any shape.
template <class T>
class FloatDx {
 public:
  explicit FloatDx(const LinearDxProblem& p) : p_(p), rows_(p.w.k) {}

  // As many as keep the sums within half of the scratch.
  int64_t strip_chunks() const {
    const int64_t fit = kMaxScratchBytes / 2 / (4 * rows_.period * p_.m * kChunk) - 1;
    return fit < 64 ? fit : 64;
  }
  int64_t tile_rows() const { return int64_t{kDxTileRows} * rows_.period; }
  int64_t scale_floats() const {
    return ceil_div(tile_rows() * p_.w.k, ScaleReader(p_.w.scales).granule()) + 2 + kLanes;
  }

  // Chunks begin .. end - 1 of the sums over rows first_row .. last_row - 1.
  void operator()(int64_t first_row, int64_t last_row, int64_t begin, int64_t end, const SlabSums& out) const {
    // Rows with a shift reach into one chunk more.
    const int64_t count = end - begin + (rows_.period > 1), period = rows_.period;
    const ScaleReader reader(p_.w.scales);
    const int64_t sum_count = period * count * p_.m * kChunk;
    Memory memory;
    const auto lay_out = [&](void* base) {
      Carver carver(base);
      memory.sums = carver.take<float>(sum_count);
      memory.scales = carver.take<float>(scale_floats());
      memory.dy = carver.take<float>(p_.m * kDxTileRows);
      return carver.used();
    };
    lay_out(scratch(ScratchUse::kThread, lay_out(nullptr)));
    for (int64_t i = 0; i < sum_count; i += kLanes) store(memory.sums + i, zero());

    for (int64_t n = first_row; n < last_row; n += tile_rows()) {
      // Of all columns: the scales of whole rows follow each other, and decoding many at once is quick.
      const int64_t last = n + tile_rows() < last_row ? n + tile_rows() : last_row;
      const int64_t first_granule = rows_.first_weight(n) >> reader.log2_granule();
      reader.read(first_granule, ceil_div(last * p_.w.k, reader.granule()) - first_granule, memory.scales);
      for (int64_t s = 0; s < period && n + s < last; ++s)
        tile(n + s, last, begin, count, reader, first_granule, memory);
    }
    gather(begin, end, count, memory, out);
  }

 private:
  struct Memory {
    float *sums, *scales, *dy;
  };

  // Rows n, n + period, ... < last of W, chunks first .. first + count - 1. Scales are there from `first_granule` on.
  [[gnu::flatten]] void tile(int64_t n, int64_t last, int64_t first, int64_t count, const ScaleReader& reader,
                             int64_t first_granule, const Memory& memory) const {
    const int64_t period = rows_.period, rows = ceil_div(last - n, period), weights = p_.w.k + rows_.shift(n);
    const float* scales_of_row[kDxTileRows];
    Ints granules[kDxTileRows];
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t begin = rows_.first_weight(n + t * period) + first * kChunk;
      const int64_t granule = begin >> reader.log2_granule();
      scales_of_row[t] = memory.scales + granule - first_granule;
      granules[t] =
          granule_of_lanes(static_cast<int>(begin - (granule << reader.log2_granule())), reader.log2_granule());
      const T* dy = static_cast<const T*>(p_.dy) + n + t * period;
      for (int64_t i = 0; i < p_.m; ++i) memory.dy[i * kDxTileRows + t] = to_float(dy[i * p_.w.n]);
    }
    const FloatCodebook book(kNf4.value);
    const int64_t ahead = kDxTileRows * period * p_.w.k / 2;
    float* sums = memory.sums + (rows_.shift(n) * period / 8) * count * p_.m * kChunk;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t rest = weights - (first + c) * kChunk;
      if (rest <= 0) break;
      const auto codes_of = [&](int64_t t) {
        const uint8_t* packed = p_.w.packed + (rows_.first_weight(n + t * period) + (first + c) * kChunk) / 2;
        __builtin_prefetch(packed + ahead, 0, 2);
        return decode(rest < kChunk ? load_chunk(packed, ceil_div(rest, 2)) : load_chunk(packed), book);
      };
      const auto scales_of = [&](int64_t t) {
        const float* at = scales_of_row[t] + c * (kChunk >> reader.log2_granule());
        return lane_scales(at, granules[t], ceil_div(rest, kLaneWeights));
      };
      for (int64_t i = 0; i < p_.m; i += kDxTokens) {
        with_rows<kDxTokens>(p_.m - i < kDxTokens ? p_.m - i : kDxTokens, [&](auto tokens) {
          add_rows<tokens>(rows, codes_of, scales_of, memory.dy + i * kDxTileRows, sums + i * kChunk);
        });
      }
      sums += p_.m * kChunk;
    }
  }

  // sums [token][8][kLanes] += the products of `rows` rows of W. As many of the eight vectors at a time as the
  // registers can sum for all tokens, for loading and scaling the rows anew costs less than taking sums to memory and
  // back.
  template <int kTokens, class Codes, class Scales>
  [[gnu::always_inline]] void add_rows(int64_t rows, const Codes& codes_of, const Scales& scales_of, const float* dy,
                                       float* sums) const {
    constexpr int kVectors = kTokens * 8 <= kDxSums ? 8 : 4;
    unroll<8 / kVectors>([&](auto pass) {
      Floats sum[kTokens][kVectors];
      const auto at = [&](int i, int s) { return sums + i * kChunk + (pass * kVectors + s) * kLanes; };
      unroll<kTokens>([&](auto i) { unroll<kVectors>([&](auto s) { sum[i][s] = load(at(i, s)); }); });
      for (int64_t t = 0; t < rows; ++t) {
        const FloatCodes codes = codes_of(t);
        const Floats scale = scales_of(t);
        unroll<kTokens>([&](auto i) {
          const Floats by = mul(scale, splat(dy[i * kDxTileRows + t]));
          unroll<kVectors>([&](auto s) { sum[i][s] = fma(codes.v[pass * kVectors + s], by, sum[i][s]); });
        });
      }
      unroll<kTokens>([&](auto i) { unroll<kVectors>([&](auto s) { store(at(i, s), sum[i][s]); }); });
    });
  }

  // From sums by shift, chunk, row, vector and lane to columns in order.
  void gather(int64_t begin, int64_t end, int64_t count, const Memory& memory, const SlabSums& out) const {
    const int64_t columns = (end - begin) * kChunk;
    for (int64_t i = 0; i < p_.m; ++i) {
      float* const to = out.at(i, begin * kChunk);
      for (int64_t c = 0; c < columns; c += kLanes) store(to + c, zero());
      for (int copy = 0; copy < rows_.period; ++copy) {
        for (int64_t c = 0; c < count; ++c) {
          const float* sums = memory.sums + ((copy * count + c) * p_.m + i) * kChunk;
          float in_order[kChunk];
          for (int64_t s = 0; s < 8; ++s) {
            float* weight = in_order + (s ^ 1);
            for (int64_t l = 0; l < kLanes; ++l) weight[l * 8] = sums[s * kLanes + l];
          }
          const int64_t column = c * kChunk - copy * (8 / rows_.period), rest = columns - column;
          const int64_t last = rest < kChunk ? rest : kChunk;
          for (int64_t j = column < 0 ? -column : 0; j < last; j += kLanes)
            store(to + column + j, add(load(to + column + j, last - j), load(in_order + j, last - j)), last - j);
        }
      }
    }
  }

  const LinearDxProblem& p_;
  const Rows rows_;
};
