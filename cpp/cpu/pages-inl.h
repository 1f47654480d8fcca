// Page translations brought in before they are needed. Included inside an anonymous namespace, once an instruction set.
//
// A software prefetch retires only when its address has been translated, so one that begins a page holds up all behind
// it for a page walk (400 cycles in a virtual machine on Zen 5: a third of what streaming packed weights took there).
// Loads of several pages, one right after another, wait for their walks together.
#pragma once

inline constexpr int64_t kBurstBytes = 64 << 10;  // whose pages are touched together

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
