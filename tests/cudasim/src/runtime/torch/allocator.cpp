// PyTorch's allocator, with one allocation per tensor, as with PYTORCH_NO_CUDA_MEMORY_CACHING. In addition it supports
// torch.cuda.memory_allocated() and related functions, and memory for graphs.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/cuda/CUDAPluggableAllocator.h>

#include "capture.h"

namespace cudasim_torch {
namespace {

using c10::CachingDeviceAllocator::DeviceStats;

class Allocator final : public torch::cuda::CUDAPluggableAllocator::CUDAPluggableAllocator {
 public:
  Allocator()
      : CUDAPluggableAllocator([](size_t, int, cudaStream_t) { return nullptr; },
                               [](void*, size_t, int, cudaStream_t) {}) {
    initialized_ = true;
  }

  c10::DataPtr allocate(size_t size) override {
    void* p = raw_alloc(size);
    return {p, p, raw_deleter(), c10::Device(c10::kCUDA, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void* raw_alloc(size_t size) override { return raw_alloc_with_stream(size, c10::cuda::getCurrentCUDAStream()); }
  void* raw_alloc_with_stream(size_t size, cudaStream_t stream) override {
    if (size == 0) return nullptr;
    void* p = nullptr;
    const auto error = static_cast<cudaError_t>(cudasim_torch_malloc(&p, size, stream));
    const std::lock_guard<std::mutex> lock(mutex_);
    if (error != cudaSuccess) ++stats_.num_ooms;
    C10_CUDA_CHECK(error);
    sizes_[p] = size;
    change(static_cast<int64_t>(size));
    return p;
  }
  void raw_delete(void* p) override {
    if (!p) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = sizes_.find(p);
      if (found != sizes_.end()) {
        change(-static_cast<int64_t>(found->second));
        sizes_.erase(found);
      }
    }
    cudasim_torch_free(p);
  }
  DeviceStats getDeviceStats(c10::DeviceIndex) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {
    each([](auto& s) { s.reset_accumulated(); });
  }
  void resetPeakStats(c10::DeviceIndex) override {
    each([](auto& s) { s.reset_peak(); });
  }
  bool isHistoryEnabled() override { return false; }
  std::string name() override { return "cudasim"; }

 private:
  static void free(void* p);
  template <class F>
  void each(F f) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* array : {&stats_.allocation, &stats_.segment, &stats_.active, &stats_.allocated_bytes,
                        &stats_.reserved_bytes, &stats_.active_bytes, &stats_.requested_bytes})
      f((*array)[0]);
  }
  // Entry 0 of each is the sum over all pools.
  void change(int64_t bytes) {
    const auto by = [](auto& array, int64_t n) {
      n > 0 ? array[0].increase(static_cast<size_t>(n)) : array[0].decrease(static_cast<size_t>(-n));
    };
    const int64_t one = bytes > 0 ? 1 : -1;
    for (auto* array : {&stats_.allocation, &stats_.segment, &stats_.active}) by(*array, one);
    for (auto* array : {&stats_.allocated_bytes, &stats_.reserved_bytes, &stats_.active_bytes, &stats_.requested_bytes})
      by(*array, bytes);
    ++(bytes > 0 ? stats_.num_device_alloc : stats_.num_device_free);
  }

  std::mutex mutex_;
  DeviceStats stats_;
  std::unordered_map<void*, size_t> sizes_;
};

Allocator& allocator() {
  static auto& a = *new Allocator;  // outlives the tensors of static objects
  return a;
}
void Allocator::free(void* p) { allocator().raw_delete(p); }

}  // namespace

void install_allocator() {
  c10::cuda::CUDACachingAllocator::allocator.store(&allocator());
  c10::SetAllocator(c10::kCUDA, &allocator(), 100);
}

}  // namespace cudasim_torch
