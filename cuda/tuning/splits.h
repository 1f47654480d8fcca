// How many CTAs share a sum.
#pragma once

#include <algorithm>
#include <cstdint>

namespace qlora::cuda {

// The fewest parts that a sum is split into whose `cost(parts)` is within a twentieth of the best of 1 .. limit: the
// models that give the costs are no better than that, and each part is more work in all.
template <class Cost>
constexpr int64_t cheapest_splits(int64_t limit, const Cost& cost) {
  int64_t best = cost(1);
  for (int64_t s = 2; s <= limit; ++s) best = std::min(best, cost(s));
  int64_t splits = 1;
  while (20 * cost(splits) > 21 * best) ++splits;
  return splits;
}

}  // namespace qlora::cuda
