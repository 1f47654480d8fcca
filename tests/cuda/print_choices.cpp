// Reads problems, one per line, as `card operator dtype m n k block_size rank experts forced`, with `-` for what is not
// forced and 0 experts for a single weight. Prints, as JSON, what cuda/tuning chooses for each, or the error.
#include <cstdio>
#include <iostream>
#include <string>

#include "cuda/tuning/forced.h"

using namespace qlora;
using namespace qlora::cuda;

struct Line {
  std::string card, op, dtype, forced;
  int64_t m, n, k, block_size, rank, experts;
};

template <class Problem>
std::string choice(const Line& line, const Problem& p, const Device& device) {
  try {
    if (line.forced == "-") return describe(choose(p, device));
    return describe(choose_forced(line.forced, line.op.c_str(), p, device));
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
}

template <class Problem>
std::string choice_of(const Line& line, Problem p, const Device& device) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    if (line.dtype == dtype_name(dtype)) p.dtype = dtype;
  p.m = line.m, p.lora.rank = line.rank;
  if constexpr (requires { p.w; })
    p.w.n = line.n, p.w.k = line.k, p.w.scales.block_size = line.block_size;
  else
    p.n = line.n, p.k = line.k;
  return line.experts > 0 ? choice(line, Grouped<Problem>{p, nullptr, line.experts}, device) : choice(line, p, device);
}

int main() {
  const char* comma = "[";
  for (Line l;
       std::cin >> l.card >> l.op >> l.dtype >> l.m >> l.n >> l.k >> l.block_size >> l.rank >> l.experts >> l.forced;) {
    Device device;
    for (const Card& card : kCards)
      if (l.card == card.name) device = card.device;
    const std::string text = l.op == "linear_nf4"      ? choice_of(l, LinearProblem{}, device)
                             : l.op == "linear_nf4_dx" ? choice_of(l, LinearDxProblem{}, device)
                                                       : choice_of(l, LoraGradProblem{}, device);
    std::printf("%s\"%s\"", comma, text.c_str());
    comma = ", ";
  }
  std::printf("]\n");
}
