// Describes what tuning.h chose: "tensor_cores tokens=8 rows=128 splits=4".
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "cuda/tuning.h"

namespace qlora::cuda {

inline std::string describe(Kernel kernel, std::initializer_list<std::pair<const char*, int64_t>> parameters = {}) {
  std::string text = kernel_name(kernel);
  for (const auto& [name, value] : parameters) text += std::string(" ") + name + "=" + std::to_string(value);
  return text;
}

}  // namespace qlora::cuda
