// Chooses and configures the kernels on wgmma and TMA, for compute capability 9.0 only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "cpp/format/problem.h"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/device.h"

namespace qlora::cuda::sm90 {

inline constexpr int64_t kOutputs = 128;                           // outputs per tile, for each of its tokens
inline constexpr int64_t kForwardStageK = 128, kDxStageRows = 64;  // terms of the sum per stage
inline constexpr int64_t kMostSplits = kMostClusterCtas;           // the CTAs of a cluster divide a tile's sum
inline constexpr int64_t kMostMulticast = 2;                       // and share copies of the tokens with a partner

// k has groups of 64 4-bit codes with one scale each and no offset, the sizes fit TMA's coordinates, and the ranks fit
// an int.
constexpr bool accepts_sizes(DType dtype, int64_t m, const Weight& w, const Lora& lora) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max(), kMostRanks = kMost / 2;
  return is_16_bit(dtype) && m > 0 && w.n > 0 && w.k > 0 && has_one_scale_per(64, w) && !has_offsets(w) &&
         !is_wide(w.code) && m <= kMost && w.n <= kMost && w.k <= kMost && lora.rank <= kMostRanks;
}
constexpr bool accepts(const LinearProblem& p, const Device& device) {
  return device.arch == 90 && accepts_sizes(p.dtype, p.m, p.w, p.lora);
}
// TMA requires that rows of dy begin at multiples of 16 bytes.
constexpr bool accepts(const LinearDxProblem& p, const Device& device) {
  return device.arch == 90 && accepts_sizes(p.dtype, p.m, p.w, p.lora) && p.w.n % 8 == 0;
}

// Up to kFewestTokens - 1 tokens, the tiles on mma.sync decode each weight only once, too. Up to kMostTokens, these
// kernels are ahead, also of the library; kCrossovers (library.h) only counts for problems that they do not accept. By
// the model below, a token costs 1.05 times as much as in a GEMM at 0.75 of the data sheet's rate: 194 us against 185
// at 4096 x 4096 and 4096 tokens. But the library also needs 5 to 14 us for its decode and, with LoRA, about 25 us for
// its float32 sums, so the model has no upper limit. bench/cuda_crossover.py measures it on a card.
inline constexpr int64_t kFewestTokens = 33;
inline constexpr int64_t kMostTokens = std::numeric_limits<int64_t>::max();

template <class Problem>
constexpr bool is_ahead(const Problem& p, const Device&) {
  return p.m >= kFewestTokens && p.m <= kMostTokens;
}

constexpr int64_t cluster_ctas(const Config& c) { return c.splits * c.multicast; }

// The number of clusters that run at once, or 0 if the device cannot launch any.
constexpr int64_t resident_clusters(const Config& c, const Device& device) {
  const int64_t ctas = cluster_ctas(c);
  return ctas > kMostClusterCtas ? 0 : device.resident_clusters[static_cast<size_t>(ctas - 1)];
}

// The number of tiles, or of pairs of tiles with the same tokens. A cluster computes one at a time.
constexpr int64_t cluster_tiles(int64_t m, int64_t outputs, const Config& c) {
  return ceil_div(m, c.tokens) * ceil_div(outputs, kOutputs * c.multicast);
}

// The grid: as many clusters as run at once, or fewer if there are fewer tiles.
constexpr int64_t clusters(int64_t m, int64_t outputs, const Config& c, const Device& device) {
  return std::min(resident_clusters(c, device), cluster_tiles(m, outputs, c));
}

// What a stage takes: cycles of the SM, and bytes from L2 for the tokens and for everything else.
struct Stage {
  int64_t cycles, token_bytes, other_bytes;
};

// A stage of the forward takes as long as its passes over shared memory: x is written once and read by both warpgroups,
// packed bytes are written and read once, and scales and three quarters of the pairs are looked up. L2 serves x, and
// packed bytes and scale codes of 128 rows.
constexpr Stage forward_stage(int64_t tokens) { return {6 * tokens + 476, tokens * 256, 128 * (64 + 2)}; }

