// The inner loop of the forward: adds the products of some segments of a tile's weight rows and the tokens of a group.
//
//   for each weight row (or pair of rows)
//     for each segment                 its sums start at zero, in registers
//       for each chunk                 decode it once, and read the scales of its lanes
//         for each token               sum[token] += scale · (chunk · the same chunk of the token), lane by lane
//       sums in memory += multiplier of the token's segment · sum[token]
#pragma once

#include <cstdint>

#include "cpp/cpu/few_tokens/products-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/verdict/rows-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;
using namespace verdict;

inline constexpr int kTileRows = kLanes;
inline constexpr int64_t kChunkBytes = kChunk / 2;

// Consecutive segments of a tile's weight rows, the same of every row. Their part of x stays in the first-level cache,
// so all of them are multiplied with one row before the next row begins.
struct RowSegments {
  const uint8_t* packed;   // of the first row
  const float* scales;     // one per granule
  const float* offsets;    // the same, for OffsetsEnter::kCodes
  int64_t first_weight;    // of the first row, counted from the first granule of `scales`
  int64_t row_weights;     // from a row to the next: whole bytes
  int log2_granule;        // weights
  int64_t chunks;          // of a row; the last may be partial
  int64_t segment_chunks;  // of a segment
  int64_t last_weights;    // of the last chunk
  int64_t prefetch_ahead;  // bytes
  bool prefetch_to_second_level;
  bool starts_sums;  // the first segment overwrites the sums
};

// Whether codes are decoded and multiplied in pairs of rows (forward_matrices-inl.h), instead of row by row.
template <class Products>
concept MultipliesRowPairs = requires { Products::kMultipliesRowPairs; };

alignas(64) inline constexpr float kZeros[kLanes] = {};

// sums[i] += sum over segments s of scale_of_x[s][i] * (weight row · token i in s), lane by lane, for kTokens tokens
// and `rows` weight rows. Rows are processed kRows at a time, and their sums lie kLanes apart. `first_chunks`, if any,
// sees the first chunk of every row. It is a separate function, because inlined its loop variables are spilled to
// memory.
template <int kTokens, int kRows, class Products>
[[gnu::noinline, gnu::flatten]] void accumulate(const Products& of_code, const RowSegments& segments, int64_t rows,
                                                const typename Products::X* x, const float* scale_of_x,
                                                FirstChunks* first_chunks, float* sums) {
  const Products products = of_code;  // in registers, which no store changes
  const int64_t row_bytes = segments.row_weights / 2, prefetch_ahead = segments.prefetch_ahead;
  const bool to_second_level = segments.prefetch_to_second_level;
  const int64_t granules_per_chunk = kChunk >> segments.log2_granule;
  const int64_t last_bytes = ceil_div(segments.last_weights, 2);
  const int64_t last_lanes = ceil_div(segments.last_weights, kLaneWeights);
  const uint8_t* first_packed = segments.packed;
  int64_t first_weight = segments.first_weight;
  // If rows are whole granules apart, the lanes have the same position in all of them.
  const bool alike = (segments.row_weights & ((int64_t{1} << segments.log2_granule) - 1)) == 0;
  LaneGranules granules[kRows] = {};
  for (int64_t t = 0; t + kRows <= rows; t += kRows, sums += kRows * kLanes) {
    const float *scales[kRows], *offsets[kRows];
    unroll<kRows>([&](auto w) {
      const int64_t weight = first_weight + w * segments.row_weights, granule = weight >> segments.log2_granule;
      scales[w] = segments.scales + granule;
      if constexpr (Products::kOffsets == OffsetsEnter::kCodes) offsets[w] = segments.offsets + granule;
      if (t == 0 || !alike)
        granules[w] =
            granule_of_lanes(static_cast<int>(weight - (granule << segments.log2_granule)), segments.log2_granule);
    });
    if constexpr (!Products::kServesEveryRow) {
      if (first_chunks)
        unroll<kRows>([&](auto w) {
          first_chunks->see(load_chunk(first_packed + w * row_bytes), lane_scales(scales[w], granules[w]));
        });
    }
    const uint8_t* packed = first_packed;
    const typename Products::X* segment_of_x = x;
    const float* segment_scale = scale_of_x;
    bool starts = segments.starts_sums;
    for (int64_t left = segments.chunks; left > 0; segment_scale += kTokens) {
      Floats acc[kTokens][kRows];
      unroll<kTokens>([&](auto i) { unroll<kRows>([&](auto w) { acc[i][w] = zero(); }); });
      const int64_t left_after = left < segments.segment_chunks ? 0 : left - segments.segment_chunks;
      for (; left > left_after; --left) {
        typename Products::Codes codes[kRows];
        Floats scale[kRows], offset[kRows];
        unroll<kRows>([&](auto w) {
          const uint8_t* const at = packed + w * row_bytes;
          const bool whole = left > 1;
          if constexpr (Products::kOffsets != OffsetsEnter::kCodes)
            codes[w] = products.codes(whole ? load_chunk(at) : load_chunk(at, last_bytes));
          scale[w] = whole ? lane_scales(scales[w], granules[w]) : lane_scales(scales[w], granules[w], last_lanes);
          scales[w] += granules_per_chunk;
          if constexpr (Products::kOffsets == OffsetsEnter::kCodes) {
            offset[w] = whole ? lane_scales(offsets[w], granules[w]) : lane_scales(offsets[w], granules[w], last_lanes);
            offsets[w] += granules_per_chunk;
            codes[w] = products.codes(whole ? load_chunk(at) : load_chunk(at, last_bytes), scale[w], offset[w]);
          }
          // The prefetch comes last, because it may delay the loads behind it.
          if (to_second_level) {
            __builtin_prefetch(at + prefetch_ahead, 0, 2);
          } else {
            __builtin_prefetch(at + prefetch_ahead, 0, 3);
          }
        });
        if constexpr (MultipliesRowPairs<Products>) {
          const auto pair = products.pair(codes);
          unroll<kTokens>([&](auto i) { Products::multiply_add(pair, segment_of_x + i * kChunk, scale, acc[i]); });
        } else {
          unroll<kTokens>([&](auto i) {
            Floats product[kRows];
            Products::multiply(codes, segment_of_x + i * kChunk, product);
            unroll<kRows>([&](auto w) {
              if constexpr (Products::kOffsets == OffsetsEnter::kCodes) {
                acc[i][w] = add(acc[i][w], product[w]);
              } else {
                acc[i][w] = fma(product[w], scale[w], acc[i][w]);
              }
            });
          });
        }
        packed += kChunkBytes, segment_of_x += kTokens * kChunk;
      }
      // Without the fence GCC keeps the sums of all segments in registers, and runs out of registers.
      __atomic_signal_fence(__ATOMIC_SEQ_CST);
      unroll<kTokens>([&](auto i) {
        unroll<kRows>([&](auto w) {
          float* sum = sums + (i * kTileRows + w) * kLanes;
          Floats of_row = acc[i][w];
          if constexpr (MultipliesRowPairs<Products>) of_row = Products::template lanes_of_row<w>(of_row);
          store(sum, fma(of_row, splat(segment_scale[i]), load(starts ? kZeros : sum)));
        });
      });
      starts = false;
    }
    first_packed += kRows * row_bytes, first_weight += kRows * segments.row_weights;
  }
}

