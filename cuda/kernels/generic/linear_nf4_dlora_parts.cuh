// What the kernels of LoRA's weight gradients share: the arguments, a CTA's tile, and the epilogue that turns sums into
// da and db.
#pragma once

#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/tile/generic/dropout.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/split.cuh"

namespace qlora::kernels {

inline constexpr int kDLoraThreads = 256;
inline constexpr int kDLoraGroups = 8;    // warps that divide the tokens; each produces a sum
inline constexpr int kDLoraColumns = 64;  // of x or dy, per CTA
inline constexpr int kDLoraRanks = 16;    // per chunk: the unit of summation and storing
inline constexpr int kDLoraChunk = kDLoraRanks * kDLoraColumns;

// One of the two gradients. da: wide = x, low_rank = g. db: wide = dy, low_rank = h.
struct DLoraSide {
  const void* wide;      // [m, columns]
  const void* low_rank;  // [m, rank]
  void* out;             // [rank, columns], or [columns, rank] if `columns_first`
  int64_t columns;
  float factor;  // the sum is multiplied by it
  bool columns_first;
  bool masked;  // the dropout mask applies to `wide`
};

struct DLoraArgs {
  DLoraSide a, b;
  int64_t a_tiles;  // column tiles of da; the others are db's
  int64_t m, rank;
  int64_t tokens_per_split;
  int32_t splits;
  Dropout dropout;
  float* partials;    // [tiles][splits][rank tiles of a CTA][kDLoraChunk]; unused with one split
  uint32_t* tickets;  // [tiles], zero before the launch; unused with one split
};

struct DLoraTile {
  DLoraSide side;
  int64_t column0, rank0;
  int64_t index;
};

// Makes the tile for column tile `column_tile` and the ranks of blockIdx.y.
template <int kRanks>
__device__ __forceinline__ DLoraTile make_dlora_tile(const DLoraArgs& args, int64_t column_tile) {
  DLoraTile tile;
  const bool is_a = column_tile < args.a_tiles;
  tile.side = is_a ? args.a : args.b;
  tile.column0 = (column_tile - (is_a ? 0 : args.a_tiles)) * kDLoraColumns;
  tile.rank0 = int64_t{blockIdx.y} * kRanks;
  tile.index = int64_t{blockIdx.y} * gridDim.x + column_tile;
  return tile;
}

struct DLoraSums {
  float value[kDLoraGroups][kDLoraRanks][kDLoraColumns + 2];
};

// Element i of a chunk of 16 ranks x 64 columns, in the memory order of the output.
struct DLoraElement {
  int rank, column;
  __device__ __forceinline__ DLoraElement(const DLoraSide& side, int i)
      : rank(side.columns_first ? i % kDLoraRanks : i / kDLoraColumns),
        column(side.columns_first ? i / kDLoraRanks : i % kDLoraColumns) {}
};

template <class T>
__device__ __forceinline__ void store_dlora(const DLoraArgs& args, const DLoraTile& tile, int rank_tile, DLoraElement e,
                                            float sum) {
  const int64_t rank = tile.rank0 + rank_tile * kDLoraRanks + e.rank, column = tile.column0 + e.column;
  if (rank >= args.rank || column >= tile.side.columns) return;
  const int64_t at = tile.side.columns_first ? column * args.rank + rank : rank * tile.side.columns + column;
  static_cast<T*>(tile.side.out)[at] = tile::narrow<T>(sum * tile.side.factor);
}

__device__ __forceinline__ float* dlora_partial(const DLoraArgs& args, const DLoraTile& tile, int64_t split,
                                                int rank_tile, int rank_tiles) {
  return args.partials + ((tile.index * args.splits + split) * rank_tiles + rank_tile) * kDLoraChunk;
}

// Adds up the groups' sums of a chunk, and stores them as output or as this split's partial sum.
template <class T>
__device__ __forceinline__ void finish_dlora(const DLoraArgs& args, const DLoraTile& tile, const DLoraSums& sums,
                                             int rank_tile, int rank_tiles) {
  for (int i = threadIdx.x; i < kDLoraChunk; i += kDLoraThreads) {
    const DLoraElement e(tile.side, i);
    float sum = 0.0f;
#pragma unroll
    for (int group = 0; group < kDLoraGroups; ++group) sum += sums.value[group][e.rank][e.column];
    if (args.splits > 1) {
      dlora_partial(args, tile, blockIdx.z, rank_tile, rank_tiles)[i] = sum;
    } else {
      store_dlora<T>(args, tile, rank_tile, e, sum);
    }
  }
}

// The CTA of the tile that arrives last adds up the splits.
template <class T>
__device__ __forceinline__ void add_dlora_splits(const DLoraArgs& args, const DLoraTile& tile, int rank_tiles) {
  if (!tile::arrives_last(args.tickets + tile.index, args.splits)) return;
  for (int j = 0; j < rank_tiles; ++j) {
    for (int i = threadIdx.x; i < kDLoraChunk; i += kDLoraThreads) {
      float sum = 0.0f;
      for (int split = 0; split < args.splits; ++split)
        sum += __ldcg(dlora_partial(args, tile, split, j, rank_tiles) + i);
      store_dlora<T>(args, tile, j, DLoraElement(tile.side, i), sum);
    }
  }
}

}  // namespace qlora::kernels
