// Chooses how many CTAs divide a sum.
#pragma once

#include <algorithm>
#include <cstdint>

namespace qlora::cuda {

// Returns the smallest number of parts whose `cost(parts)` is within 5% of the best among 1 .. limit. The cost models
// are no more accurate than that, and each part adds work.
template <class Cost>
constexpr int64_t cheapest_splits(int64_t limit, const Cost& cost) {
  int64_t best = cost(1);
  for (int64_t s = 2; s <= limit; ++s) best = std::min(best, cost(s));
  int64_t splits = 1;
  while (20 * cost(splits) > 21 * best) ++splits;
  return splits;
}

}  // namespace qlora::cuda
