// Operators called during a stream capture. The result of the CPU operator is discarded. The call is recorded, and
// repeated on the same memory when the graph is launched.
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <utility>
#include <vector>

// libcudart's
extern "C" {
int cudasim_begin_work(cudaStream_t);
int cudasim_context_error();
int cudasim_record(cudaStream_t, int (*run)(void*), void* data, void (*drop)(void*));
void cudasim_fail(const char* why);
void cudasim_refuse_capture(cudaStream_t, const char* why);
int cudasim_in_graph(const void*);
size_t cudasim_bytes_at(const void*);
int cudasim_torch_malloc(void**, size_t, cudaStream_t);
int cudasim_torch_free(void*);
}

namespace cudasim_torch {

void install_allocator();  // allocator.cpp

class Recorded {
 public:
  Recorded(const c10::OperatorHandle& op, cudaStream_t stream) : op_(op), stream_(stream) {}
  // Rejects the operator and ends the capture if a GPU would have to wait for a result.
  void check_arguments(const std::vector<c10::IValue>& originals) const;
  // Saves the data that the operator is about to overwrite.
  void arguments(const std::vector<c10::IValue>& aliases);
  // Restores that data, and keeps what a replay of the operator needs.
  void finish(const std::vector<c10::IValue>& aliases, std::vector<at::Tensor> results);
  void record();  // gives this object to the graph
  c10::IValue generator(const c10::IValue& original);

 private:
  [[noreturn]] void refuse(const std::string& why) const;
  static int replay(void* self);
  void span(const at::Tensor& t);

  c10::OperatorHandle op_;
  cudaStream_t stream_;
  std::vector<c10::IValue> arguments_;
  std::vector<at::Tensor> results_;
  std::vector<std::pair<const void*, size_t>> spans_;  // memory that must exist at replay
  std::vector<std::pair<void*, std::vector<char>>> before_;
  std::vector<at::PhiloxCudaState> random_;  // of each generator among the arguments
};

}  // namespace cudasim_torch
