// The attributes of a card on which the choices depend.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

namespace qlora::cuda {

inline constexpr int kMostClusterCtas = 8;  // the largest cluster that every device with clusters supports

// [c - 1]: how many clusters of c CTAs run at once if every CTA needs an SM of its own; 0 if none can.
using ResidentClusters = std::array<int, kMostClusterCtas>;

struct Device {
  int index = 0;
  int arch = 0;  // compute capability, 10 * major + minor
  int sm_count = 0;
  int shared_per_cta = 0;  // bytes that a CTA may opt in to
  int l2_bytes = 0;
  bool has_clusters = false;             // whether the driver launches clusters of several CTAs
  ResidentClusters resident_clusters{};  // only for compute capability 9.0 and 10.x
  // Of the SMs and the memory, and the width of the memory's bus; 0 if unknown.
  int clock_khz = 0, memory_clock_khz = 0, bus_bits = 0;
  bool is_integrated = false;  // shares the host's memory
};

// An estimate for a card of compute capability 9.0 or 10.x that cannot be queried. A cluster lies within a GPC, which
// has about 16 SMs.
constexpr ResidentClusters estimated_clusters(int sm_count) {
  constexpr int kGpc = 16;
  ResidentClusters clusters{sm_count};
  for (int c = 2; c <= kMostClusterCtas; ++c) clusters[static_cast<size_t>(c - 1)] = sm_count / kGpc * (kGpc / c);
  return clusters;
}

// One card per architecture, with the attributes from its data sheet and from the CUDA programming guide's table of
// compute capabilities. They serve tests, and `_C.choose(device=...)` on a machine without that card.
struct Card {
  std::string_view name;
  Device device;
};
inline constexpr Card kCards[] = {
    {"sm75", {0, 75, 40, 64 << 10, 4 << 20}},     // T4
    {"sm80", {0, 80, 108, 163 << 10, 40 << 20}},  // A100
    {"sm86", {0, 86, 82, 99 << 10, 6 << 20}},     // RTX 3090
    {"sm89", {0, 89, 128, 99 << 10, 72 << 20}},   // RTX 4090
    // H100 SXM, whose 8 GPCs differ from card to card. Here they have 18, 18, 18, 16, 16, 16, 16 and 14 SMs.
    {"sm90", {0, 90, 132, 227 << 10, 50 << 20, true, {132, 66, 42, 31, 23, 19, 16, 15}}},
    {"sm100", {0, 100, 148, 227 << 10, 126 << 20, true, estimated_clusters(148)}},  // B200
    {"sm120", {0, 120, 170, 99 << 10, 96 << 20, true}},                             // RTX 5090
};

}  // namespace qlora::cuda
