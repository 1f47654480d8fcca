// Finds the rows of each expert. Experts follow each other in the order of their rows, and offsets in device memory
// delimit them. A kernel over all experts starts as many CTAs as the rows could need at most, and each CTA finds its
// tile of rows here. Surplus CTAs find none.
//
// Invalid offsets cannot do harm: expert e's rows end at the largest of offsets[0 .. e], clamped to lie between 0 and
// the number of rows. So ranges never overlap or leave the tensors.
#pragma once

#include <cstdint>

#include "cpp/format/packing.h"

namespace qlora::tile {

struct Groups {
  const int64_t* offsets;  // [count]
  int64_t count;
  int64_t rows;  // all rows, including those that belong to no expert
};

// The rows [begin, end) of an expert. Group `count` is no expert: it holds the rows after the last offset.
struct Group {
  int64_t expert, begin, end;
};

// An upper bound on the number of tiles of `tile_rows` rows if no tile may span two groups.
inline int64_t most_group_tiles(int64_t rows, int64_t experts, int64_t tile_rows) {
  const int64_t groups = experts + 1 < rows ? experts + 1 : rows;  // nonempty groups, at most
  return (rows + groups * (tile_rows - 1)) / tile_rows;
}

inline constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Returns expert e's own end: its offset, clamped to 0 .. rows. Group `count` ends with the last row.
__device__ __forceinline__ int64_t group_end(const Groups& groups, int64_t e) {
  if (e >= groups.count) return groups.rows;
  const int64_t end = __ldg(groups.offsets + e);
  return end < 0 ? 0 : end > groups.rows ? groups.rows : end;
}

// Returns combine(..., combine(v of lane 0, v of lane 1), ..., v of this lane): an inclusive scan.
template <class Combine>
__device__ __forceinline__ int64_t scan(int64_t v, Combine combine) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t before = __shfl_up_sync(kWholeWarp, v, distance);
    if (lane >= distance) v = combine(before, v);
  }
  return v;
}

__device__ __forceinline__ int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Runs `search` and returns its result to the whole CTA. Only the first warp searches: many CTAs find that they have
// nothing to do, and that should take few instructions.
template <class Search>
__device__ __forceinline__ auto by_first_warp(Search search) {
  __shared__ decltype(search()) found;
  __syncthreads();  // the previous result has been read
  if (threadIdx.x < 32) {
    const auto mine = search();
    if (threadIdx.x == 0) found = mine;
  }
  __syncthreads();
  return found;
}

// Returns the rows of expert `expert`. Call from all threads of the CTA.
__device__ __forceinline__ Group find_group(const Groups& groups, int64_t expert) {
  return by_first_warp([&] {
    int64_t begin = 0;
    for (int64_t e = threadIdx.x; e < expert; e += 32) begin = larger(begin, group_end(groups, e));
    begin = __shfl_sync(kWholeWarp, scan(begin, larger), 31);
    return Group{expert, begin, larger(begin, group_end(groups, expert))};
  });
}

// A tile's group and its first row. `exists` is false for surplus tiles.
struct GroupTile {
  Group group;
  int64_t row0;
  bool exists;
};

// One warp searches for tile number `tile` among the tiles of all groups, kRows rows each, in the order of the groups.
template <int kRows>
__device__ __forceinline__ GroupTile search_group_tile(const Groups& groups, int64_t tile) {
  const int lane = threadIdx.x % 32;
  const int64_t each = groups.count / 32 + 1;  // neighbouring groups per lane
  int64_t end = 0;
#pragma unroll 4
  for (int64_t i = 0; i < each; ++i) end = larger(end, group_end(groups, lane * each + i));
  int64_t begin = __shfl_up_sync(kWholeWarp, scan(end, larger), 1);
  if (lane == 0) begin = 0;

  // Calls body(group, number of tiles) for this lane's groups, the first of which begins at `at`, until it returns
  // true.
  const auto visit = [&](int64_t first, int64_t at, auto body) {
    for (int64_t i = 0; i < each; ++i) {
      const Group group{first + i, at, larger(at, group_end(groups, first + i))};
      if (body(group, ceil_div(group.end - at, kRows))) return;
      at = group.end;
    }
  };
  int64_t tiles = 0;
  visit(lane * each, begin, [&](const Group&, int64_t count) {
    tiles += count;
    return false;
  });
  const int64_t sum = scan(tiles, [](int64_t a, int64_t b) { return a + b; });
  const unsigned beyond = __ballot_sync(kWholeWarp, sum > tile);
  GroupTile found{};
  if (beyond == 0) return found;
  const int source = __ffs(static_cast<int>(beyond)) - 1;
  int64_t before = __shfl_sync(kWholeWarp, sum - tiles, source);
  visit(source * each, __shfl_sync(kWholeWarp, begin, source), [&](const Group& group, int64_t count) {
    found = {group, group.begin + (tile - before) * kRows, true};
    before += count;
    return tile < before;
  });
  return found;
}

// The same for a whole CTA.
template <int kRows>
__device__ __forceinline__ GroupTile find_group_tile(const Groups& groups, int64_t tile) {
  return by_first_warp([&] { return search_group_tile<kRows>(groups, tile); });
}

// Stores zeros for rows that belong to no expert: y[row][column] for row0 <= row < row_end and column0 <= column <
// column_end, where y's rows have `columns` elements.
template <class T, int kThreads>
__device__ __forceinline__ void store_zeros(T* y, int64_t columns, int64_t row0, int64_t row_end, int64_t column0,
                                            int64_t column_end) {
  const int64_t width = (column_end < columns ? column_end : columns) - column0;
  for (int64_t i = threadIdx.x; i < (row_end - row0) * width; i += kThreads)
    y[(row0 + i / width) * columns + column0 + i % width] = T{};
}

}  // namespace qlora::tile
