// encode_nf4 with feedback: each rounding error is compensated in the columns that are rounded later (GPTQ, Frantar et
// al., 2022). The bits equal those of the CPU kernel (cpp/cpu/codec/encode-inl.h).
//
// Rows are independent. A warp takes 4 rows, and all rows of a CTA form a stripe. The CTA processes a stripe place by
// place: a place is a column's position in the order of rounding. Registers hold a batch of 128 places at a time, 4
// rows x 4 places per lane:
//
//     places  0 .............. first ...... first + 128 ....... k
//     errors  known, in memory | this batch | not yet processed
//
// A batch loads its weights from w and subtracts the errors of all earlier places, each times its factor. Then it is
// rounded place by place: the error of a place is subtracted, times its factors, from the later places of the batch,
// and replaces the place's own weight in its register. So each weight is read once and changes in one register only, in
// the order of the places, with every product and every difference rounded separately. The factors, and the errors of
// the CTA's rows, stream through shared memory in chunks of 32 places.
#pragma once

#include <cstdint>

#include "cpp/format/codes.h"
#include "cuda/ptx/address.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/lane_values.cuh"
#include "cuda/tile/generic/round.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tuning/codec.h"

namespace qlora::kernels {

struct FeedbackTile {
  static constexpr int kRows = 4;     // per warp
  static constexpr int kPerLane = 4;  // places per lane
  static constexpr int kBatch = tile::kWarp * kPerLane;
  static constexpr int kChunk = 32;
  static constexpr int kStages = 2;
  static constexpr int kMaxWarps = cuda::kFeedbackWarps;
};

struct FeedbackScale {
  float scale, inverse;
};

template <class Round>
struct FeedbackShared {
  using Tile = FeedbackTile;

  typename Round::Table table;
  alignas(16) float factors[Tile::kStages][Tile::kChunk][Tile::kBatch];
  alignas(16) float errors[Tile::kStages][Tile::kMaxWarps * Tile::kRows][Tile::kChunk];
  float inverse_diagonal[Tile::kBatch];
  int column[Tile::kBatch];
  FeedbackScale scales[Tile::kMaxWarps][Tile::kBatch][Tile::kRows];  // the last member, so that fewer warps take less
};

// The bytes of shared memory for CTAs of up to `warps` warps.
template <class Round>
__host__ __device__ constexpr int feedback_shared_bytes(int warps) {
  constexpr int kPerWarp = sizeof(FeedbackScale[FeedbackTile::kBatch][FeedbackTile::kRows]);
  return static_cast<int>(sizeof(FeedbackShared<Round>)) - (FeedbackTile::kMaxWarps - warps) * kPerWarp;
}

template <class T>
struct FeedbackArgs {
  const T* w;             // [n, k]
  const float* absmax;    // one per quantization block of 2^block_shift weights
  const float* feedback;  // [k, k]
  const int64_t* order;   // [k]
  float* errors;          // a stripe per CTA, in rows of padded_places(k)
  uint8_t* codes;         // a stripe per CTA, one byte per weight, stripe_codes(k, warps) bytes
  uint8_t* packed;
  int64_t n;
  int k, block_shift;
  uint32_t zero_code;
};

__host__ __device__ constexpr int64_t padded_places(int64_t k) {
  return ceil_div(k, int64_t{FeedbackTile::kBatch}) * FeedbackTile::kBatch;
}
__host__ __device__ constexpr int64_t stripe_codes(int64_t k, int warps) {
  return ceil_div(k * warps * FeedbackTile::kRows, int64_t{16}) * 16;
}

// A lane's part of a batch: weights, replaced by their errors once they are rounded.
using FeedbackWeights = float[FeedbackTile::kRows][FeedbackTile::kPerLane];

// The stripe that a CTA is processing.
template <class Round, class T>
struct FeedbackStripe {
  using Tile = FeedbackTile;

