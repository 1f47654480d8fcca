// Page translations brought in before they are needed. Included inside an anonymous namespace, once an instruction set.
//
// A software prefetch retires only when its address has been translated, so one that begins a page holds up all behind it
// for a page walk (400 cycles in a virtual machine on Zen 5: a third of what streaming packed weights takes there).
// Loads of several pages, one right after another, wait for their walks together.
#pragma once

class PagesAhead {
 public:
  PagesAhead(const uint8_t* data, int64_t begin, int64_t end) : data_(data), next_(begin), end_(end) {}

  // Of bytes before `needed` every page has been read from; when it reads, then further ahead.
  void reach(int64_t needed) {
    if (next_ >= needed || next_ >= end_) return;
    const int64_t far = needed + kBurst * kPage, to = far < end_ ? far : end_;
    for (; next_ < to; next_ += kPage) static_cast<void>(*static_cast<const volatile uint8_t*>(data_ + next_));
  }

 private:
  static constexpr int64_t kPage = 4096, kBurst = 16;
  const uint8_t* data_;
  int64_t next_, end_;
};
