// The attributes of a card on which the choices depend.
#pragma once

#include <string_view>

namespace qlora::cuda {

struct Device {
  int index = 0;
  int arch = 0;  // compute capability, 10 * major + minor
  int sm_count = 0;
  int shared_per_cta = 0;  // bytes that a CTA may opt in to
  int l2_bytes = 0;
};

// One card per architecture, with the attributes from its data sheet and from the CUDA programming guide's table of
// compute capabilities. They serve tests, and `_C.choose(device=...)` on a machine without that card.
struct Card {
  std::string_view name;
  Device device;
};
inline constexpr Card kCards[] = {
    {"sm80", {0, 80, 108, 163 << 10, 40 << 20}},     // A100
    {"sm86", {0, 86, 82, 99 << 10, 6 << 20}},        // RTX 3090
    {"sm89", {0, 89, 128, 99 << 10, 72 << 20}},      // RTX 4090
    {"sm90", {0, 90, 132, 227 << 10, 50 << 20}},     // H100 SXM
    {"sm100", {0, 100, 148, 227 << 10, 126 << 20}},  // B200
    {"sm120", {0, 120, 170, 99 << 10, 96 << 20}},    // RTX 5090
};

}  // namespace qlora::cuda
