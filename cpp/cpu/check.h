// What a call of the kernels returns, thrown by its caller's own C++ runtime.
#pragma once

#include <new>
#include <stdexcept>

#include "cpp/cpu/kernels.h"

namespace qlora::cpu {

inline void check(const Error& error) {
  switch (error.kind) {
    case Error::kNone:
      return;
    case Error::kInvalidArgument:
      throw std::invalid_argument(error.text);
    case Error::kOutOfMemory:
      throw std::bad_alloc();
    case Error::kOther:
      throw std::runtime_error(error.text);
  }
}

}  // namespace qlora::cpu
