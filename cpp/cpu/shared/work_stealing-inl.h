// Work stealing: divides items among threads of unknown speed. Each thread works through a range of its own from the
// front. When the range is empty, the thread steals the back half of what another thread has left.
//
//     thread 0               thread 1               thread 2        # done  - left
//     [######----------]     [#########-------]     [############]
//                                         ^^^^ <--- stolen by thread 2
#pragma once

#include <cstdint>

#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

class WorkStealingRanges {
 public:
  static constexpr int64_t kMaxThreads = 256;
  static constexpr int64_t kMaxItems = int64_t{1} << 31;

  // Items 0 .. items - 1 for threads 0 .. threads - 1. Ranges with fewer than `least_stolen` items are not stolen: the
  // owner finishes before a thief has them in its cache.
  WorkStealingRanges(int64_t items, int64_t threads, int64_t least_stolen)
      : threads_(threads), least_stolen_(least_stolen) {
    for (int64_t t = 0; t < threads; ++t) ranges_[t].left = bits({items * t / threads, items * (t + 1) / threads});
  }

  // Takes the first item of the thread's range, which no other thread will get, and returns the range as it was before.
  // The range is empty when no items are left for the thread.
  struct Range {
    int64_t first, end;
    bool empty() const { return first >= end; }
  };
  Range next(int64_t thread) {
    for (;;) {
      uint64_t& own = ranges_[thread].left;
      uint64_t seen = __atomic_load_n(&own, __ATOMIC_RELAXED);
      while (!range(seen).empty()) {
        const Range left = range(seen);
        if (replace(own, seen, {left.first + 1, left.end})) return left;
      }
      if (!steal(thread)) return {0, 0};
    }
  }

 private:
  // Each thread writes its range all the time, so each range has a cache line of its own.
  struct alignas(64) OwnedRange {
    uint64_t left;
  };

  static uint64_t bits(Range r) { return static_cast<uint64_t>(r.first) << 32 | static_cast<uint64_t>(r.end); }
  static Range range(uint64_t bits) {
    return {static_cast<int64_t>(bits >> 32), static_cast<int64_t>(bits & 0xFFFFFFFFu)};
  }
  // A thread never publishes the same range twice, so compare-and-swap has no ABA problem.
  static bool replace(uint64_t& left, uint64_t& seen, Range by) {
    return __atomic_compare_exchange_n(&left, &seen, bits(by), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  }

  // Looks at the ranges of a few other threads and moves the back half of the largest to the thread's own, which is
  // empty. Returns false if none is worth stealing from.
  bool steal(int64_t thread) {
    constexpr int64_t kVictims = 8;  // with many threads, looking at all would take as long as the work
    for (;;) {
      int64_t victim = 0, most = least_stolen_ - 1;
      uint64_t seen = 0;
      for (int64_t i = 1; i <= kVictims && i < threads_; ++i) {
        const int64_t other = (thread + i) % threads_;
        const uint64_t left = __atomic_load_n(&ranges_[other].left, __ATOMIC_RELAXED);
        const int64_t count = range(left).end - range(left).first;
        if (count > most) most = count, victim = other, seen = left;
      }
      if (seen == 0) return false;
      const Range left = range(seen);
      const int64_t middle = left.end - (most + 1) / 2;
      if (replace(ranges_[victim].left, seen, {left.first, middle})) {
        __atomic_store_n(&ranges_[thread].left, bits({middle, left.end}), __ATOMIC_RELAXED);
        return true;
      }
    }
  }

  const int64_t threads_, least_stolen_;
  OwnedRange ranges_[kMaxThreads];
};

// Calls body(ranges, thread) in threads of the pool, as many as get `grain` items each; the last may get fewer.
template <class Body>
void run_stealing(const Pool& pool, int64_t items, int64_t grain, int64_t least_stolen, const Body& body) {
  const int64_t threads = max(1, min(min(pool.threads, WorkStealingRanges::kMaxThreads), ceil_div(items, grain)));
  WorkStealingRanges ranges(items, threads, least_stolen);
  auto run_threads = [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) body(ranges, thread);
  };
  pool(threads, 1, run_threads);
}

// Calls task(i) for i in [0, count), each in a thread that has nothing else to do.
template <class Task>
void run_tasks(const Pool& pool, int64_t count, const Task& task) {
  run_stealing(pool, count, 1, 1, [&](WorkStealingRanges& ranges, int64_t thread) {
    for (auto left = ranges.next(thread); !left.empty(); left = ranges.next(thread)) task(left.first);
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
