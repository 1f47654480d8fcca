#pragma once

#include "cpp/cpu/dispatch.h"
#include "tests/kernels/report.h"

namespace kernels_test {

// Runs every kernel of the set on every problem that it accepts, and the chosen kernel on every problem of an operator
// and type for which the set has one. Checks that the result is within the rules of accuracy.h and has the same bits
// however the work is cut, and that nothing is written beyond the result.
void test_linear(const qlora::cpu::Kernels& set, Report*);

}  // namespace kernels_test
