// The tile of the 16-bit GEMM on mma.sync: out [128 tokens, 256 columns] = left [128, inner] · right [inner, 256], in
// stages of 32 terms. Eight warps, two along the tokens and four along the columns, sum 64 x 64 outputs each.
//
// A stage in shared memory has the 128 lines of `left`, and after them `right` in one of two forms. Both keep the order
// of global memory, and both are swizzled so that the 8 rows of a matrix that ldmatrix reads lie in different banks:
//
//   lines     a line is a token, or a column of a `right` given as [columns, inner]. It has 32 terms, 4 chunks of 16
//             bytes. Chunk c of line i is stored at chunk c ^ i / 2 % 4 of line i.
//   rows      a row is a term of a `right` given as [inner, columns]. It has 256 columns, 32 chunks of 16 bytes.
//             Chunk c of row i is stored at chunk c ^ i % 8 of row i. ldmatrix transposes.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/unroll.cuh"

namespace qlora::tile {

inline constexpr int kGemmTokens = 128, kGemmColumns = 256, kGemmTerms = 32;
inline constexpr int kGemmThreads = 256;
inline constexpr int kGemmWarp = 64;  // tokens and columns of a warp
inline constexpr int kGemmStages = 4;
inline constexpr int kGemmLineBytes = kGemmTerms * 2, kGemmRowBytes = kGemmColumns * 2;
inline constexpr int kGemmLeftBytes = kGemmTokens * kGemmLineBytes;
inline constexpr int kGemmStageBytes = kGemmLeftBytes + kGemmColumns * kGemmLineBytes;
inline constexpr int kGemmSharedBytes = kGemmStages * kGemmStageBytes;
inline constexpr int kGemmStep = 16;  // terms of an mma

__device__ __forceinline__ uint32_t gemm_line_chunk(int line, int chunk) {
  return line * kGemmLineBytes + ((chunk ^ (line / 2 % 4)) << 4);
}
__device__ __forceinline__ uint32_t gemm_row_chunk(int row, int chunk) {
  return row * kGemmRowBytes + ((chunk ^ (row % 8)) << 4);
}

// Copies this thread's chunks of kLines lines, stage by stage. A matrix whose rows do not begin at multiples of 16
// bytes is read element by element.
template <class T, int kLines>
class GemmLineCopier {
  static constexpr int kChunks = kGemmLineBytes / 16, kLineStep = kGemmThreads / kChunks, kCopies = kLines / kLineStep;
  static_assert(kLineStep % 8 == 0);

 public:
  // Begins with the first stage of `matrix` [lines, terms]. The tile's first line is `line0`.
  __device__ __forceinline__ void begin(const T* matrix, int64_t line0, int64_t lines, int64_t terms) {
    const int line = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    source_ = matrix + (line0 + line) * terms + 8 * chunk;
    line_step_ = kLineStep * terms;
    terms_ = static_cast<int>(terms) - 8 * chunk;
    lines_ = static_cast<int>(min(lines - line0 - line, int64_t{kLines}));
    aligned_ = terms % 8 == 0;
  }

  __device__ __forceinline__ void skip(int stages) {
    source_ += int64_t{stages} * kGemmTerms;
    terms_ -= stages * kGemmTerms;
  }

  __device__ __forceinline__ void copy(uint32_t stage) {
    const uint32_t to = stage + gemm_line_chunk(threadIdx.x / kChunks, threadIdx.x % kChunks);
    const T* from = source_;
    if (aligned_) {
      unroll<kCopies>([&](auto i) {
        ptx::cp_async_16<i * kLineStep * kGemmLineBytes>(to, from, i * kLineStep < lines_ && terms_ > 0 ? 16 : 0);
        from += line_step_;
      });
    } else {
#pragma unroll 1
      for (int i = 0; i < kCopies; ++i, from += line_step_)
        ptx::store_shared_v4(to + i * kLineStep * kGemmLineBytes, gather(from, i * kLineStep < lines_));
    }
    source_ += kGemmTerms;
    terms_ -= kGemmTerms;
  }

 private:
  __device__ __forceinline__ uint4 gather(const T* from, bool exists) const {
    uint32_t v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = exists && i < terms_ ? from[i].bits : 0u;
    return make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
  }

