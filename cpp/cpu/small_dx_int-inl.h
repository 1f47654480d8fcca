// dx of 16-bit types where blocks of 64 columns have one scale: rows of W are taken in pairs, whose codes become the
// two int16 of a lane, and dy times the scale of its row and block is rounded to 14 bits of the largest in a tile, so
// that one instruction does 32 products and 16 rows are summed exactly in int32. Included after small_dx-inl.h.

inline constexpr int64_t kDxBlock = 64;
inline constexpr int kDxPairs = kDxTileRows / 2;
inline constexpr float kLargestDy = 16383.0f;  // 16 products with 13-bit codes stay inside int32

template <class T>
class IntDx {
 public:
  IntDx(const LinearDxProblem& p, const float* g) : p_(p), g_(g), row_blocks_(p.w.k / kDxBlock) {}

  static bool takes(const LinearDxProblem& p) { return p.w.k % kDxBlock == 0 && p.w.scales.block_size >= kDxBlock; }

  // Chunks of columns begin .. end - 1.
  void operator()(int64_t begin, int64_t end) const {
    const int64_t strip_chunks = p_.m <= 2 ? 32 : 16;  // whose sums stay in the L1 cache
    for (int64_t c = begin; c < end; c += strip_chunks) strip(c, end - c < strip_chunks ? end : c + strip_chunks);
  }

 private:
  struct Memory {
    float *sums, *natural, *scales, *dy, *unit, *column;
    int32_t* pairs;  // [pair][row of dy][block]: dy * scale of two rows of W
  };

