// Counts checks and collects failures.
#pragma once

#include <cstdio>
#include <string>

namespace kernels_test {

struct Report {
  int checks = 0, failures = 0;

  void check(bool holds, const std::string& what) {
    ++checks;
    if (holds) return;
    if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
  }
};

}  // namespace kernels_test
