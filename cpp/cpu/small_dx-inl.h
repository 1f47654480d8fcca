// dx = dy · w + mask ∘ (g · a) · keep_scale for few rows of dy. The sum runs over the rows of W, so lanes are outputs:
// a decoded vector is multiplied by one dy and added to the sums of its columns. Included after small_lora-inl.h.
//
// Work is split by columns, in chunks. A strip of chunks goes down W in tiles of kDxTileRows rows of one shift, chunk
// by chunk, so that the sums of a chunk stay in the L1 cache while a tile passes over them; the bytes of a tile are
// prefetched while the tile above it is worked on.

inline constexpr int kDxTileRows = 16;

// Columns first .. first + count - 1 of dx in their order, [m][stride] float32, before LoRA and rounding.
struct DxStrip {
  int64_t first, count, stride;
  float* sums;
};

// dx += mask ∘ (g · a) · keep_scale, and the one rounding.
template <class T>
void finish_strip(const LinearDxProblem& p, const float* g, const DxStrip& strip, float* column) {
  const int64_t rank = p.lora.rank, k = p.w.k;
  const Dropout& dropout = p.lora.dropout;
  const Floats keep_scale = splat(static_cast<float>(dropout.keep_scale));
  for (int64_t c = 0; c < strip.count; c += kLanes) {
    const int64_t count = strip.count - c;
    const int64_t here = count < kLanes ? count : kLanes;
    const T* a = static_cast<const T*>(p.lora.a) + strip.first + c;
    for (int64_t j = 0; j < rank; ++j) store(column + j * kLanes, load(a + j * k, count));
    for (int64_t i = 0; i < p.m; ++i) {
      Floats out = load(strip.sums + i * strip.stride + c);
      if (rank) {
        const float* row = g + i * padded_rank(rank);
        Floats lora = zero();
        for (int64_t j = 0; j < rank; ++j) lora = fma(splat(row[j]), load(column + j * kLanes), lora);
        if (dropout.active()) {
          float value[kLanes];
          store(value, mul(lora, keep_scale));
          for (int64_t l = 0; l < here; ++l) {
            const uint64_t at = static_cast<uint64_t>(i * k + strip.first + c + l);
            if (!dropout.keeps(philox4x32_10(dropout.seed, at >> 2).lane[at & 3])) value[l] = 0.0f;
          }
          lora = load(value);
        }
        out = add(out, lora);
      }
      store(static_cast<T*>(p.dx) + i * k + strip.first + c, out, count);
    }
  }
}

// Exact float32 products, for any shape.
template <class T>
class FloatDx {
 public:
  FloatDx(const LinearDxProblem& p, const float* g) : p_(p), rows_(p.w.k), g_(g) {}

  // Chunks of a strip: as many as keep the sums within half of the scratch.
  int64_t strip_chunks() const {
    const int64_t fit = kMaxScratchBytes / 2 / (4 * rows_.period * p_.m * kChunk) - 1;
    return fit < 64 ? fit : 64;
  }

