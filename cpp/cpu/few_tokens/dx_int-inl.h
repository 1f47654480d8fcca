// few_tokens_int: the sums of dx in integers, for 16-bit types and weights with one scale per group of 64 columns.
//
//   dx_int_scan-inl.h         once per call: which groups of columns and which dy the integers can serve
//   dx_int_round-inl.h        once per strip and tile: dy · scale, rounded to integers
//   dx_int_accumulate-inl.h   the inner loops
//   this file                 the kernel that slabs-inl.h calls for each strip of a slab
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/dx_int_accumulate-inl.h"
#include "cpp/cpu/few_tokens/dx_int_round-inl.h"
#include "cpp/cpu/few_tokens/dx_int_scan-inl.h"
#include "cpp/cpu/few_tokens/slabs-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/row_pairs.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/verdict/columns-inl.h"
#include "cpp/format/code_tables.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;
using namespace verdict;

inline constexpr int64_t kPrefetchAhead = 4096;  // bytes of a strip, beyond the tile that follows

template <class T>
class IntDx {
 public:
  IntDx(const LinearDxProblem& p, const DxScan& scan)
      : p_(p), book_(int_codes(p.w.code).value), row_groups_(p.w.k / kDxColumns), rounder_(p, scan), scan_(scan) {}

  int64_t strip_chunks() const { return kDxStripGroups * kDxColumns / kChunk; }
  int64_t tile_rows() const { return kDxTileRows; }

  // Sums chunks begin .. end - 1 of columns over rows first_row .. last_row - 1.
  void operator()(int64_t first_row, int64_t last_row, int64_t begin, int64_t end, const SlabSums& out) const {
    const int64_t first = begin * (kChunk / kDxColumns), last = end * (kChunk / kDxColumns);
    const int64_t groups = (last < row_groups_ ? last : row_groups_) - first;
    float* sums = nullptr;  // [group][token][kDxColumns]
    RoundedTile tile;
    const auto lay_out = [&](void* base) {
      Carver carver(base);
      sums = carver.take<float>(groups * p_.m * kDxColumns);
      tile.take(&carver, p_.m);
      return carver.used();
    };
    lay_out(scratch(ScratchUse::kThread, lay_out(nullptr)));
    for (int64_t i = 0; i < groups * p_.m * kDxColumns; i += kLanes) store(sums + i, zero());
    tile.concentrated = 0;
    for (int64_t b = 0; b < groups; ++b) tile.concentrated |= uint64_t{scan_.concentrated[first + b]} << b;
    with_count<kMaxDxTokens>(p_.m,
                             [&](auto tokens) { add_tiles<tokens>(first_row, last_row, first, groups, tile, sums); });
    for (int64_t b = 0; b < groups; ++b) {
      for (int64_t i = 0; i < p_.m; ++i) {
        const float* sum = sums + (b * p_.m + i) * kDxColumns;
        store_in_order({load(sum), load(sum + kLanes), load(sum + 2 * kLanes), load(sum + 3 * kLanes)},
                       out.at(i, (first + b) * kDxColumns));
      }
    }
  }

 private:
  // Adds the tiles of rows first_row .. last_row - 1, and groups first .. first + groups - 1, to the sums.
  template <int kTokens>
  void add_tiles(int64_t first_row, int64_t last_row, int64_t first, int64_t groups, const RoundedTile& tile,
                 float* sums) const {
    const int64_t row_bytes = p_.w.k / 2, bytes = groups * (kDxColumns / 2);
    const int64_t rows_ahead = kPrefetchAhead < bytes * kDxTileRows ? ceil_div(kPrefetchAhead, bytes) : kDxTileRows;
    const ScaleReader reader(p_.w.scales, kDxColumns);
    PagePrefetcher prefetch_pages;
    for (int64_t n = first_row; n < last_row; n += kDxTileRows) {
      // Pages are prefetched before their lines.
      const int64_t reached = n == first_row ? n : n + 2 * kDxTileRows, next = n + 3 * kDxTileRows;
      if (reached < last_row)
        prefetch_pages(p_.w.packed + reached * row_bytes,
                       p_.w.packed + (next < last_row ? next : last_row) * row_bytes);
      const bool all_served = rounder_.round_tile(n, last_row, first, groups, reader, tile);
      const uint8_t* packed = p_.w.packed + n * row_bytes + first * (kDxColumns / 2);
      if (!all_served) add_fallbacks<T>(p_, packed, n, last_row, groups, tile, sums);
      const int64_t ahead = n + kDxTileRows + rows_ahead;
      const StripLinePrefetcher prefetcher(packed + (ahead < last_row ? ahead - n : 0) * row_bytes, bytes, row_bytes,
                                           2 * kDxTileRows);
      if (last_row - n >= kDxTileRows) {
        add_pairs<kTokens, kDxPairs>(book_, packed, row_bytes, row_bytes, groups, tile.pairs, tile.unit, sums,
                                     prefetcher);
        continue;
      }
      for (int64_t t = 0; t < last_row - n; t += 2) {
        const int64_t to_lower = n + t + 1 < last_row ? row_bytes : 0;  // a missing row has dy = 0
        add_pairs<kTokens, 1>(book_, packed + t * row_bytes, row_bytes, to_lower, groups,
                              tile.pairs + t / 2 * kTokens * kDxStripGroups, tile.unit, sums, prefetcher);
      }
    }
  }

  const LinearDxProblem& p_;
  const IntCodebook book_;
  const int64_t row_groups_;
  const DxRounder<T> rounder_;
  const DxScan scan_;
};

template <class T>
Outcome dx_int_as(const Pool& pool, const LinearDxProblem& p) {
  const DxScan scan = scan_dx<T>(pool, p);
  dx_with<T>(pool, p, IntDx<T>(p, scan));
  return Outcome::kDone;
}

inline Outcome dx_int(const Pool& pool, const LinearDxProblem& p) {
  if (p.m > kMaxDxTokens) return Outcome::kTooLarge;
  return p.dtype == DType::kBFloat16 ? dx_int_as<bfloat16>(pool, p) : dx_int_as<float16>(pool, p);
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
