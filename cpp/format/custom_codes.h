// Codes that callers have made up. They are kept as long as the process lives, so that a Code stays valid.
#pragma once

#include "cpp/format/codes.h"
#include "cpp/format/portable.h"

namespace qlora {

inline constexpr int kMaxCustomCodes = 4096;

// Sets `code` to the code with these values, bit for bit: one of kCodeTables if there is one. Any thread may call it.
// Returns false if there are kMaxCustomCodes others. The values are finite, and not all of them are zero.
QLORA_EXPORT bool intern_code(const float (&values)[kCodes], Code* code);

}  // namespace qlora
