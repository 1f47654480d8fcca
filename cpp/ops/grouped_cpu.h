// Calls over experts on the CPU: each expert's rows are a separate problem.
#pragma once

#include "cpp/cpu/kernels.h"
#include "cpp/format/grouped.h"

namespace qlora {

template <class Problem>
using Kernel = cpu::Error (*)(const cpu::Pool&, const Problem&);

// Checks the offsets, and unless the call is empty, computes all experts' rows. Rows of no expert become zeros.
template <class Problem>
void run_experts(const Grouped<Problem>& problem, bool is_empty, Kernel<Problem> kernel);

}  // namespace qlora
