// The thread pool that the CPU operators pass to their kernels.
#pragma once

#include "cpp/cpu/isa/isa.h"
#include "cpp/cpu/kernels.h"
#include "cpp/ops/checks.h"

namespace qlora {

// It is torch's own thread pool, so torch.set_num_threads() applies.
inline cpu::Pool pool() {
  if (const char* error = cpu::isa_error()) checks::require(false, error);
  return {[](int64_t count, int64_t grain, cpu::Pool::Body body, void* context) {
            auto piece = [=](int64_t begin, int64_t end) { body(context, begin, end); };
            const auto run = [](int64_t begin, int64_t end, void* f) {
              (*static_cast<decltype(piece)*>(f))(begin, end);
            };
            return torch_parallel_for(0, count, grain, run, &piece) == TORCH_SUCCESS;
          },
          static_cast<int>(stable::get_num_threads())};
}

}  // namespace qlora
