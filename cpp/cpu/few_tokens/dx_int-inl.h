// dx of 16-bit types where blocks of 64 columns have one scale: rows of W are taken in pairs, whose codes become the
// two int16 of a lane, and dy times the scale of its row and block is rounded to 14 bits of the largest in a tile, so
// that one instruction does 32 products and 16 rows are summed exactly in int32. Included after small_dx-inl.h.
//
// Rounding dy · scale is no worse than rounding w where the 16 products of a column are of a size. That is seen from
// logarithms: of a row of dy and a block of columns, the largest |dy · scale| of the tile over the geometric mean of
// the 16 must not exceed 2^kMostSpread. 14 bits leave a product an error of 0.29 * largest / 16383 in the mean square,
// where a rounding of w makes 0.42 * 2^-8 of it (bfloat16; float16: 2^-11): 2^7 and 2^4 keep the first below 1.4 of the
// second, and their sum below the two roundings (w, dx) of the same formula in that type, as codes have next to no
// error here. N(0, 1) has a spread of 2^2. What exceeds it (outliers in dy, rows of W of very different size, NaN,
// numbers at the ends of float32's range) is summed in float32, for that row of dy, tile and block alone.

inline constexpr int64_t kDxBlock = 64;
inline constexpr int kDxPairs = kDxTileRows / 2;
inline constexpr int64_t kDxStripBlocks = 64;
inline constexpr int64_t kFetchAhead = 4096;   // bytes of a strip, beyond the tile that follows
inline constexpr float kLargestDy = 16383.0f;  // 16 products with 13-bit codes stay inside int32

// log2 |x| from the bits of x, less than 0.1 too small: linear between powers of two.
inline float approximate_log2(double bits) { return static_cast<float>(bits * 0x1p-23 - 127.0); }

// Prefetches the bytes that a strip has of each row from `row` on, a line a call. Whole rows, although a tile is used
// column by column: half of the lines of a page at a time are slower to come from memory.
class LineFetcher {
 public:
  LineFetcher(const uint8_t* row, int64_t bytes, int64_t row_bytes)
      : line_(row),
        end_(bytes < row_bytes ? row + bytes : row + 2 * kDxTileRows * row_bytes),
        gap_(row_bytes - bytes),
        row_bytes_(row_bytes) {}
  void operator()() {
    __builtin_prefetch(line_, 0, 2);
    line_ += 64;
    if (line_ >= end_) line_ = end_ + gap_, end_ += row_bytes_;
  }

 private:
  const uint8_t *line_, *end_;
  int64_t gap_, row_bytes_;
};

// sums [block][row of dy][4][kLanes] += the products of pairs of rows of W, whose lower row lies `to_lower` bytes after
// the upper one; dy [pair][row of dy][kDxStripBlocks] is dy times the scale of both. A function of its own, and without
// a loop over pairs, or pointers are kept in memory and sums copied back and forth.
template <int kRows, int kPairs>
[[gnu::noinline, gnu::flatten]] void add_pairs(const uint8_t* packed, int64_t row_bytes, int64_t to_lower,
                                               int64_t blocks, const int32_t* dy, const float* unit, float* sums,
                                               LineFetcher fetch) {
  // As many of the four nibbles at a time as the registers can sum for all rows of dy.
  constexpr int kNibbles = kRows <= 5 ? 4 : kRows <= 12 ? 2 : 1;
  const IntCodebook book(kIntCodes.value);
  for (int64_t b = 0; b < blocks; ++b, packed += kDxBlock / 2, ++dy, sums += kRows * kDxBlock) {
    unroll<4 / kNibbles>([&](auto pass) {
      Ints acc[kRows][kNibbles];
      unroll<kRows>([&](auto i) { unroll<kNibbles>([&](auto s) { acc[i][s] = no_ints(); }); });
      const uint8_t* upper = packed;
      unroll<kPairs>([&](auto j) {
        if (pass == 0) fetch();
        const Ints words = load_row_pair(upper, upper + to_lower);
        Ints codes[kNibbles];
        unroll<kNibbles>([&](auto s) { codes[s] = decode_nibble<pass * kNibbles + s>(words, book); });
        unroll<kRows>([&](auto i) {
          const Ints pair = splat_pair(dy[(j * kRows + i) * kDxStripBlocks]);
          unroll<kNibbles>([&](auto s) { acc[i][s] = dot(acc[i][s], codes[s], pair); });
        });
        upper += 2 * row_bytes;
      });
      unroll<kRows>([&](auto i) {
        unroll<kNibbles>([&](auto s) {
          float* sum = sums + i * kDxBlock + (pass * kNibbles + s) * kLanes;
          store(sum, fma(to_floats(acc[i][s]), splat(unit[i]), load(sum)));
        });
      });
    });
  }
}

template <class T>
class IntDx {
 public:
  explicit IntDx(const LinearDxProblem& p) : p_(p), row_blocks_(p.w.k / kDxBlock) {}