  const Round round;
  const FeedbackArgs<T>& args;
  FeedbackShared<Round>& shared;
  int64_t row;    // the stripe's first row
  float* errors;  // the stripe's errors
  int stride;     // between the rows of `errors`
  uint8_t* codes;

  __device__ __forceinline__ int lane() const { return threadIdx.x % tile::kWarp; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / tile::kWarp; }
  __device__ __forceinline__ int rows() const { return blockDim.x / tile::kWarp * Tile::kRows; }
  // Rows past the last one repeat it, and their results are discarded.
  __device__ __forceinline__ int64_t row_of(int r) const { return min(row + warp() * Tile::kRows + r, args.n - 1); }

  // Stages the columns of the batch's places, and the inverses of feedback's diagonal at these places. Call from all
  // threads, and synchronize afterwards.
  __device__ __forceinline__ void stage_places(int first) const {
    for (int i = threadIdx.x; i < Tile::kBatch; i += blockDim.x) {
      const int64_t place = first + i;
      const int64_t column = place < args.k ? args.order[place] : 0;
      shared.column[i] = static_cast<uint64_t>(column) < static_cast<uint64_t>(args.k) ? static_cast<int>(column) : 0;
      shared.inverse_diagonal[i] = place < args.k ? __frcp_rn(args.feedback[place * args.k + place]) : 0.0f;
    }
  }

  // Starts the copies of a chunk. All warps together copy its factors for the batch's places, with zeros beyond k. If
  // the chunk lies before the batch, each warp also copies the errors of its own rows.
  template <bool kAligned>
  __device__ __forceinline__ void stage_chunk(int chunk, int first) const {
    constexpr int kFloats = 4;  // in 16 bytes
    const int stage = chunk % Tile::kStages, place = chunk * Tile::kChunk;
    constexpr int kWidth = kAligned ? kFloats : 1, kSteps = Tile::kPerLane / kWidth;
    const int warps = blockDim.x / tile::kWarp, at = first + lane() * kWidth, rows_left = args.k - place;
    const float* from = args.feedback + int64_t{place + warp()} * args.k + at;
    uint32_t to = ptx::shared_address(&shared.factors[stage][warp()][lane() * kWidth]);
    for (int p = warp(); p < Tile::kChunk; p += warps) {
      tile::unroll<kSteps>([&](auto step) {
        constexpr int kFurther = step * tile::kWarp * kWidth;
        const bool inside = p < rows_left && at + kFurther < args.k;
        if constexpr (kAligned) {
          ptx::cp_async_16(to, from, inside ? 16 : 0);
        } else {
          ptx::cp_async_4(to + kFurther * 4, from + kFurther, inside ? 4 : 0);
        }
      });
      from += int64_t{warps} * args.k;
      to += warps * sizeof(shared.factors[0][0]);
    }
    constexpr int kPieces = Tile::kChunk / kFloats;
    static_assert(Tile::kRows * kPieces <= tile::kWarp);
    if (place < first && lane() < Tile::kRows * kPieces) {
      const int r = warp() * Tile::kRows + lane() / kPieces, at = lane() % kPieces * kFloats;
      ptx::cp_async_16(ptx::shared_address(&shared.errors[stage][r][at]), errors + int64_t{r} * stride + place + at,
                       16);
    }
  }

  __device__ __forceinline__ void load_weights(FeedbackWeights& weights) const {
    int column[Tile::kPerLane];
    for (int c = 0; c < Tile::kPerLane; ++c) column[c] = shared.column[lane() * Tile::kPerLane + c];
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      const T* const from = args.w + row_of(r) * args.k;
#pragma unroll
      for (int c = 0; c < Tile::kPerLane; ++c) weights[r][c] = tile::widen(from[column[c]]);
    }
    const int r = lane() % Tile::kRows;
    const int64_t first = row_of(r) * args.k;
#pragma unroll 4
    for (int i = lane() / Tile::kRows; i < Tile::kBatch; i += tile::kWarp / Tile::kRows) {
      const float scale = args.absmax[(first + shared.column[i]) >> args.block_shift];
      shared.scales[warp()][i][r] = {scale, inverse_scale(scale)};
    }
    __syncwarp();
  }