  // Chunks of columns begin .. end - 1.
  void operator()(int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; c += strip_chunks()) strip(c, end - c < strip_chunks() ? end : c + strip_chunks());
  }

 private:
  struct Memory {
    float *sums, *natural, *scales, *dy, *column;
  };

  void strip(int64_t begin, int64_t end) const {
    // Rows with a shift reach into one chunk more.
    const int64_t count = end - begin + (rows_.period > 1), period = rows_.period;
    ScaleReader reader(p_.w.scales);
    const int64_t scale_stride = count * (kChunk >> reader.log2_granule()) + 2 + kLanes;
    const int64_t sum_count = period * count * p_.m * kChunk;
    Memory memory;
    const auto lay_out = [&](void* base) {
      Carver carver(base);
      memory.sums = carver.take<float>(sum_count);
      memory.natural = carver.take<float>(p_.m * (end - begin) * kChunk);
      memory.scales = carver.take<float>(kDxTileRows * scale_stride);
      memory.dy = carver.take<float>(p_.m * kDxTileRows);
      memory.column = carver.take<float>(p_.lora.rank * kLanes);
      return carver.used();
    };
    lay_out(scratch(ScratchUse::kThread, lay_out(nullptr)));
    for (int64_t i = 0; i < sum_count; i += kLanes) store(memory.sums + i, zero());

    for (int64_t n = 0; n < p_.w.n; n += kDxTileRows * period)
      for (int64_t s = 0; s < period && n + s < p_.w.n; ++s) tile(n + s, begin, count, reader, scale_stride, memory);

    DxStrip out{begin * kChunk, 0, (end - begin) * kChunk, memory.natural};
    out.count = p_.w.k - out.first < out.stride ? p_.w.k - out.first : out.stride;
    gather(count, memory, out);
    finish_strip<T>(p_, g_, out, memory.column);
  }

  // Rows n, n + period, ... of W, chunks first .. first + count - 1.
  [[gnu::flatten]] void tile(int64_t n, int64_t first, int64_t count, const ScaleReader& reader, int64_t scale_stride,
                             const Memory& memory) const {
    const int64_t period = rows_.period, left = ceil_div(p_.w.n - n, period), weights = p_.w.k + rows_.shift(n);
    const int64_t tile_rows = left < kDxTileRows ? left : kDxTileRows;
    const int64_t first_weight = first * kChunk;
    if (first_weight >= weights) return;
    const int64_t end_weight = weights - first_weight < count * kChunk ? weights : first_weight + count * kChunk;
    Ints granules[kDxTileRows];
    for (int64_t t = 0; t < tile_rows; ++t) {
      const int64_t row = rows_.first_weight(n + t * period);
      const int64_t granule = (row + first_weight) >> reader.log2_granule();
      granules[t] =
          granule_of_lanes(static_cast<int>((row + first_weight) & (reader.granule() - 1)), reader.log2_granule());
      reader.read(granule, ceil_div(row + end_weight, reader.granule()) - granule, memory.scales + t * scale_stride);
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
        const float* scales = memory.scales + t * scale_stride + c * (kChunk >> reader.log2_granule());
        return lane_scales(scales, granules[t], ceil_div(rest, kLaneWeights));
      };
      // Each group of tokens decodes the rows anew: that costs less than taking the sums to memory and back for each.
      for (int64_t i = 0; i < p_.m; i += kDxTokens) {
        with_rows<kDxTokens>(p_.m - i < kDxTokens ? p_.m - i : kDxTokens, [&](auto tokens) {
          add_rows<tokens>(tile_rows, codes_of, scales_of, memory.dy + i * kDxTileRows, sums + i * kChunk);
        });
      }
      sums += p_.m * kChunk;
    }
  }

  // sums [token][8][kLanes] += the products of `rows` rows of W.
  template <int kTokens, class Codes, class Scales>
  [[gnu::always_inline]] void add_rows(int64_t rows, const Codes& codes_of, const Scales& scales_of, const float* dy,
                                       float* sums) const {
    Floats sum[kTokens][8];
    unroll<kTokens>([&](auto i) { unroll<8>([&](auto s) { sum[i][s] = load(sums + i * kChunk + s * kLanes); }); });
    for (int64_t t = 0; t < rows; ++t) {
      const FloatCodes codes = codes_of(t);
      const Floats scale = scales_of(t);
      unroll<kTokens>([&](auto i) {
        const Floats by = mul(scale, splat(dy[i * kDxTileRows + t]));
        unroll<8>([&](auto s) { sum[i][s] = fma(codes.v[s], by, sum[i][s]); });
      });
    }
    unroll<kTokens>([&](auto i) { unroll<8>([&](auto s) { store(sums + i * kChunk + s * kLanes, sum[i][s]); }); });
  }

  // From sums by shift, chunk, row, vector and lane to columns in order.
  void gather(int64_t count, const Memory& memory, const DxStrip& out) const {
    for (int64_t i = 0; i < p_.m * out.stride; i += kLanes) store(memory.natural + i, zero());
    for (int copy = 0; copy < rows_.period; ++copy) {
      const int64_t shift = copy * (8 / rows_.period);
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t i = 0; i < p_.m; ++i) {
          const float* sums = memory.sums + ((copy * count + c) * p_.m + i) * kChunk;
          for (int s = 0; s < 8; ++s)
            for (int l = 0; l < kLanes; ++l) {
              const int64_t column = c * kChunk + l * 8 + (s ^ 1) - shift;
              if (column >= 0 && column < out.count) out.sums[i * out.stride + column] += sums[s * kLanes + l];
            }
        }
      }
    }
  }

  const LinearDxProblem& p_;
  const Rows rows_;
  const float* g_;
};
