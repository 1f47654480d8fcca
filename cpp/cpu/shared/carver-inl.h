// Cuts working memory into arrays.
#pragma once

#include <cstdint>

#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// Hands out consecutive 64-byte aligned arrays of a buffer. Without a buffer, it computes the size that one needs.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) & ~int64_t{63};
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  int64_t used() const { return used_; }  // bytes

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