  // weights -= errors · factors, for the errors of a chunk before the batch.
  __device__ __forceinline__ void subtract(FeedbackWeights& weights, int stage) const {
    const auto& factors = shared.factors[stage];
    const auto* const own = &shared.errors[stage][warp() * Tile::kRows];
#pragma unroll 4
    for (int place = 0; place < Tile::kChunk; place += 4) {
      float error[Tile::kRows][4];
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) {
        const float4 v = *reinterpret_cast<const float4*>(&own[r][place]);
        error[r][0] = v.x, error[r][1] = v.y, error[r][2] = v.z, error[r][3] = v.w;
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const float4 v = *reinterpret_cast<const float4*>(&factors[place + p][lane() * Tile::kPerLane]);
        const float factor[] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
          for (int c = 0; c < Tile::kPerLane; ++c) {
            weights[r][c] = __fsub_rn(weights[r][c], __fmul_rn(error[r][p], factor[c]));
          }
        }
      }
    }
  }

  // Rounds place kPlace of lane `owner`. Lane l rounds row l % 4, and then all lanes get the errors.
  template <int kPlace>
  __device__ __forceinline__ void round_place(FeedbackWeights& weights, int owner, const float (&factors)[Tile::kBatch],
                                              uint32_t table) const {
    constexpr uint32_t kAll = 0xFFFFFFFFu;
    const int place = owner * Tile::kPerLane + kPlace, row_of_lane = lane() % Tile::kRows;
    const FeedbackScale scale = shared.scales[warp()][place][row_of_lane];
    const float4 v = *reinterpret_cast<const float4*>(&factors[lane() * Tile::kPerLane]);
    const float factor[] = {v.x, v.y, v.z, v.w};
    float w = 0.0f;
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      const float of_row = __shfl_sync(kAll, weights[r][kPlace], owner);
      w = row_of_lane == r ? of_row : w;
    }
    const uint32_t found = round.place(__fmul_rn(w, scale.inverse), table);
    const float rounded = __fmul_rn(Round::value_at(found), scale.scale);
    const float error = __fmul_rn(__fsub_rn(w, rounded), shared.inverse_diagonal[place]);
    if (lane() < Tile::kRows) {
      const int64_t code = int64_t{warp() * Tile::kRows + lane()} * args.k + shared.column[place];
      codes[code] = static_cast<uint8_t>(Round::code_at(found));
    }
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      const float of_row = __shfl_sync(kAll, error, r);
#pragma unroll
      for (int c = 0; c < Tile::kPerLane; ++c) {
        const float changed = __fsub_rn(weights[r][c], __fmul_rn(of_row, factor[c]));
        const bool later = c > kPlace ? lane() >= owner : lane() > owner;
        weights[r][c] = later ? changed : weights[r][c];
      }
      weights[r][kPlace] = lane() == owner ? of_row : weights[r][kPlace];
    }
  }

  // Rounds the places of a chunk within the batch. `chunk_first` is the chunk's first place.
  __device__ __forceinline__ void round_chunk(FeedbackWeights& weights, int stage, int first, int chunk_first,
                                              uint32_t table) const {
#pragma unroll 1
    for (int p = 0; p < Tile::kChunk; p += Tile::kPerLane) {
      const int owner = (chunk_first - first + p) / Tile::kPerLane;
      tile::unroll<Tile::kPerLane>([&](auto i) {
        if (chunk_first + p + i >= args.k) return;
        round_place<i>(weights, owner, shared.factors[stage][p + i], table);
      });
    }
  }

  __device__ __forceinline__ void store_errors(const FeedbackWeights& weights, int first) const {
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      float* const to = errors + int64_t{warp() * Tile::kRows + r} * stride + first + lane() * Tile::kPerLane;
      *reinterpret_cast<float4*>(to) = make_float4(weights[r][0], weights[r][1], weights[r][2], weights[r][3]);
    }
  }

  template <bool kAligned>
  __device__ __forceinline__ void round_batch(int first, uint32_t table) const {
    const int chunks = ceil_div(min(first + Tile::kBatch, args.k), Tile::kChunk);
    __syncthreads();  // the previous batch has finished with shared memory, and has written its errors
    stage_places(first);
    for (int chunk = 0; chunk < Tile::kStages - 1; ++chunk) {
      if (chunk < chunks) stage_chunk<kAligned>(chunk, first);
      ptx::cp_async_commit();
    }
    __syncthreads();
    FeedbackWeights weights;
    load_weights(weights);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ptx::cp_async_wait<Tile::kStages - 2>();
      __syncthreads();
      if (chunk + Tile::kStages - 1 < chunks) stage_chunk<kAligned>(chunk + Tile::kStages - 1, first);
      ptx::cp_async_commit();
      const int place = chunk * Tile::kChunk;
      if (place < first) {
        subtract(weights, chunk % Tile::kStages);
      } else {
        round_chunk(weights, chunk % Tile::kStages, first, place, table);
      }
    }
    store_errors(weights, first);
  }

  // Packs the stripe's codes. Stripes have at least 8 rows, so each begins at a whole word of packed codes. If the
  // number of codes is odd, the low half of the last byte is the zero code.
  __device__ __forceinline__ void pack() const {
    constexpr int kAtOnce = 8;
    const int64_t count = min(int64_t{rows()}, args.n - row) * args.k;
    uint8_t* const out = args.packed + row * args.k / 2;
    for (int64_t i = int64_t{threadIdx.x} * kAtOnce; i < count; i += int64_t{blockDim.x} * kAtOnce) {
      const uint2 eight = *reinterpret_cast<const uint2*>(codes + i);
      uint32_t word = 0;
#pragma unroll
      for (int pair = 0; pair < kAtOnce / 2; ++pair) {
        const uint32_t two = (pair < 2 ? eight.x : eight.y) >> (pair % 2 * 16) & 0x0F0Fu;
        word |= ((two << 4 | two >> 8) & 0xFFu) << (pair * 8);
      }
      if (i + kAtOnce <= count) {
        *reinterpret_cast<uint32_t*>(out + i / 2) = word;
        continue;
      }
      for (int64_t j = i; j < count; j += 2) {
        const uint32_t byte = word >> ((j - i) * 4) & 0xFFu;
        out[j / 2] = static_cast<uint8_t>(j + 1 < count ? byte : (byte & 0xF0u) | args.zero_code);
      }
    }
  }
};

