#include "cpp/cpu/isa/isa.h"

#include <cctype>
#include <cstdlib>
#include <string>

namespace qlora::cpu {
namespace {

// Case and '_' or '-' do not matter: AVX512-BF16 is avx512_bf16.
std::string canonical(const char* name) {
  std::string out;
  for (; *name; ++name)
    if (*name != '_' && *name != '-') out += static_cast<char>(std::tolower(static_cast<unsigned char>(*name)));
  return out;
}

struct Choice {
  Isa isa = best_isa();
  bool forced = false;
  std::string error;
};

const Choice& choice() {
  static const Choice chosen = [] {
    Choice c;
    const char* forced = std::getenv("QLORA_CPU_ISA");
    if (!forced || !*forced) return c;
    for (int i = 0; i < kIsaCount; ++i) {
      const Isa isa = static_cast<Isa>(i);
      if (canonical(forced) != canonical(isa_name(isa))) continue;
      if (isa > c.isa) {
        c.error =
            std::string("QLORA_CPU_ISA: this processor has no ") + isa_name(isa) + "; its best is " + isa_name(c.isa);
      }
      c.isa = isa > c.isa ? c.isa : isa;
      c.forced = true;
      return c;
    }
    c.error = std::string("QLORA_CPU_ISA: expected scalar, avx2, avx512 or avx512_bf16, got ") + forced;
    return c;
  }();
  return chosen;
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(isa)];
}

Isa best_isa() {
#if QLORA_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return Isa::kScalar;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vbmi")) {
    return Isa::kAvx2;
  }
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return bf16 ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kScalar;
#endif
}

Isa current_isa() { return choice().isa; }

bool prefers_bf16_dot() {
#if QLORA_X86
  return choice().isa == Isa::kAvx512Bf16 && (choice().forced || !__builtin_cpu_is("intel"));
#else
  return false;
#endif
}

const char* isa_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }

}  // namespace qlora::cpu