  const T* source_;    // this thread's chunk of its first line in the next stage
  int64_t line_step_;  // elements from one of this thread's lines to the next
  int terms_;          // that are left from this chunk on
  int lines_;          // that exist from the first one on
  bool aligned_;
};

// The same for rows of terms. Every row begins at a multiple of 16 bytes.
template <class T>
class GemmRowCopier {
  static constexpr int kChunks = kGemmRowBytes / 16, kRowStep = kGemmThreads / kChunks, kCopies = kGemmTerms / kRowStep;
  static_assert(kRowStep % 8 == 0);

 public:
  // Begins with the first stage of `matrix` [terms, ...], whose rows are `stride` elements apart. The tile's columns
  // begin at `column0` of `columns`.
  __device__ __forceinline__ void begin(const T* matrix, int64_t column0, int64_t columns, int64_t stride,
                                        int64_t terms) {
    const int row = threadIdx.x / kChunks;
    const int64_t column = column0 + 8 * (threadIdx.x % kChunks);
    source_ = matrix + row * stride + column;
    stride_ = static_cast<int>(stride);
    terms_ = column < columns ? static_cast<int>(terms) - row : 0;
  }

  __device__ __forceinline__ void skip(int stages) {
    source_ += int64_t{stages} * kGemmTerms * stride_;
    terms_ -= stages * kGemmTerms;
  }

  __device__ __forceinline__ void copy(uint32_t stage) {
    const uint32_t to = stage + gemm_row_chunk(threadIdx.x / kChunks, threadIdx.x % kChunks);
    unroll<kCopies>([&](auto i) {
      ptx::cp_async_16<i * kRowStep * kGemmRowBytes>(to, source_, i * kRowStep < terms_ ? 16 : 0);
      source_ += int64_t{kRowStep} * stride_;
    });
    terms_ -= kGemmTerms;
  }

 private:
  const T* source_;
  int stride_, terms_;
};

// The mma operands of a warp for one step: of 4 tiles of 16 tokens, and of 4 pairs of tiles of 8 columns.
struct GemmOperands {
  uint32_t left[4][4], right[4][4];
};

// The addresses of a lane's matrix rows within a stage. ldmatrix_x4 loads
//
//   left            tokens 0-7 and 8-15 of terms 0-7, then the same of terms 8-15: a0, a1, a2, a3
//   right           terms 0-7 and 8-15 of columns 0-7, then the same of columns 8-15: b0 and b1 of two tiles
template <bool kRightHasRows>
class GemmLane {
 public:
  __device__ __forceinline__ GemmLane(int warp_token, int warp_column, int lane) {
    left_ = gemm_line_chunk(warp_token + lane % 16, lane / 16);
    right_ = kGemmLeftBytes;
    if constexpr (kRightHasRows)
      right_ += gemm_row_chunk(lane % 16, warp_column / 8 + lane / 16);
    else
      right_ += gemm_line_chunk(warp_column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  template <int kStep>
  __device__ __forceinline__ void load(uint32_t stage, GemmOperands& to) const {
    // The next step is two chunks further in a line. An exclusive or commutes with the swizzle.
    constexpr uint32_t kStepChunks = kStep * kGemmStep / 8 << 4;
    const uint32_t left = stage + (left_ ^ kStepChunks);
    unroll<4>([&](auto i) {
      ptx::ldmatrix_x4<i * 16 * kGemmLineBytes>(left, to.left[i][0], to.left[i][1], to.left[i][2], to.left[i][3]);
    });
    unroll<4>([&](auto i) {
      auto& m = to.right[i];
      if constexpr (kRightHasRows) {
        const uint32_t right = stage + (right_ ^ (i * 2 << 4));  // 16 columns further
        ptx::ldmatrix_x4_trans<kStep * kGemmStep * kGemmRowBytes>(right, m[0], m[1], m[2], m[3]);
      } else {
        const uint32_t right = stage + (right_ ^ kStepChunks);
        ptx::ldmatrix_x4<i * 16 * kGemmLineBytes>(right, m[0], m[1], m[2], m[3]);
      }
    });
  }

 private:
  uint32_t left_, right_;
};

}  // namespace qlora::tile
