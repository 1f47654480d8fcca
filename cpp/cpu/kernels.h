// The CPU kernels, free of torch. Each call checks nothing (cpp/ops/checks.h has), splits its work over `pool`, and
// gives the same bits for every number of threads.
#pragma once

#include <cstdint>

#include "cpp/format/problem.h"

namespace qlora::cpu {

// A view of the caller's thread pool: runs body(context, begin, end) over disjoint pieces of [0, count), each of at
// least `grain` items but the last. Pieces depend on the number of threads; results must not.
struct Pool {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, int64_t grain, Body body, void* context);
  int threads;

  template <class F>
  void operator()(int64_t count, int64_t grain, F& body) const {
    run(count, grain, [](void* f, int64_t b, int64_t e) { (*static_cast<F*>(f))(b, e); }, &body);
  }
};

void quantize_nf4(const Pool&, DType dtype, const void* w, int64_t numel, int64_t block_size, uint8_t* packed,
                  float* absmax);
void quantize_absmax(const Pool&, const float* absmax, int64_t count, int64_t nested_block_size, uint8_t* codes,
                     float* nested_absmax, float* nested_offset);
void dequantize_absmax(const Pool&, const Scales&, int64_t count, float* absmax);
void dequantize_nf4(const Pool&, const uint8_t* packed, const Scales&, int64_t numel, DType dtype, void* out);
void linear_nf4(const Pool&, const LinearProblem&);
void linear_nf4_dx(const Pool&, const LinearDxProblem&);
void linear_nf4_dlora(const Pool&, const LoraGradProblem&);

}  // namespace qlora::cpu
