// Prints, as JSON, what cuda/tuning.h chooses for any card; test_cuda_tuning.py compiles and reads it.
#include <cstdio>

#include "cuda/tuning.h"

using namespace qlora;
using namespace qlora::cuda;

Device card(int arch, int sms, int l2_mb) {
  Device d;
  d.arch = arch, d.sm_count = sms, d.l2_bytes = l2_mb << 20;
  return d;
}

int main() {
  const char* comma = "";
  std::printf("{\"forward\": [");
  for (int slots : {108, 132, 216, 264, 170})
    for (int tiles : {1, 8, 32, 86, 112, 128, 148, 224, 1002})
      for (int segments : {1, 9, 64, 172, 224})
        for (int tokens : {8, 64}) {
          const auto each = linear_split_segments(tiles, segments, 2, tokens, slots);
          std::printf("%s[%d, %d, %d, %d, %ld]", comma, slots, tiles, segments, tokens, long(each));
          comma = ", ";
        }
  std::printf("], \"dx\": [");
  comma = "";
  for (int n : {1, 64, 4096, 14336, 128256})
    for (int k : {64, 4096, 11008})
      for (int m : {1, 16, 64, 200})
        for (int ctas : {1, 2}) {
          const auto c = dx_config(dx_tile(m, Kernel::kTensorCores), m, n, k, ctas, card(90, 132, 50));
          std::printf("%s[%d, %d, %d, %d, %d, %d, %ld, %ld]", comma, n, k, m, 132 * ctas, c.tokens, c.columns,
                      long(c.splits), long(c.rows_per_split));
          comma = ", ";
        }
  std::printf("], \"crossover\": {");
  comma = "";
  for (int arch : {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}) {
    std::printf("%s\"%d\": [%ld, %ld, %ld]", comma, arch,
                long(library_crossover(DType::kBFloat16, 4096, 64, card(arch, 100, 40))),
                long(library_crossover(DType::kFloat32, 4096, 64, card(arch, 100, 40))),
                long(library_crossover(DType::kBFloat16, 4095, 64, card(arch, 100, 40))));
    comma = ", ";
  }
  std::printf("}, \"panel\": [");
  comma = "";
  for (int l2 : {40, 50, 126})
    for (int m : {100, 4096, 65536})
      for (int inner : {64, 4096, 128256})
        for (int columns : {1, 300, 4096, 28672})
          for (int sums : {0, 1}) {
            const auto panel = library_panel_columns(m, inner, columns, 256, sums, DType::kBFloat16, card(90, 132, l2));
            std::printf("%s[%d, %d, %d, %d, %d, %ld]", comma, l2, m, inner, columns, sums, long(panel));
            comma = ", ";
          }
  std::printf("], \"feedback\": [");
  comma = "";
  for (int sms : {1, 108, 132})
    for (int n : {1, 31, 1024, 4096, 14336}) {
      std::printf("%s[%d, %d, %d]", comma, sms, n, feedback_warps(n, 4, card(90, sms, 50)));
      comma = ", ";
    }
  std::printf("]}\n");
}
