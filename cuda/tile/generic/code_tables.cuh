// The code tables on the device. They live in constant memory, which serves one address per cycle. A kernel whose lanes
// look up different codes therefore copies the tables it needs to shared memory first.
#pragma once

#include <cstdint>
#include <limits>

#include "cpp/format/codes.h"
#include "cpp/format/dynamic8.h"

namespace qlora::tile {

// The 16 values of a code, and the tables for encoding.
struct DeviceCode {
  float value[kCodes] = {}, ranked[kCodes] = {}, boundary[kCodes] = {}, gap[kCodes] = {};
  uint32_t code_of_rank[kCodes] = {};

  constexpr DeviceCode() = default;
  explicit constexpr DeviceCode(const CodeTable& table) {
    for (int i = 0; i < kCodes; ++i) {
      const bool is_last = i + 1 == kCodes;
      value[i] = table.value[i];
      ranked[i] = table.ranked[i];
      code_of_rank[i] = table.code_of_rank[i];
      boundary[i] = is_last ? std::numeric_limits<float>::infinity() : table.boundary[i];
      gap[i] = is_last ? 0.0f : table.gap[i];
    }
  }
};
static __constant__ PerCode<DeviceCode> c_codes{};
static __constant__ Dynamic8Table c_dynamic8{};

// The code that a kernel decodes. Kernels that store its values as 16-bit numbers (pair_table.cuh) store round(value *
// factor), and multiply scales by `unfactor`.
struct CodeView {
  int index = 0;  // in kCodeTables, or kCodeTableCount: the code has no name, and its values are `custom`
  float factor = 1.0f, unfactor = 1.0f;
  float custom[kCodes] = {};
  struct {
    uint8_t bits = 4, kind = 0, zero = 0;  // of WideCode
  } wide;                                  // for kernels that are compiled for wide codes

  // Whether the values ascend by 1 from first_integer() on.
  __device__ __forceinline__ bool is_integer() const { return is_consecutive(static_cast<Code>(index)); }
  __device__ __forceinline__ float first_integer() const {
    return index == static_cast<int>(Code::kInt4) ? -8.0f : 0.0f;
  }

  // Calls use(value_of), where value_of(code) looks up a value. The lanes of a warp may ask for different codes. An
  // array of parameters must not be indexed by a variable, because the compiler would copy it to local memory.
  template <class Use>
  __device__ __forceinline__ void with_values(const Use& use) const {
    if (index < kCodeTableCount) {
      const auto& value = c_codes.of[index].value;
      use([&](int code) { return value[code]; });
    } else {
      use([&](int code) {
        float found = custom[0];
#pragma unroll
        for (int i = 1; i < kCodes; ++i) found = code == i ? custom[i] : found;
        return found;
      });
    }
  }
};

inline CodeView make_code_view(Code code) {
  CodeView view;
  view.index = static_cast<int>(code);
  if (view.index < kCodeTableCount) return view;
  if (is_wide(code)) {
    const WideCode& wide = wide_code(code);
    view.wide = {static_cast<uint8_t>(wide.bits), static_cast<uint8_t>(wide.kind), static_cast<uint8_t>(wide.zero)};
    return view;
  }
  view.index = kCodeTableCount;
  const CodeTable& table = table_of(code);
  for (int i = 0; i < kCodes; ++i) view.custom[i] = table.value[i];
  return view;
}

// Copies the 16 values to shared memory. The CTA needs at least 16 threads, and must synchronize afterwards.
__device__ __forceinline__ void stage_values(float (&shared)[kCodes], const CodeView& code) {
  if (threadIdx.x >= kCodes) return;
  code.with_values([&](const auto& value_of) { shared[threadIdx.x] = value_of(static_cast<int>(threadIdx.x)); });
}

// The same for a wide code. The CTA needs at least 256 threads. Of fewer than 8 bits, the rest is not used.
inline constexpr int kWideValues = 256;
__device__ __forceinline__ void stage_values(float (&shared)[kWideValues], const CodeView& code) {
  if (threadIdx.x >= kWideValues) return;
  const auto kind = static_cast<WideCode::Kind>(code.wide.kind);
  shared[threadIdx.x] = wide_value(kind, code.wide.zero, static_cast<int>(threadIdx.x));
}

// How many values kernels stage.
template <bool kWide>
inline constexpr int kStagedValues = kWide ? kWideValues : kCodes;

// Tables for encoding by lookup. q in [-1, 1] falls into one of 32 cells, and each cell holds at most one decision
// boundary, so
//   code = base[cell] + (q > boundary[cell])
// is exact. 32 words lie in 32 banks, so a warp's gather has no bank conflicts. This works for codes that ascend with
// their values, whose largest value is 1 and whose boundaries lie far enough apart (is_exact).
//
// The cell comes from j = round(62 q + 62), 0..124. Adding 2^23 makes j land in the low mantissa bits, and (j & 0x7C)
// is 4 * cell, the byte offset itself. Any monotone map would work; this one costs two instructions.
struct EncodeCells {
  static constexpr int kCells = 32;
  static constexpr float kSlope = 62.0f;
  static constexpr float kShift = 62.0f + 8388608.0f;
  static constexpr uint32_t kOffsetMask = 0x7C;
  static constexpr int kBytes = 2 * kCells * 4;  // also the alignment the masked offset relies on

  float boundary[kCells] = {};
  uint32_t base[kCells] = {};

  constexpr EncodeCells() = default;
  explicit constexpr EncodeCells(const CodeTable& table) {
    if (serves(table)) fill(table.boundary, kCodes - 1);
  }
  // The same for any other points in (-1, 1) at which the code changes.
  constexpr EncodeCells(const float* boundaries, int count) { fill(boundaries, count); }

  static constexpr int cell_of(float q) { return static_cast<int>(62.0 * q + 62.0 + 0.5) >> 2; }

  // True if no boundary shares its cell with another, none lies so near a cell's edge that its cell depends on how j is
  // rounded, and none is in the last cell, to which everything above 1 is rounded.
  static constexpr bool is_exact(const float* boundaries, int count) {
    for (int i = 0; i < count; ++i) {
      const double j = 62.0 * boundaries[i] + 62.0;
      if (static_cast<int>(j + 0.501) != static_cast<int>(j + 0.499)) return false;
      if (i && cell_of(boundaries[i]) == cell_of(boundaries[i - 1])) return false;
      if (cell_of(boundaries[i]) == kCells - 1) return false;
    }
    return true;
  }
  static constexpr bool serves(const CodeTable& table) {
    return table.is_ascending && table.largest == 1.0f && is_exact(table.boundary, kCodes - 1);
  }

 private:
  constexpr void fill(const float* boundaries, int count) {
    for (int cell = 0; cell < kCells; ++cell) {
      boundary[cell] = std::numeric_limits<float>::infinity();  // no q is above it
      for (int i = 0; i < count; ++i) {
        base[cell] += cell_of(boundaries[i]) < cell;
        if (cell_of(boundaries[i]) == cell) boundary[cell] = boundaries[i];
      }
    }
  }
};
static_assert(sizeof(EncodeCells) == EncodeCells::kBytes && EncodeCells::serves(table_of(Code::kNf4)));

static __constant__ PerCode<EncodeCells> c_encode{};

// Copies a constant table to shared memory, one word per thread. The CTA needs at least kWords threads, and must
// synchronize afterwards.
template <int kWords, class Word>
__device__ __forceinline__ void stage_table(Word (&shared)[kWords], const Word (&table)[kWords]) {
  if (threadIdx.x < kWords) shared[threadIdx.x] = table[threadIdx.x];
}

}  // namespace qlora::tile
