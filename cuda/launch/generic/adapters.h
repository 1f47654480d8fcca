// Calls whose tokens use different adapters, over one weight or over experts, on the kernels for one adapter. Nothing
// depends on what the adapters' numbers in device memory are, so the host never waits, and graphs can capture the
// launches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "cpp/format/device_adapters.h"
#include "cpp/format/grouped.h"
#include "cuda/tuning/device.h"

namespace qlora::cuda {

// The adapters of a problem. Over experts, they are numbered in the order of the experts, for all tokens.
class NumberedAdapters {
 public:
  template <class Problem>
  explicit NumberedAdapters(const Problem& problem);

  // The size of what number() writes.
  int64_t bytes() const;
  // Writes the numbers of the tokens' adapters, which get() then has.
  cudaError_t number(void* numbers, cudaStream_t stream);
  const DeviceAdapters& get() const { return adapters_; }

 private:
  DeviceAdapters adapters_;
  const int64_t* offsets_ = nullptr;  // null: there is one weight
  int64_t m_;
};

// What the forward and dX share: h or g, and the stack of the matrix that it is multiplied by.
//
//   stack of lora_b  [ adapter 0, zeros | adapter 1, zeros | .. ]   each of padded_rank columns, for each expert
//   token's h        [ zeros            | its own h, zeros | .. ]
struct AdapterProducts {
  DType dtype;
  DeviceAdapters adapters;
  int64_t max_rank, padded_rank;
  int64_t m, terms, columns;  // h or g is a sum of `terms` products, the output has `columns` columns
  bool is_dx;
  const void *input, *a, *b;
  void *out, *low_rank;  // [m, columns], and h or g [m, max_rank] or null
  Dropout dropout;

  void *stack, *stack_low_rank;  // the adapters' padded ranks, and h or g for them
  uint32_t* flagged;             // AdapterProduct::flagged

  cudaError_t prepare(const Device& device, cudaStream_t stream) const;
  cudaError_t finish(cudaStream_t stream) const;
  // Copies rows [columns] of `adapter`, of all experts, to the output.
  cudaError_t copy_rows(int64_t adapter, const void* from, cudaStream_t stream) const;
};

// A problem of several adapters, possibly over experts, as problems that the launchers take: prepare(), then for each
// pass the problem(pass) and finish(pass). There is one pass, unless dX has a dropout seed for each adapter: its
// kernels take one seed, so there is a pass for each.
template <class Problem>
class ProductCall {
 public:
  // Each adapter gets a multiple of `unit` ranks. Kernels divide ranks into such units, so that they add those of any
  // adapter in the order of a call with this adapter alone.
  ProductCall(const Problem& problem, int64_t unit);

  int64_t workspace_bytes() const { return bytes_; }
  cudaError_t prepare(uint8_t* workspace, const Device& device, cudaStream_t stream);
  int64_t passes() const { return passes_; }
  Problem problem(int64_t pass) const;
  cudaError_t finish(int64_t pass, cudaStream_t stream) const;

 private:
  Problem problem_;
  NumberedAdapters adapters_;
  AdapterProducts products_;
  Adapters stacked_;
  int64_t passes_, bytes_ = 0;
  int64_t numbers_, stack_, stack_low_rank_, flagged_, out_of_pass_;  // offsets in the workspace
  uint8_t* workspace_ = nullptr;
};

// The adapters, of all experts, are experts: each with its tokens' rows.
class GradientCall {
 public:
  template <class Problem>
  GradientCall(const Problem& problem, int64_t unit);

  int64_t workspace_bytes() const { return bytes_; }
  cudaError_t prepare(uint8_t* workspace, const Device& device, cudaStream_t stream);
  int64_t passes() const { return 1; }
  Grouped<LoraGradProblem> problem(int64_t pass) const;
  cudaError_t finish(int64_t pass, cudaStream_t stream) const;

 private:
  LoraGradProblem problem_;
  NumberedAdapters adapters_;
  int64_t bytes_ = 0;
  int64_t numbers_, tokens_, ends_, x_, dy_, h_, g_, h_rows_, g_rows_, da_, db_;  // offsets in the workspace
  uint8_t* workspace_ = nullptr;
};

template <class Problem>
constexpr bool kIsGradient = requires(Problem p) { stack_of(p).da; };
template <class Problem>
using AdapterCall = std::conditional_t<kIsGradient<Problem>, GradientCall, ProductCall<Problem>>;

}  // namespace qlora::cuda
