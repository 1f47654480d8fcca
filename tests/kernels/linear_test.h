#pragma once

#include "cpp/cpu/dispatch.h"
#include "tests/kernels/report.h"

namespace kernels_test {

// Every kernel of the set, on every problem that it accepts, and the one that is chosen for it: within the rules of
// accuracy.h, the same bits however the work is cut, nothing written beyond the result.
void test_linear(const qlora::cpu::Kernels& set, Report*);

}  // namespace kernels_test
