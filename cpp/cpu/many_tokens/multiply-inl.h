// The matrix multiplication every kernel of this folder ends in. Included inside the kernels' anonymous namespace.
//
//   sums [rows, lanes] (+)= rows panel [rows, depth] · lanes panel [depth, lanes]
//
// in words (WordF32, WordBf16: one or two elements of the summed dimension). A word of the rows panel is broadcast, a
// vector of the lanes panel is loaded, so neither operand is ever transposed for the other's sake. Where the lanes are
// few, neighbouring lanes take neighbouring words (TwoWords), whose sums are added up in the end: a broadcast then
// serves twice as many lanes. What is broadcast at once is a *step* of the depth. Sums over at most
// kChain words start from zero in registers and are added to memory once: rounding errors grow with the chain, not with
// the whole sum.
#pragma once

inline constexpr int kDepth = 256;  // words; a rows panel is laid out [rows][kDepth]

// What a core does beside multiplying, a little at every step along the depth of a tile, so that neither waits for the
// other. A *task beside* has step() for that.

// Fetches packed weights that the next panel will be decoded from, `rows` runs of `columns` weights that begin `stride`
// apart. It is done a line at a time, for all at once is more than a core can have under way.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const uint8_t* packed, int64_t first, int64_t rows, int64_t stride, int64_t columns)
      : packed_(packed), weight_(first), rows_(columns > 0 ? rows : 0), stride_(stride), columns_(columns) {}
  void step() {
    if (rows_ <= 0) return;
    __builtin_prefetch(packed_ + ((weight_ + at_) >> 1), 0, 2);
    at_ += kLine;
    if (at_ < columns_ + kLine - 1) return;  // a run may begin inside a line
    at_ = 0, weight_ += stride_, --rows_;
  }

 private:
  static constexpr int64_t kLine = 128;  // weights
  const uint8_t* packed_ = nullptr;
  int64_t weight_ = 0, rows_ = 0, stride_ = 0, columns_ = 0, at_ = 0;
};

// One tile of `rows` x `vectors` accumulators. Lanes and sums are `vectors` vectors wide in memory.
template <class W, int longest_chain, int rows, int vectors, class Beside>
void multiply_tile(const typename W::Word* row, const typename W::Word* lane, int depth, float* sums, bool first,
                   Beside& beside) {
  constexpr int kWidth = vectors * kLanes;
  for (; depth > 0; depth -= longest_chain, first = false) {
    F sum[rows][vectors];
    unroll<rows>([&](auto r) { unroll<vectors>([&](auto v) { sum[r.value][v.value] = zero(); }); });
    for (int d = depth < longest_chain ? depth : longest_chain; d > 0; --d, row += W::kWords, lane += kWidth) {
      beside.step();
      typename W::Vector x[vectors];
      unroll<vectors>([&](auto v) { x[v.value] = W::load(lane + v.value * kLanes); });
      unroll<rows>([&](auto r) {
        const auto w = W::broadcast(row + r.value * kDepth);
        unroll<vectors>([&](auto v) { sum[r.value][v.value] = W::multiply_add(w, x[v.value], sum[r.value][v.value]); });
      });
    }
    unroll<rows>([&](auto r) {
      unroll<vectors>([&](auto v) {
        float* out = sums + r.value * kWidth + v.value * kLanes;
        store(out, first ? sum[r.value][v.value] : add(load(out), sum[r.value][v.value]));
      });
    });
  }
}

template <class W, class Beside>
using MultiplyTile = void (*)(const typename W::Word*, const typename W::Word*, int, float*, bool, Beside&);

// multiply_tile<..., 1 .. kAccumulators / vectors, vectors, ...>
template <class W, int longest_chain, int vectors, class Beside>
struct Tiles {
  static constexpr int kRows = kAccumulators / vectors;
  MultiplyTile<W, Beside> by_rows[kRows + 1] = {};
  constexpr Tiles() { unroll_constexpr<kRows>(); }

 private:
  template <int rows>
  constexpr void unroll_constexpr() {
    if constexpr (rows > 0) {
      unroll_constexpr<rows - 1>();
      by_rows[rows] = multiply_tile<W, longest_chain, rows, vectors, Beside>;
    }
  }
};

// Every row of a rows panel against one tile of lanes, in tiles of nearly equal height: a low one for the last rows
// would leave most of the accumulators idle.
template <class W, int longest_chain, int vectors, class Beside>
void multiply_rows(const typename W::Word* rows_panel, int64_t rows, const typename W::Word* lanes, int depth,
                   float* sums, bool first, Beside& beside) {
  static constexpr Tiles<W, longest_chain, vectors, Beside> kTiles;
  constexpr int64_t kWidth = vectors * kLanes;
  const int64_t tiles = ceil_div(rows, kTiles.kRows);
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int64_t height = (rows - row) / (tiles - t);
    kTiles.by_rows[height](rows_panel + row * kDepth, lanes, depth, sums + row * kWidth, first, beside);
    row += height;
  }
}

// A lanes panel is cut into tiles of kTileLanes, the last of one vector if that holds what is left:
// [tile][depth][width], and the sums likewise: [tile][rows][width].
inline constexpr int kTileLanes = 2 * kLanes;
inline int64_t tile_width(int64_t lanes_left) { return lanes_left > kLanes ? kTileLanes : kLanes; }

// The longest sum of words kept in one register. 16-bit results do not notice its rounding errors; float32 ones should
// have no larger ones than those of a library that sums in many short chains.
template <class T>
inline constexpr int kChain = sizeof(T) == 4 ? 32 : kDepth;

template <class W, int longest_chain, class Beside>
void multiply(const typename W::Word* rows_panel, int64_t rows, const typename W::Word* lanes_panel, int64_t lanes,
              int depth, float* sums, bool first, Beside& beside) {
  for (int64_t l = 0; l < lanes; l += kTileLanes) {
    if (lanes - l > kLanes) {
      multiply_rows<W, longest_chain, 2>(rows_panel, rows, lanes_panel + l * depth, depth, sums + l * rows, first,
                                         beside);
    } else {
      multiply_rows<W, longest_chain, 1>(rows_panel, rows, lanes_panel + l * depth, depth, sums + l * rows, first,
                                         beside);
    }
  }
}
