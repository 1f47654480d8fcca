// Software prefetches, of cache lines and of page translations.
//
//   prefetch               all lines of a range, at once
//   LinePrefetcher         the lines of rows of bytes, a few per step of other work
//   WeightLinePrefetcher   the lines of weight rows, which may begin inside a byte, one per step
//   StripLinePrefetcher    the lines of a strip of weight rows, one per step, without an end
//   PagePrefetcher         the translations of the pages of a range
//   RowPagePrefetcher      the translations of the pages of weight rows, in bursts
//
// A core has few requests in flight at a time. So lines are requested between the steps of a multiplication rather than
// at once.
//
// Packed weights are streamed with line prefetches. A prefetch that misses the TLB waits for a page walk and delays
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

inline constexpr int64_t kCacheLine = 64;  // bytes

// Prefetches every line of [begin, begin + bytes). `begin` may be null if `bytes` is 0.
inline void prefetch(const void* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(static_cast<const char*>(begin) + i);
}

class LinePrefetcher {
 public:
  LinePrefetcher() = default;
  // `rows` rows of `bytes` each, `stride` bytes apart, within `steps` calls of step().
  LinePrefetcher(const void* first, int64_t rows, int64_t bytes, int64_t stride, int64_t steps)
      : row_(static_cast<const char*>(first)), rows_(rows), bytes_(bytes), stride_(stride) {
    if (bytes <= 0) rows_ = 0;
    lines_per_step_ = ceil_div(rows_ * ceil_div(bytes, kCacheLine), max(steps, 1));
  }
  void step() {
    for (int64_t i = 0; i < lines_per_step_ && rows_ > 0; ++i) {
      __builtin_prefetch(row_ + done_, 0, 2);
      done_ += kCacheLine;
      if (done_ >= bytes_) done_ = 0, row_ += stride_, --rows_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t rows_ = 0, bytes_ = 0, stride_ = 0, done_ = 0, lines_per_step_ = 0;
};

// What many_tokens calls interleaved work: it passes the result of constants(), here nothing, to every step.
class WeightLinePrefetcher {
 public:
  struct Constants {};
  Constants constants() const { return {}; }

  WeightLinePrefetcher() = default;
  // `rows` rows of `columns` packed weights. The first begins at weight `first` of `packed`, and each of the others
  // `stride` weights after the previous one.
  WeightLinePrefetcher(const uint8_t* packed, int64_t first, int64_t rows, int64_t stride, int64_t columns)
      : packed_(packed), weight_(first), rows_(columns > 0 ? rows : 0), stride_(stride), columns_(columns) {}
  void step(Constants = {}) {
    if (rows_ <= 0) return;
    __builtin_prefetch(packed_ + ((weight_ + done_) >> 1), 0, 2);
    done_ += kLineWeights;
    if (done_ < columns_ + kLineWeights - 1) return;  // a row may begin inside a line
    done_ = 0, weight_ += stride_, --rows_;
  }

 private:
  static constexpr int64_t kLineWeights = 2 * kCacheLine;
  const uint8_t* packed_ = nullptr;
  int64_t weight_ = 0, rows_ = 0, stride_ = 0, columns_ = 0, done_ = 0;
};

// Follows whole rows even where a strip is processed column by column: the lines of a page arrive later from memory if
// they are requested in two halves.
class StripLinePrefetcher {
 public:
  // The `bytes` of each row that are the strip's, from `row` on; rows are `row_bytes` long. Rows that are the strip's
  // as a whole are one run, `whole_rows` rows at a time.
  StripLinePrefetcher(const uint8_t* row, int64_t bytes, int64_t row_bytes, int64_t whole_rows)
      : line_(row),
        end_(bytes < row_bytes ? row + bytes : row + whole_rows * row_bytes),
        gap_(row_bytes - bytes),
        row_bytes_(row_bytes) {}
  void step() {
    __builtin_prefetch(line_, 0, 2);
    line_ += kCacheLine;
    if (line_ >= end_) line_ = end_ + gap_, end_ += row_bytes_;
  }

 private:
  const uint8_t *line_, *end_;
  int64_t gap_, row_bytes_;
};

class PagePrefetcher {
 public:
  // Prefetches one line of every page that [begin, end) overlaps, but for the last page of the previous call.
  void operator()(const uint8_t* begin, const uint8_t* end) {
    for (const uint8_t* p = begin; p < end; p = page(p) + kPageBytes) {
      if (page(p) != last_) __builtin_prefetch(p, 0, 1);
      last_ = page(p);
    }
  }

 private:
  static constexpr int64_t kPageBytes = 4096;
  static const uint8_t* page(const uint8_t* p) { return p - reinterpret_cast<uintptr_t>(p) % kPageBytes; }
  const uint8_t* last_ = nullptr;
};

// Columns [column, column + columns) of a weight's rows, in order, a burst of rows at a time.
class RowPagePrefetcher {
 public:
  RowPagePrefetcher(const Weight& w, int64_t column, int64_t columns) : w_(w), column_(column), columns_(columns) {}

  // Continues with the rows [row, end).
  void go_to(int64_t row, int64_t end) { next_ = row, end_ = end; }

  // Ensures that the pages of all rows before `row` have been prefetched. If not, prefetches those of another burst.
  void reach(int64_t row) {
    if (next_ >= row || next_ >= end_) return;
    const int64_t burst = kBurstBytes / max(w_.bytes(w_.k), 1);  // rows
    row = min(row + burst, end_);
    const int64_t step = columns_ == w_.k ? row - next_ : 1;  // whole rows are contiguous
    for (; next_ < row; next_ += step) {
      const int64_t first = next_ * w_.k + column_, last = first + (step - 1) * w_.k + columns_;
      prefetch_pages_(w_.packed + w_.bytes(first), w_.packed + w_.bytes(last));
    }
  }

 private:
  static constexpr int64_t kBurstBytes = 64 << 10;  // of packed weights

  const Weight& w_;
  int64_t next_ = 0, end_ = 0;
  const int64_t column_, columns_;
  PagePrefetcher prefetch_pages_;
};

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
