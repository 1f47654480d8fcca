// The CPU kernels, free of torch: what libqlora_kernels shows to the operators and to `_C`. A call checks nothing of
// its arguments (cpp/ops/checks.h has), splits its work over `pool`, and gives the same bits for every number of
// threads. Pointers need their elements' alignment only; an empty tensor may be null.
#pragma once

#include <cstdint>

#include "cpp/format/portable.h"
#include "cpp/format/problem.h"

namespace qlora::cpu {

// How a call has failed. A value, for an exception must not leave the library: a wheel's library has a C++ runtime of
// its own, and the caller's, or torch's between a kernel and its threads, is another. cpp/cpu/check.h throws it.
struct [[nodiscard]] Error {
  enum Kind { kNone, kInvalidArgument, kOutOfMemory, kOther };
  Kind kind = kNone;
  const char* text = nullptr;  // valid until this thread's next call
};

[[noreturn]] void throw_of_pool(bool finished);  // std::bad_alloc if it has finished

// A view of the caller's thread pool: runs body(context, begin, end) over disjoint pieces of [0, count), each of at
// least `grain` items but the last. Pieces depend on the number of threads; results must not. Neither `run` nor the
// body that it is given throws; it returns whether it has run them all.
struct Pool {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  bool (*run)(int64_t count, int64_t grain, Body body, void* context);
  int threads;

  // For `body` that throws at most std::bad_alloc, which then comes out of here.
  template <class F>
  void operator()(int64_t count, int64_t grain, F& body) const {
    struct Context {
      F& body;
      bool failed = false;
    } context{body};
    const auto guarded = [](void* pointer, int64_t begin, int64_t end) {
      Context& context = *static_cast<Context*>(pointer);
      try {
        context.body(begin, end);
      } catch (...) {
        __atomic_store_n(&context.failed, true, __ATOMIC_RELAXED);
      }
    };
    const bool finished = run(count, grain, guarded, &context);
    if (!finished || context.failed) throw_of_pool(finished);
  }
};

// The codec, of any code (cpp/format/codes.h). What is called absmax is a block's scale: for NF4, whose largest value
// is 1, the largest magnitude itself.

// w [numel] of `dtype` -> packed [ceil(numel / 2)], absmax [ceil(numel / block_size)]. There is no float64 codec.
QLORA_EXPORT Error quantize_nf4(const Pool&, Code code, DType dtype, const void* w, int64_t numel, int64_t block_size,
                                uint8_t* packed, float* absmax);

// The scale of each block for which the squared errors of its codes, each times the importance [k] of its column, sum
// to the least: w [numel] in rows of k -> absmax [ceil(numel / block_size)]. cpp/cpu/codec/search_absmax-inl.h has the
// search.
QLORA_EXPORT Error search_absmax_nf4(const Pool&, Code code, DType dtype, const void* w, const float* importance,
                                     int64_t numel, int64_t k, int64_t block_size, float* absmax);

// Codes under given scales: w [numel], absmax [ceil(numel / block_size)] -> packed [ceil(numel / 2)].
QLORA_EXPORT Error encode_nf4(const Pool&, Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                              int64_t block_size, uint8_t* packed);

// The same by stochastic rounding: a code's value is w over its scale on the average, the same for the same `seed`.
QLORA_EXPORT Error encode_nf4_stochastic(const Pool&, Code code, DType dtype, const void* w, const float* absmax,
                                         int64_t numel, int64_t block_size, uint64_t seed, uint8_t* packed);

// The codes of a weight with its adapter, rounded as by encode_nf4_stochastic. The update of a weight is a chain of
// fused multiply-adds from the first rank to the last.
QLORA_EXPORT Error merge_lora_nf4(const Pool&, const MergeProblem&);

// Codes for w [n, k], where each rounding error is made good by the columns that are rounded later: GPTQ (Frantar et
// al., 2022). Columns are rounded in `order` [k]; `feedback` [k, k] is the upper Cholesky factor of the inverse of the
// inputs' second moments, rows and columns in that order.
QLORA_EXPORT Error encode_nf4_with_feedback(const Pool&, Code code, DType dtype, const void* w, const float* absmax,
                                            int64_t n, int64_t k, int64_t block_size, const float* feedback,
                                            const int64_t* order, uint8_t* packed);

// absmax [count] -> codes [count], nested_absmax [ceil(count / nested_block_size)], nested_offset [1].
QLORA_EXPORT Error quantize_absmax(const Pool&, const float* absmax, int64_t count, int64_t nested_block_size,
                                   uint8_t* codes, float* nested_absmax, float* nested_offset);

// Scales of `count` blocks -> absmax [count]. Every size is valid.
QLORA_EXPORT Error dequantize_absmax(const Pool&, const Scales&, int64_t count, float* absmax);

// w [n, k] -> out [n, k] of `dtype`, aligned to its elements.
QLORA_EXPORT Error dequantize_nf4(const Pool&, const Weight& w, DType dtype, void* out);

// y [m, n], dx [m, k], and da [r, k] with db [n, r], of a problem whose shapes cpp/format/problem.h gives. Which kernel
// serves it is chosen by tuning.h. An invalid argument where QLORA_CPU_KERNEL asks for one that cannot.
QLORA_EXPORT Error linear_nf4(const Pool&, const LinearProblem&);
QLORA_EXPORT Error linear_nf4_dx(const Pool&, const LinearDxProblem&);
QLORA_EXPORT Error linear_nf4_dlora(const Pool&, const LoraGradProblem&);

// y [m, n] and dx [m, k] of a dense weight. No copy of the weight in float32 is made.
QLORA_EXPORT Error linear_dense(const Pool&, const DenseLinearProblem&);
QLORA_EXPORT Error linear_dense_dx(const Pool&, const DenseLinearDxProblem&);

}  // namespace qlora::cpu