// The same for dX, with dy in place of x, and lookups of twice the size. Scale codes take a sector of 32 bytes per row.
constexpr Stage dx_stage(int64_t tokens) { return {3 * tokens + 440, tokens * 128, 64 * (64 + 32)}; }

inline constexpr int64_t kL2Bytes = 3200;  // per cycle, of an H100: 5.6 TB/s at 1.755 GHz

// The cycles of a stage while `ctas` CTAs run: those of its SM, or those in which L2 serves the stages of all SMs.
constexpr int64_t stage_cycles(const Stage& stage, int64_t multicast, int64_t ctas, int64_t l2_bytes = kL2Bytes) {
  return std::max(stage.cycles, (stage.token_bytes / multicast + stage.other_bytes) * ctas / l2_bytes);
}

inline constexpr int64_t kTileCycles = 2500;  // in which a tile starts and is stored

// The cycles of a product by a model of an H100, not a measurement. Adding up splits costs two exchanges, and
// with multicast, partners wait for each other when they begin and do not share their first stages. The CTAs of a
// cluster split the sum in whole stages, and tiles run in waves of as many clusters as the device holds. So a card on
// which 31 clusters of 4 run at once has no plan for 32 pairs in two splits (256 tokens x 4096 outputs): it computes
// them without multicast, in 17 us instead of the 14 us of a card with 32.
template <class StageOf>
constexpr int64_t cycles(int64_t m, int64_t outputs, int64_t stages, const StageOf& stage_of, const Device& device,
                         const Config& c, int64_t l2_bytes = kL2Bytes) {
  constexpr int64_t kSplitCycles = 1000, kMulticastCycles = 1500;
  const int64_t ctas = clusters(m, outputs, c, device) * cluster_ctas(c);
  const int64_t of_stages = ceil_div(stages, c.splits) * stage_cycles(stage_of(c.tokens), c.multicast, ctas, l2_bytes);
  const int64_t of_tile = of_stages + kTileCycles + (c.splits > 1 ? kSplitCycles : 0);
  return ceil_div(cluster_tiles(m, outputs, c), resident_clusters(c, device)) * of_tile +
         (c.multicast > 1 ? kMulticastCycles : 0);
}

// Chooses the tile, the splits and the multicast with the fewest cycles. Only configurations that match `wish` are
// considered. If there are none, the result has no tokens.
template <class StageOf>
constexpr Config fastest(int64_t m, int64_t outputs, int64_t stages, std::initializer_list<int64_t> tile_tokens,
                         const StageOf& stage_of, const Device& device, const Config& wish,
                         int64_t l2_bytes = kL2Bytes) {
  Config best;
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (const int64_t tokens : tile_tokens) {
    for (int64_t multicast = 1; multicast <= kMostMulticast; ++multicast) {
      for (int64_t splits = 1; splits <= kMostSplits; ++splits) {
        const Config c{.tokens = tokens, .splits = splits, .multicast = multicast};
        if (or_wish(wish.tokens, tokens) != tokens || or_wish(wish.splits, splits) != splits ||
            or_wish(wish.multicast, multicast) != multicast)
          continue;
        if (resident_clusters(c, device) == 0) continue;
        if (ceil_div(stages, splits) * (splits - 1) >= stages) continue;  // the last CTA would have nothing to do
        const int64_t of_it = cycles(m, outputs, stages, stage_of, device, c, l2_bytes);
        if (of_it >= fewest) continue;
        fewest = of_it;
        best = c;
      }
    }
  }
  return best;
}

constexpr Config config(const LinearProblem& p, const Device& device, const Config& wish) {
  Config c = fastest(p.m, p.w.n, ceil_div(p.w.k, kForwardStageK), {64, 128}, forward_stage, device, wish);
  c.rows = kOutputs;
  return c;
}

constexpr Config config(const LinearDxProblem& p, const Device& device, const Config& wish) {
  Config c = fastest(p.m, p.w.k, ceil_div(p.w.n, kDxStageRows), {64, 128, 256}, dx_stage, device, wish);
  c.columns = kOutputs;
  return c;
}

}  // namespace qlora::cuda::sm90
