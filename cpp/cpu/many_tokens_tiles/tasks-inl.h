// How a product is cut into tasks, and the scratch of them.
#pragma once

#include <cstdint>

#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/many_tokens_tiles/low_rank-inl.h"
#include "cpp/cpu/many_tokens_tiles/multiply-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

using many_tokens::Cut;
using many_tokens::Grid;

// Tokens that share a dense panel. W is decoded anew for each such chunk.
inline Cut chunks(int64_t tokens, int64_t depth) {
  constexpr int64_t kPanelBytes = int64_t{1280} << 10, kLeast = 256;
  const int64_t fit = kPanelBytes / (2 * max(depth, 1)) & -kPair;
  return many_tokens::cut(tokens, max(fit, kLeast), kPair);
}

// Fetches runs of packed weights into the second-level cache, some lines a step.
class Fetch {
 public:
  Fetch() = default;
  // `rows` runs of `columns` weights, the first of which begins at weight `first`, in `steps` steps.
  Fetch(const Weight& w, int64_t first, int64_t rows, int64_t columns, int64_t steps)
      : packed_(w.packed + (first >> 1)), stride_(w.k >> 1), rows_(rows), lines_(ceil_div(columns, 2 * kLine) + 1) {
    if (columns % (2 * kLine) == 0 && first % (2 * kLine) == 0 && w.k % (2 * kLine) == 0) --lines_;
    each_ = steps > 0 ? ceil_div(rows_ * lines_, steps) : 0;
  }
  void step() {
    for (int64_t i = each_; i > 0 && rows_ > 0; --i) {
      __builtin_prefetch(packed_ + line_ * kLine, 0, 2);
      if (++line_ == lines_) line_ = 0, packed_ += stride_, --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes
  const uint8_t* packed_ = nullptr;
  int64_t stride_ = 0, rows_ = 0, lines_ = 0, line_ = 0, each_ = 0;
};

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
