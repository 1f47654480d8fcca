// Calls whose tokens use different adapters, on the kernels for one adapter and for experts. Nothing depends on what
// the adapters' numbers in device memory are, so the host never waits, and graphs can capture the launches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpp/format/device_adapters.h"
#include "cpp/format/grouped.h"
#include "cuda/tuning/device.h"

namespace qlora::cuda {

// The rows of each expert, as in Grouped. Without offsets, there is one weight.
struct ExpertRows {
  const int64_t* offsets = nullptr;
  int64_t count = 1;
};

// What the forward and dX share: h or g, and the stack of the matrix that it is multiplied by.
//
//   stack of lora_b  [ adapter 0, zeros | adapter 1, zeros | .. ]   each of padded_rank columns
//   token's h        [ zeros            | its own h, zeros | .. ]
//
// Over experts, there is such a stack for each.
struct AdapterProducts {
  DType dtype;
  DeviceAdapters adapters;
  ExpertRows experts;
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
  // Copies rows [columns] of `adapter` to the output.
  cudaError_t copy_rows(int64_t adapter, const void* from, cudaStream_t stream) const;
};

// A problem of several adapters as problems that the launchers take: prepare(), then for each pass the problem(pass)
// and finish(pass). There is one pass, unless dX has a dropout seed for each adapter: its kernels take one seed, so
// there is a pass for each.
template <class Problem>
class AdapterCall;

template <class Problem>
class ProductCall {
 public:
  // Each adapter gets a multiple of `unit` ranks. Kernels divide ranks into such units, so that they add those of any
  // adapter in the order of a call with this adapter alone.
  ProductCall(const Problem& problem, int64_t unit, const ExpertRows& experts = {});

  int64_t workspace_bytes() const { return bytes_; }
  cudaError_t prepare(uint8_t* workspace, const Device& device, cudaStream_t stream);
  int64_t passes() const { return passes_; }
  Problem problem(int64_t pass) const;
  cudaError_t finish(int64_t pass, cudaStream_t stream) const;

 private:
  Problem problem_;
  AdapterProducts products_;
  Adapters stacked_;
  int64_t passes_, bytes_ = 0;
  int64_t stack_, stack_low_rank_, flagged_, out_of_pass_;  // offsets in the workspace
  uint8_t* workspace_ = nullptr;
};

template <>
class AdapterCall<LinearProblem> : public ProductCall<LinearProblem> {
  using ProductCall::ProductCall;
};
template <>
class AdapterCall<LinearDxProblem> : public ProductCall<LinearDxProblem> {
  using ProductCall::ProductCall;
};

template <class Problem>
class AdapterCall<Grouped<Problem>> : public ProductCall<Problem> {
 public:
  AdapterCall(const Grouped<Problem>& problem, int64_t unit)
      : ProductCall<Problem>(problem.stack, unit, {problem.offsets, problem.experts}),
        offsets_(problem.offsets),
        experts_(problem.experts) {}

  Grouped<Problem> problem(int64_t pass) const { return {ProductCall<Problem>::problem(pass), offsets_, experts_}; }

 private:
  const int64_t* offsets_;
  int64_t experts_;
};

// The adapters, or those of each expert, are experts, each with its tokens' rows.
template <>
class AdapterCall<LoraGradProblem> {
 public:
  AdapterCall(const LoraGradProblem& problem, int64_t unit, const ExpertRows& experts = {});

  int64_t workspace_bytes() const { return bytes_; }
  cudaError_t prepare(uint8_t* workspace, const Device& device, cudaStream_t stream);
  int64_t passes() const { return 1; }
  Grouped<LoraGradProblem> problem(int64_t pass) const;
  cudaError_t finish(int64_t pass, cudaStream_t stream) const;

 private:
  LoraGradProblem problem_;
  ExpertRows experts_;
  int64_t groups_, bytes_ = 0;
  int64_t tokens_, ends_, x_, dy_, h_, g_, h_rows_, g_rows_, da_, db_;  // offsets in the workspace
  uint8_t* workspace_ = nullptr;
};
template <>
class AdapterCall<Grouped<LoraGradProblem>> : public AdapterCall<LoraGradProblem> {
 public:
  AdapterCall(const Grouped<LoraGradProblem>& problem, int64_t unit)
      : AdapterCall<LoraGradProblem>(problem.stack, unit, {problem.offsets, problem.experts}) {}
};

}  // namespace qlora::cuda
