// Page translations brought in before they are needed. Included inside an anonymous namespace, once an instruction set.
//
// A software prefetch retires only when its address has been translated, so one that begins a page holds up all behind
// it for a page walk (400 cycles in a virtual machine on Zen 5: a third of what streaming packed weights took there).
// Loads of several pages, one right after another, wait for their walks together.
#pragma once

class PageToucher {
 public:
  // Reads a byte of every page that [begin, end) reaches into.
  void operator()(const uint8_t* begin, const uint8_t* end) {
    for (const uint8_t* p = begin; p < end; p = page(p) + kPage) {
      if (page(p) != last_) static_cast<void>(*static_cast<const volatile uint8_t*>(p));
      last_ = page(p);
    }
  }

 private:
  static constexpr int64_t kPage = 4096;
  static const uint8_t* page(const uint8_t* p) { return p - reinterpret_cast<uintptr_t>(p) % kPage; }
  const uint8_t* last_ = nullptr;
};

// Touches the pages of some columns of a weight's rows [row, end), many in a burst, before they are needed.
class PagesAhead {
 public:
  PagesAhead(const Weight& w, int64_t row, int64_t end, int64_t column, int64_t columns)
      : w_(w), known_(row), end_(end), column_(column), columns_(columns) {}

  // After it those of all rows before `row` are known.
  void know(int64_t row) {
    if (known_ >= row || known_ >= end_) return;
    const int64_t burst = 2 * kBurstBytes / (w_.k > 0 ? w_.k : 1);
    row = row + burst < end_ ? row + burst : end_;
    const int64_t step = columns_ == w_.k ? row - known_ : 1;  // whole rows follow each other
    for (; known_ < row; known_ += step) {
      const int64_t first = known_ * w_.k + column_, last = first + (step - 1) * w_.k + columns_;
      touch_(w_.packed + (first >> 1), w_.packed + (last >> 1));
    }
  }

 private:
  static constexpr int64_t kBurstBytes = 64 << 10;

  const Weight& w_;
  int64_t known_, end_, column_, columns_;
  PageToucher touch_;
};