  void strip(int64_t begin, int64_t end) const {
    const int64_t first = begin * (kChunk / kDxBlock), last = end * (kChunk / kDxBlock);
    const int64_t blocks = (last < p_.w.k / kDxBlock ? last : p_.w.k / kDxBlock) - first;
    const int64_t stride = ceil_div(blocks, kLanes) * kLanes;
    Memory memory;
    const auto lay_out = [&](void* base) {
      Carver carver(base);
      memory.sums = carver.take<float>(blocks * p_.m * kDxBlock);
      memory.natural = carver.take<float>(p_.m * blocks * kDxBlock);
      memory.scales = carver.take<float>(kDxTileRows * (stride + kLanes));
      memory.dy = carver.take<float>(p_.m * kDxTileRows);
      memory.unit = carver.take<float>(p_.m);
      memory.column = carver.take<float>(p_.lora.rank * kLanes);
      memory.pairs = carver.take<int32_t>(kDxPairs * p_.m * stride);
      return carver.used();
    };
    lay_out(scratch(ScratchUse::kThread, lay_out(nullptr)));
    for (int64_t i = 0; i < blocks * p_.m * kDxBlock; i += kLanes) store(memory.sums + i, zero());

    ScaleReader reader(p_.w.scales, kDxBlock);
    with_rows<kSmallRows>(p_.m, [&](auto rows) {
      for (int64_t n = 0; n < p_.w.n; n += kDxTileRows) {
        weigh(n, first, blocks, stride, reader, memory);
        add_tile<rows>(n, first, blocks, stride, memory);
      }
    });
    const DxStrip out{first * kDxBlock, blocks * kDxBlock, blocks * kDxBlock, memory.natural};
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < p_.m; ++i)
        for (int s = 0; s < 4; ++s)
          for (int l = 0; l < kLanes; ++l)
            out.sums[i * out.stride + b * kDxBlock + row_pair_weight(s, l)] =
                memory.sums[((b * p_.m + i) * 4 + s) * kLanes + l];
    finish_strip<T>(p_, g_, out, memory.column);
  }

  // Fills pairs, and the value of their unit for each row of dy. The unit depends on whole rows of W, not on the strip.
  void weigh(int64_t n, int64_t first, int64_t blocks, int64_t stride, const ScaleReader& reader,
             const Memory& memory) const {
    const int64_t rows = p_.w.n - n < kDxTileRows ? p_.w.n - n : kDxTileRows;
    const int64_t scale_stride = stride + kLanes;
    float bound[kDxTileRows] = {};
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t row_block = (n + t) * row_blocks_;
      reader.read(row_block + first, blocks, memory.scales + t * scale_stride);
      bound[t] = reader.largest(row_block, row_blocks_);
    }
    for (int64_t i = 0; i < p_.m; ++i) {
      float dy[kDxTileRows] = {};
      const T* row = static_cast<const T*>(p_.dy) + i * p_.w.n + n;
      uint32_t largest_bits = 0;
      for (int64_t t = 0; t < rows; ++t) {
        dy[t] = to_float(row[t]);
        const uint32_t bits = float_bits(dy[t] * bound[t]) & 0x7FFFFFFFu;
        largest_bits = bits > largest_bits ? bits : largest_bits;
      }
      const bool finite = largest_bits < 0x7F800000u;
      const float largest = finite && bits_float(largest_bits) > 1e-33f ? bits_float(largest_bits) : 1e-33f;
      memory.unit[i] =
          finite ? static_cast<float>(largest / (kLargestDy * kIntCodes.per_one)) : bits_float(0x7FC00000u);
      for (int64_t t = 0; t < kDxTileRows; ++t) memory.dy[i * kDxTileRows + t] = dy[t] * (kLargestDy / largest);
    }
    for (int64_t j = 0; j < kDxPairs && 2 * j < rows; ++j) {
      const float* upper = memory.scales + 2 * j * scale_stride;
      const float* lower = 2 * j + 1 < rows ? upper + scale_stride : upper;  // a missing row has dy = 0
      for (int64_t b = 0; b < blocks; b += kLanes) {
        const Floats upper_scale = load(upper + b), lower_scale = load(lower + b);
        for (int64_t i = 0; i < p_.m; ++i) {
          const float* dy = memory.dy + i * kDxTileRows + 2 * j;
          store_pairs(memory.pairs + (j * p_.m + i) * stride + b, round_to_ints(mul(upper_scale, splat(dy[0]))),
                      round_to_ints(mul(lower_scale, splat(dy[1]))));
        }
      }
    }
  }

  // sums [block][row of dy][4][kLanes] += the tile's products.
  template <int kRows>
  [[gnu::flatten]] void add_tile(int64_t n, int64_t first, int64_t blocks, int64_t stride, const Memory& memory) const {
    // As many of the four nibbles at a time as the registers can sum for all rows of dy.
    constexpr int kNibbles = kRows <= 3 ? 4 : kRows <= 12 ? 2 : 1;
    const int64_t row_bytes = p_.w.k / 2, left = p_.w.n - n, ahead = kDxTileRows * row_bytes;
    const int64_t rows = left < kDxTileRows ? left : kDxTileRows, pairs = ceil_div(rows, 2), whole_pairs = rows / 2;
    const IntCodebook book(kIntCodes.value);
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* packed = p_.w.packed + n * row_bytes + (first + b) * (kDxBlock / 2);
      unroll<4 / kNibbles>([&](auto pass) {
        Ints acc[kRows][kNibbles];
        unroll<kRows>([&](auto i) { unroll<kNibbles>([&](auto s) { acc[i][s] = no_ints(); }); });
        const uint8_t* upper = packed;
        const int32_t* dy = memory.pairs + b;
        for (int64_t j = 0; j < pairs; ++j, upper += 2 * row_bytes, dy += kRows * stride) {
          const uint8_t* lower = j < whole_pairs ? upper + row_bytes : upper;  // a missing row has dy = 0
          if (pass == 0) {
            __builtin_prefetch(upper + ahead, 0, 2);
            __builtin_prefetch(lower + ahead, 0, 2);
          }
          const Ints words = load_row_pair(upper, lower);
          Ints codes[kNibbles];
          unroll<kNibbles>([&](auto s) { codes[s] = decode_nibble<pass * kNibbles + s>(words, book); });
          unroll<kRows>([&](auto i) {
            const Ints pair = splat_pair(dy[i * stride]);
            unroll<kNibbles>([&](auto s) { acc[i][s] = dot(acc[i][s], codes[s], pair); });
          });
        }
        float* sums = memory.sums + b * kRows * kDxBlock + pass * kNibbles * kLanes;
        unroll<kRows>([&](auto i) {
          unroll<kNibbles>([&](auto s) {
            float* sum = sums + i * kDxBlock + s * kLanes;
            store(sum, fma(to_floats(acc[i][s]), splat(memory.unit[i]), load(sum)));
          });
        });
      });
    }
  }

  const LinearDxProblem& p_;
  const float* g_;
  const int64_t row_blocks_;
};