// The same, one row at a time, for rows of whole chunks with one scale each, which `scales` (weight-inl.h) yields by
// the chunk's number, counted from the first of all rows. The inner loop has two thirds of the instructions.
template <int kTokens, class Products, class ChunkScales>
[[gnu::noinline, gnu::flatten]] void accumulate_chunks(const Products& of_code, const RowSegments& segments,
                                                       ChunkScales scales, int64_t rows, const typename Products::X* x,
                                                       const float* scale_of_x, FirstChunks* first_chunks,
                                                       float* sums) {
  const Products products = of_code;
  const int64_t prefetch_ahead = segments.prefetch_ahead, row_chunks = segments.row_weights / kChunk;
  const bool to_second_level = segments.prefetch_to_second_level;
  const uint8_t* packed = segments.packed;
  int64_t row = segments.first_weight / kChunk;  // the number of its first chunk
  for (int64_t t = 0; t < rows; ++t, row += row_chunks, packed += row_chunks * kChunkBytes, sums += kLanes) {
    if constexpr (!Products::kServesEveryRow) {
      scales.begin(row);
      if (first_chunks) first_chunks->see(load_chunk(packed), scales.of(row));
    }
    const typename Products::X* chunk_of_x = x;
    const float* segment_scale = scale_of_x;
    bool starts = segments.starts_sums;
    for (int64_t c = 0; c < segments.chunks; segment_scale += kTokens) {
      Floats acc[kTokens];
      unroll<kTokens>([&](auto i) { acc[i] = zero(); });
      const int64_t segment_end = min(c + segments.segment_chunks, segments.chunks);
      while (c < segment_end) {
        const int64_t end = min(scales.begin(row + c) - row, segment_end);
        for (; c < end; ++c, chunk_of_x += kTokens * kChunk) {
          const uint8_t* const at = packed + c * kChunkBytes;
          const typename Products::Codes codes[1] = {products.codes(load_chunk(at))};
          const Floats scale = scales.of(row + c);
          if (to_second_level) {
            __builtin_prefetch(at + prefetch_ahead, 0, 2);
          } else {
            __builtin_prefetch(at + prefetch_ahead, 0, 3);
          }
          unroll<kTokens>([&](auto i) {
            Floats product[1];
            Products::multiply(codes, chunk_of_x + i * kChunk, product);
            acc[i] = fma(product[0], scale, acc[i]);
          });
        }
      }
      unroll<kTokens>([&](auto i) {
        float* const sum = sums + i * kTileRows * kLanes;
        store(sum, fma(acc[i], splat(segment_scale[i]), load(starts ? kZeros : sum)));
      });
      starts = false;
    }
  }
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