// kAligned: the rows of the factors begin at multiples of 16 bytes.
template <class Round, class T, bool kAligned>
__global__ __launch_bounds__(FeedbackTile::kMaxWarps* tile::kWarp,
                             2) void encode_nf4_feedback_kernel(const Round round, const FeedbackArgs<T> args) {
  extern __shared__ __align__(tile::EncodeCells::kBytes) unsigned char memory[];
  FeedbackShared<Round>& shared = *reinterpret_cast<FeedbackShared<Round>*>(memory);
  round.stage(&shared.table);
  const uint32_t table = ptx::shared_address(&shared.table);
  const int warps = blockDim.x / tile::kWarp, rows = warps * FeedbackTile::kRows;
  const int stride = static_cast<int>(padded_places(args.k));
  float* const errors = args.errors + int64_t{blockIdx.x} * rows * stride;
  uint8_t* const codes = args.codes + blockIdx.x * stripe_codes(args.k, warps);
  for (int64_t row = int64_t{blockIdx.x} * rows; row < args.n; row += int64_t{gridDim.x} * rows) {
    const FeedbackStripe<Round, T> stripe = {round, args, shared, row, errors, stride, codes};
    for (int first = 0; first < args.k; first += FeedbackTile::kBatch) {
      stripe.template round_batch<kAligned>(first, table);
    }
    __syncthreads();
    stripe.pack();
  }
}

}  // namespace qlora::kernels
