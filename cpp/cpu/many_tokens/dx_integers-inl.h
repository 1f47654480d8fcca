// What dX in integers has besides its products: codes around zero, offsets, and the order of the sums of small blocks.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/many_tokens/dense-inl.h"
#include "cpp/cpu/many_tokens/dx-inl.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/many_tokens/weight-inl.h"
#include "cpp/cpu/many_tokens/word_f32-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

// The integers of W's codes. Beside offsets they are moved to lie around zero, and the offsets by `center` scales, so
// that the two products do not nearly cancel.
template <class Table>
struct CenteredCodes {
  Table table;
  float center = 0.0f;

  CenteredCodes(const Table& of_code, const Weight& w) : table(of_code) {
    if (!w.scales.offsets) return;
    int least = table.value[0], most = least;
    for (const int value : table.value) least = min(least, value), most = max(most, value);
    const int middle = (least + most + 1) / 2;
    for (auto& value : table.value) value = static_cast<typename Table::Value>(value - middle);
    center = static_cast<float>(middle / table.per_one);
  }
};

// dy · offsets of the groups that a task's columns form, in float32.
template <class T>
class OffsetSums {
 public:
  OffsetSums(const Weight& w, int64_t group, int64_t column, int64_t columns, int64_t tokens)
      : group_(group), column_(column), groups_(columns / group), lanes_(round_up(groups_, kLanes)), tokens_(tokens) {
    if (!w.scales.offsets) return;
    for (float& offset : offsets_) offset = 0.0f;
  }

  // Adds the product of rows [row, row + rows). `center` is what the codes' values miss of a block's scale, and
  // dy(token) points to a token's first row.
  template <class Dy>
  void add(const ScaledPiece& source, int64_t row, int64_t rows, float center, const Dy& dy) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; g < groups_; ++g) {
        const ScaleAndOffset block = source.template block_of<true>(row + r, column_ + g * group_);
        const int64_t tile = g / kTileLanes * kTileLanes, width = tile_width(lanes_ - tile);
        offsets_[tile * rows + r * width + g - tile] = block.offset + center * block.scale;
      }
    }
    WeightLinePrefetcher nothing;
    for (int64_t t = 0; t < tokens_; t += kTokens) {
      const int64_t some = min(tokens_ - t, kTokens);
      for (int64_t i = 0; i < some; ++i)
        load_broadcast<WordF32>(Matrix<T>{dy(t + i) + row, 0}, 0, 1, 0, rows, dy_ + i * kDepth);
      multiply<WordF32, kChain<T>>(dy_, some, offsets_, lanes_, static_cast<int>(rows), sums_ + t * lanes_, row == 0,
                                   nothing);
    }
  }

  // Adds a token's sums to those of its columns, of which `columns` tiles lie `stride` floats apart.
  void add_to(int64_t t, float* sums, int64_t columns, int64_t stride) const {
    const int64_t first = t / kTokens * kTokens, some = min(tokens_ - first, kTokens);
    for (int64_t c = 0; c < columns; c += kTileLanes, sums += stride) {
      const int64_t g = c / group_, tile = g / kTileLanes * kTileLanes;
      const F sum = splat(sums_[first * lanes_ + tile * some + (t - first) * tile_width(lanes_ - tile) + g - tile]);
      store(sums, panel::add(load(sums), sum)), store(sums + kLanes, panel::add(load(sums + kLanes), sum));
    }
  }

 private:
  static constexpr int64_t kTokens = 32;  // at once
  static constexpr int64_t kMostGroups = most_dx_columns(kFewDxTokens) / kLeastIntBlock, kMostSums = 4096;
  static_assert(kMostTokens * most_dx_columns(kMostTokens) / kLeastIntBlock <= kMostSums &&
                kFewDxTokens * kMostGroups <= kMostSums);

  const int64_t group_, column_, groups_, lanes_, tokens_;
  alignas(64) float dy_[kTokens * kDepth];
  alignas(64) float offsets_[kMostGroups * kDepth / 2];  // lanes panel: few tokens have more columns and fewer rows
  alignas(64) float sums_[kMostSums];                    // of kTokens tokens after the other, [tile][token][width]
};

// Reorders sums [tile][token][width] between the order of a group and that of its halves (WordInt::decode_lanes). Of a
// group's vectors 0, 1, 2, 3 the first halves come first.
inline void exchange_halves(float* sums, int64_t tokens, int64_t columns, bool to_halves) {
  constexpr int kHalf = kLanes / 2, kHalves = 8;
  for (int64_t c = 0; c < columns; c += kGroup) {
    for (int64_t t = 0; t < tokens; ++t) {
      float* const tile = sums + c * tokens + t * kTileLanes;
      const auto half = [&](int i) { return tile + i / 4 * kTileLanes * tokens + i % 4 * kHalf; };
      float copy[kHalves][kHalf];
      for (int i = 0; i < kHalves; ++i) __builtin_memcpy(copy[i], half(i), sizeof(copy[i]));
      for (int i = 0; i < kHalves; ++i) {
        const int other = i % 2 * 4 + i / 2;  // where the half goes in the order of halves
        __builtin_memcpy(half(to_halves ? other : i), copy[to_halves ? i : other], sizeof(copy[i]));
      }
    }
  }
}

// A task whose scales multiply dy in each of the groups of `group` columns that have the same.
template <class W, class T>
class DxIntegersTask : protected DxTask<W, T> {
 protected:
  DxIntegersTask(const LinearDxProblem& p, const T* g, int64_t first_token, int64_t token, int64_t tokens,
                 int64_t column, int64_t columns, int64_t group, const int64_t* places = nullptr)
      : DxTask<W, T>(p, g, first_token, token, tokens, column, columns, places),
        group_(group),
        offset_sums_(p.w, group, column, columns, tokens) {}

  // `add_weight` adds the product of codes, and calls add_offsets for each strip of rows.
  template <class AddWeight>
  void run(const AddWeight& add_weight) {
    this->begin();
    if (halves_ && this->p_.lora.rank) exchange_halves(this->sums_, this->tokens_, this->columns_, true);
    add_weight();
    if (this->p_.w.scales.offsets) {
      for (int64_t t = 0; t < this->tokens_; ++t)
        offset_sums_.add_to(t, this->sums_ + t * kTileLanes, this->columns_, this->tokens_ * kTileLanes);
    }
    if (halves_) exchange_halves(this->sums_, this->tokens_, this->columns_, false);
    this->finish();
  }
  void add_offsets(const ScaledPiece& source, const Piece& strip, float center) {
    if (!this->p_.w.scales.offsets) return;
    offset_sums_.add(source, strip.row, strip.rows, center, [this](int64_t t) { return dy(t); });
  }
  const T* dy(int64_t t) const { return static_cast<const T*>(this->p_.dy) + this->place(t) * this->p_.w.n; }

  const int64_t group_;
  const bool halves_ = group_ < kGroup;

 private:
  OffsetSums<T> offset_sums_;
};

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
