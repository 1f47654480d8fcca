// Prints, as JSON, what cuda/tuning_sm90.h chooses for any card; test_cuda_tuning_sm90.py compiles and reads it.
#include <cstdio>

#include "cuda/tuning_sm90.h"

using namespace qlora;
using namespace qlora::cuda;

int main() {
  const char* comma = "[";
  for (int sms : {78, 114, 132})
    for (int m : {33, 64, 100, 256, 1000, 4096})
      for (int outputs : {1, 128, 4096, 11008, 128256})
        for (int inner : {64, 1024, 4096, 14336}) {
          Device card;
          card.arch = 90, card.sm_count = sms;
          const auto print = [&](const char* what, int stage, const Sm90Config& c) {
            std::printf("%s[\"%s\", %d, %d, %d, %d, %d, %d, %ld, %ld]", comma, what, sms, m, outputs,
                        (inner + stage - 1) / stage, c.tokens, c.splits, long(c.stages_per_split), long(c.clusters));
            comma = ", ";
          };
          print("forward", 128, linear_sm90_config(m, outputs, inner, card));
          print("dx", 64, dx_sm90_config(m, inner, outputs, card));
        }
  std::printf("]\n");
}