  static bool takes(const LinearDxProblem& p) { return p.w.k % kDxBlock == 0 && p.w.scales.block_size >= kDxBlock; }

  int64_t strip_chunks() const { return kDxStripBlocks * kDxBlock / kChunk; }
  int64_t tile_rows() const { return kDxTileRows; }

  // Chunks begin .. end - 1 of the sums over rows first_row .. last_row - 1.
  void operator()(int64_t first_row, int64_t last_row, int64_t begin, int64_t end, const SlabSums& out) const {
    const int64_t first = begin * (kChunk / kDxBlock), last = end * (kChunk / kDxBlock);
    const int64_t blocks = (last < row_blocks_ ? last : row_blocks_) - first;
    Memory memory;
    const auto lay_out = [&](void* base) {
      Carver carver(base);
      memory.sums = carver.take<float>(blocks * p_.m * kDxBlock);
      memory.scales = carver.take<float>(kDxTileRows * kScaleStride);
      memory.unit = carver.take<float>(p_.m);
      memory.pairs = carver.take<int32_t>(kDxPairs * p_.m * kDxStripBlocks);
      memory.log2_scale = carver.take<float>(kDxStripBlocks + kLanes);
      memory.even = carver.take<uint16_t>(p_.m * kMaskWords);
      return carver.used();
    };
    lay_out(scratch(ScratchUse::kThread, lay_out(nullptr)));
    for (int64_t i = 0; i < blocks * p_.m * kDxBlock; i += kLanes) store(memory.sums + i, zero());
    with_rows<kSmallDxRows>(p_.m, [&](auto rows) { add_rows<rows>(first_row, last_row, first, blocks, memory); });
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < p_.m; ++i) {
        const float* sums = memory.sums + (b * p_.m + i) * kDxBlock;
        store_in_order({load(sums), load(sums + kLanes), load(sums + 2 * kLanes), load(sums + 3 * kLanes)},
                       out.at(i, (first + b) * kDxBlock));
      }
    }
  }

 private:
  static constexpr int64_t kScaleStride = kDxStripBlocks + kLanes;
  static constexpr int64_t kMaskWords = kDxStripBlocks / kLanes;
  static constexpr float kMostSpread = kMantissaBits<T> == 7 ? 7.0f : 4.0f;

  struct Memory {
    float *sums, *scales, *unit;
    int32_t* pairs;     // [pair][row of dy][block]: dy * scale of two rows of W, or 0 where that is uneven
    float* log2_scale;  // [block]: the mean over the rows of a tile
    uint16_t* even;     // [row of dy][kMaskWords]: a bit a block
  };

  template <int kRows>
  void add_rows(int64_t first_row, int64_t last_row, int64_t first, int64_t blocks, const Memory& memory) const {
    const int64_t row_bytes = p_.w.k / 2, bytes = blocks * (kDxBlock / 2);
    const int64_t rows_ahead = kFetchAhead < bytes * kDxTileRows ? ceil_div(kFetchAhead, bytes) : kDxTileRows;
    const ScaleReader reader(p_.w.scales, kDxBlock);
    PageToucher touch_pages;
    for (int64_t n = first_row; n < last_row; n += kDxTileRows) {
      // Pages are known before a line of them is fetched.
      const int64_t known = n == first_row ? n : n + 2 * kDxTileRows, next = n + 3 * kDxTileRows;
      if (known < last_row)
        touch_pages(p_.w.packed + known * row_bytes, p_.w.packed + (next < last_row ? next : last_row) * row_bytes);
      const bool all_even = weigh(n, last_row, first, blocks, reader, memory);
      const uint8_t* packed = p_.w.packed + n * row_bytes + first * (kDxBlock / 2);
      if (!all_even) add_uneven(packed, n, last_row, blocks, memory);
      const int64_t fetched = n + kDxTileRows + rows_ahead;
      const LineFetcher fetch(packed + (fetched < last_row ? fetched - n : 0) * row_bytes, bytes, row_bytes);
      if (last_row - n >= kDxTileRows) {
        add_pairs<kRows, kDxPairs>(packed, row_bytes, row_bytes, blocks, memory.pairs, memory.unit, memory.sums, fetch);
        continue;
      }
      for (int64_t t = 0; t < last_row - n; t += 2) {
        const int64_t to_lower = n + t + 1 < last_row ? row_bytes : 0;  // a missing row has dy = 0
        add_pairs<kRows, 1>(packed + t * row_bytes, row_bytes, to_lower, blocks,
                            memory.pairs + t / 2 * kRows * kDxStripBlocks, memory.unit, memory.sums, fetch);
      }
    }
  }

  // Fills pairs, and the value of their unit for each row of dy. The unit depends on whole rows of W, not on the strip.
  // Returns whether every block is even for every row of dy.
  bool weigh(int64_t n, int64_t last_row, int64_t first, int64_t blocks, const ScaleReader& reader,
             const Memory& memory) const {
    const int64_t rows = last_row - n < kDxTileRows ? last_row - n : kDxTileRows;
    float bound[kDxTileRows] = {};
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t row_block = (n + t) * row_blocks_;
      reader.read(row_block + first, blocks, memory.scales + t * kScaleStride);
      bound[t] = reader.largest(row_block, row_blocks_);
    }
    for (int64_t b = 0; b < blocks; b += kLanes) {
      Floats bits = zero();
      for (int64_t t = 0; t < rows; ++t) bits = add(bits, magnitude_bits(load(memory.scales + t * kScaleStride + b)));
      store(memory.log2_scale + b, fma(bits, splat(0x1p-23f / static_cast<float>(rows)), splat(-127.0f)));
    }
    uint32_t uneven = 0;
    for (int64_t i = 0; i < p_.m; ++i) uneven |= weigh_row(i, n, rows, blocks, bound, memory);
    return !uneven;
  }

  // The same for one row of dy. Returns a bit for each uneven lane of any vector of blocks.
  uint32_t weigh_row(int64_t i, int64_t n, int64_t rows, int64_t blocks, const float* bound,
                     const Memory& memory) const {
    const T* row = static_cast<const T*>(p_.dy) + i * p_.w.n + n;
    float dy[kDxTileRows] = {};
    uint32_t largest_bits = 0;
    int64_t bits_sum = 0, nonzero = 0;
    for (int64_t t = 0; t < rows; ++t) {
      dy[t] = to_float(row[t]);
      const uint32_t dy_bits = float_bits(dy[t]) & 0x7FFFFFFFu, bits = float_bits(dy[t] * bound[t]) & 0x7FFFFFFFu;
      largest_bits = bits > largest_bits ? bits : largest_bits;
      bits_sum += dy_bits, nonzero += dy_bits != 0;
    }
    const bool in_range = largest_bits >= power_of_two_bits(-60) && largest_bits <= power_of_two_bits(60);
    const float largest = in_range ? bits_float(largest_bits) : 1.0f;
    memory.unit[i] = static_cast<float>(largest / (kLargestDy * kIntCodes.per_one));
    // The least log2_scale of an even block.
    float least = bits_float(kInfinityBits);
    if (nonzero == 0) {
      least = -least;
    } else if (in_range) {
      least = approximate_log2(largest_bits) -
              approximate_log2(static_cast<double>(bits_sum) / static_cast<double>(nonzero)) - kMostSpread;
    }
    for (int64_t t = 0; t < kDxTileRows; ++t) dy[t] *= kLargestDy / largest;
    uint32_t uneven = 0;
    for (int64_t b = 0; b < blocks; b += kLanes) {
      const uint32_t even = lanes_at_least(load(memory.log2_scale + b), splat(least));
      memory.even[i * kMaskWords + b / kLanes] = static_cast<uint16_t>(even);
      uneven |= ~even & first_lane_bits(blocks - b);
      for (int64_t j = 0; j < kDxPairs && 2 * j < rows; ++j) {
        const float* upper = memory.scales + 2 * j * kScaleStride + b;
        const float* lower = 2 * j + 1 < rows ? upper + kScaleStride : upper;  // a missing row has dy = 0
        store_pairs(memory.pairs + (j * p_.m + i) * kDxStripBlocks + b,
                    round_to_ints(mul(load(upper), splat(dy[2 * j])), even),
                    round_to_ints(mul(load(lower), splat(dy[2 * j + 1])), even));
      }
    }
    return uneven;
  }

  // Adds in float32 what pairs leave out of a tile.
  [[gnu::noinline]] void add_uneven(const uint8_t* packed, int64_t n, int64_t last_row, int64_t blocks,
                                    const Memory& memory) const {
    const FloatCodebook book(kNf4.value);
    const int64_t rows = last_row - n < kDxTileRows ? last_row - n : kDxTileRows, row_bytes = p_.w.k / 2;
    for (int64_t i = 0; i < p_.m; ++i) {
      const T* dy = static_cast<const T*>(p_.dy) + i * p_.w.n + n;
      for (int64_t b = 0; b < blocks; ++b) {
        if (memory.even[i * kMaskWords + b / kLanes] >> b % kLanes & 1) continue;
        float* const sums = memory.sums + (b * p_.m + i) * kDxBlock;
        Floats sum[4];
        unroll<4>([&](auto s) { sum[s] = load(sums + s * kLanes); });
        for (int64_t t = 0; t < rows; ++t) {
          const Ints words = load_words(packed + t * row_bytes + b * (kDxBlock / 2));
          const Floats by = splat(memory.scales[t * kScaleStride + b] * to_float(dy[t]));
          unroll<4>([&](auto s) { sum[s] = fma(decode_nibble<s>(words, book), by, sum[s]); });
        }
        unroll<4>([&](auto s) { store(sums + s * kLanes, sum[s]); });
      }
    }
  }

  const LinearDxProblem& p_;
  const int64_t row_blocks_;
};
