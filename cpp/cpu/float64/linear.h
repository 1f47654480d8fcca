// The linear layer and its gradients in float64, for gradcheck: plain loops over the definitions of
// cpp/format/problem.h, compiled once for every processor.
#pragma once

#include "cpp/cpu/dispatch.h"

namespace qlora::cpu::float64 {

Outcome forward(const Pool&, const LinearProblem&);
Outcome dx(const Pool&, const LinearDxProblem&);
Outcome dlora(const Pool&, const LoraGradProblem&);

}  // namespace qlora::cpu::float64
