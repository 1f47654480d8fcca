// Calls whose tokens use different adapters (cpp/format/problem.h, Adapters), made of calls with one adapter.
#pragma once

#include <functional>

#include "cpp/cpu/kernels.h"
#include "cpp/format/problem.h"

namespace qlora::cpu {

template <class Problem>
using RunProblem = std::function<void(const Problem&)>;

// For kernels that take one adapter per call: runs all tokens once per adapter, and takes the rows that use it.
void run_per_adapter(const LinearProblem& p, const RunProblem<LinearProblem>& run);
void run_per_adapter(const LinearDxProblem& p, const RunProblem<LinearDxProblem>& run);

// Each adapter's gradients are those of its own tokens, in their order. Dropout is that of the whole call.
void run_per_adapter(const Pool& pool, const LoraGradProblem& p, const RunProblem<LoraGradProblem>& run);

}  // namespace qlora::cpu
