#pragma once

#include "cpp/cpu/dispatch.h"
#include "tests/kernels/report.h"

namespace kernels_test {

// Checks that the set encodes and decodes bit for bit as plain C++ does.
void test_codec(const qlora::cpu::Kernels& set, Report*);

}  // namespace kernels_test
