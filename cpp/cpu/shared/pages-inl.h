// Prefetches page translations.
//
// Packed weights are streamed with software prefetches. A prefetch that misses the TLB waits for a page walk and delays
// every load behind it: 400 cycles in a virtual machine on Zen 5, a third of the streaming time. Page walks overlap if
// they are requested one right after another. So a kernel touches the pages of rows that it will read, many in a burst,
// and prefetches their lines later. It touches them by prefetches, because a load could not retire before its line
// arrives from memory.
#pragma once

#include <cstdint>

#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

class PageToucher {
 public:
  // Prefetches one line of every page that [begin, end) overlaps.
  void operator()(const uint8_t* begin, const uint8_t* end) {
    for (const uint8_t* p = begin; p < end; p = page(p) + kPage) {
      if (page(p) != last_) __builtin_prefetch(p, 0, 1);
      last_ = page(p);
    }
  }

 private:
  static constexpr int64_t kPage = 4096;  // bytes
  static const uint8_t* page(const uint8_t* p) { return p - reinterpret_cast<uintptr_t>(p) % kPage; }
  const uint8_t* last_ = nullptr;
};

// Touches the pages of columns [column, column + columns) of a weight's rows, in order, a burst of rows at a time.
class PagesAhead {
 public:
  PagesAhead(const Weight& w, int64_t column, int64_t columns) : w_(w), column_(column), columns_(columns) {}

  // Continues with the rows [row, end).
  void go_to(int64_t row, int64_t end) { touched_ = row, end_ = end; }

  // Ensures that the pages of all rows before `row` have been touched. Touches those of another burst if not.
  void touch_before(int64_t row) {
    if (touched_ >= row || touched_ >= end_) return;
    const int64_t burst = 2 * kBurstBytes / max(w_.k, 1);  // rows
    row = min(row + burst, end_);
    const int64_t step = columns_ == w_.k ? row - touched_ : 1;  // whole rows are contiguous
    for (; touched_ < row; touched_ += step) {
      const int64_t first = touched_ * w_.k + column_, last = first + (step - 1) * w_.k + columns_;
      touch_(w_.packed + (first >> 1), w_.packed + (last >> 1));
    }
  }

 private:
  static constexpr int64_t kBurstBytes = 64 << 10;  // of packed weights

  const Weight& w_;
  int64_t touched_ = 0, end_ = 0;
  const int64_t column_, columns_;
  PageToucher touch_;
};

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
