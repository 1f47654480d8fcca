// The candidates of the search for scales that suit a weight's inputs, on every device.
#pragma once

#include "cpp/format/portable.h"

namespace qlora {

// Factors of a block's absmax: 1.06, 1.04, ... 0.56. Smaller factors would clip the block's largest weight so much that
// no importance makes up for it.
inline constexpr int kSearchSteps = 26;
inline constexpr int kSearchFits = 2;
QLORA_HD constexpr float search_factor(int step) { return 1.06f - 0.02f * static_cast<float>(step); }

}  // namespace qlora
