#pragma once

#include "cpp/cpu/dispatch.h"
#include "tests/kernels/report.h"

namespace kernels_test {

// What the set encodes and decodes is bit for bit what plain C++ does.
void test_codec(const qlora::cpu::Kernels& set, Report*);

}  // namespace kernels_test
