// Work shared out to threads of which nobody knows how fast they will be: each goes through a part of its own from the
// front, and when it has come to the end takes the back half of what another one has left.
//
//     part 0                 part 1                 part 2          # done  - left
//     [######----------]     [#########-------]     [############]
//                                         ^^^^ <--- taken over by thread 2
#pragma once

#include <cstdint>

#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

class Shares {
 public:
  static constexpr int64_t kMostThreads = 256;
  static constexpr int64_t kMostItems = int64_t{1} << 31;

  // 0 .. items - 1, for threads 0 .. threads - 1. Who has less than `worth_taking` left is done before anybody else had
  // that in its cache.
  Shares(int64_t items, int64_t threads, int64_t worth_taking) : threads_(threads), worth_taking_(worth_taking) {
    for (int64_t t = 0; t < threads; ++t) parts_[t].left = bits({items * t / threads, items * (t + 1) / threads});
  }

  // What a thread has left, of which it is to do the first; nobody else will. Empty when all has been given out.
  struct Range {
    int64_t first, end;
    bool empty() const { return first >= end; }
  };
  Range next(int64_t thread) {
    for (;;) {
      uint64_t& own = parts_[thread].left;
      uint64_t seen = __atomic_load_n(&own, __ATOMIC_RELAXED);
      while (!range(seen).empty()) {
        const Range left = range(seen);
        if (replace(own, seen, {left.first + 1, left.end})) return left;
      }
      if (!take_over(thread)) return {0, 0};
    }
  }

 private:
  // A line of its own each, for others write to theirs all the time.
  struct alignas(64) Part {
    uint64_t left;
  };

  static uint64_t bits(Range r) { return static_cast<uint64_t>(r.first) << 32 | static_cast<uint64_t>(r.end); }
  static Range range(uint64_t bits) {
    return {static_cast<int64_t>(bits >> 32), static_cast<int64_t>(bits & 0xFFFFFFFFu)};
  }
  // No range comes twice, so that one which is found again was never away.
  static bool replace(uint64_t& left, uint64_t& seen, Range by) {
    return __atomic_compare_exchange_n(&left, &seen, bits(by), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  }

  // Moves the back half of another part, the largest of those that are looked at, to the thread's, which is empty.
  // False where none is worth it.
  bool take_over(int64_t thread) {
    constexpr int64_t kLooksAt = 8;  // all would take as long as the work, where there are many
    for (;;) {
      int64_t victim = 0, most = worth_taking_ - 1;
      uint64_t seen = 0;
      for (int64_t i = 1; i <= kLooksAt && i < threads_; ++i) {
        const int64_t other = (thread + i) % threads_;
        const uint64_t left = __atomic_load_n(&parts_[other].left, __ATOMIC_RELAXED);
        const int64_t count = range(left).end - range(left).first;
        if (count > most) most = count, victim = other, seen = left;
      }
      if (seen == 0) return false;
      const Range left = range(seen);
      const int64_t middle = left.end - (most + 1) / 2;
      if (replace(parts_[victim].left, seen, {left.first, middle})) {
        __atomic_store_n(&parts_[thread].left, bits({middle, left.end}), __ATOMIC_RELAXED);
        return true;
      }
    }
  }

  const int64_t threads_, worth_taking_;
  Part parts_[kMostThreads];
};

// Runs body(shares, thread) in threads of the pool, as many as have `grain` items each, but for the last.
template <class Body>
void share_out(const Pool& pool, int64_t items, int64_t grain, int64_t worth_taking, const Body& body) {
  const int64_t threads = max(1, min(min(pool.threads, Shares::kMostThreads), ceil_div(items, grain)));
  Shares shares(items, threads, worth_taking);
  auto piece = [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) body(shares, thread);
  };
  pool(threads, 1, piece);
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
