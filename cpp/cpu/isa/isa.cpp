#include "cpp/cpu/isa/isa.h"

#include <cctype>
#include <cstdlib>
#include <iterator>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qlora::cpu {
namespace {

#if QLORA_X86
// __builtin_cpu_supports would read a table of the compiler's runtime library, which Windows programs may not have.
struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // all 0 for a leaf that the processor lacks

  explicit Cpuid(unsigned leaf, unsigned subleaf = 0) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

// Whether the system saves these registers when it switches between threads: bits of XCR0.
bool saves(unsigned states) {
  if (!(Cpuid(1).ecx & 1u << 27)) return false;  // OSXSAVE
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & states) == states;
}
#endif

// Whether the processor has AMX-TILE, AMX-BF16 and AMX-INT8, and the system lets this process use tiles. A process has
// to ask the system once: until then, the first tile instruction ends the process. The permission holds for all its
// threads, also those that start later.
[[maybe_unused]] bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kAmxBits = 1u << 22 | 1u << 24 | 1u << 25;  // of EDX, leaf 7: BF16, TILE, INT8
  if ((Cpuid(7).edx & kAmxBits) != kAmxBits) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, of asm/prctl.h since Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// What an AArch64 processor multiplies beside float32: bfloat16 (BFDOT, BFMMLA), and bytes, four of a lane (SDOT) or
// matrices of them (SMMLA). Every core with BF16 has SDOT, which ARMv8.4 requires.
[[maybe_unused]] uint32_t arm_features() {
  uint32_t features = 0;
  [[maybe_unused]] const auto add = [&](Feature feature, bool has) { features |= has ? feature : 0u; };
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kBf16Bit = 1ul << 14, kI8mmBit = 1ul << 13;  // HWCAP2_BF16 and _I8MM of Linux 5.6
  constexpr unsigned long kDotProdBit = 1ul << 20;                     // HWCAP_ASIMDDP
  const unsigned long has = getauxval(AT_HWCAP2);
  add(kArmBf16, has & kBf16Bit);
  add(kArmI8mm, has & kI8mmBit);
  add(kArmDotProd, getauxval(AT_HWCAP) & kDotProdBit);
#elif defined(__aarch64__) && defined(__APPLE__)
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
  };
  add(kArmBf16, has("hw.optional.arm.FEAT_BF16"));
  add(kArmI8mm, has("hw.optional.arm.FEAT_I8MM"));
  add(kArmDotProd, has("hw.optional.arm.FEAT_DotProd"));
#endif
  return features;
}

uint32_t processor_features() {
  uint32_t features = 0;
#if QLORA_ARM64
  features |= kAsimd | arm_features();
#endif
#if QLORA_X86
  const auto add = [&](Feature feature, bool has) { features |= has ? feature : 0u; };
  constexpr unsigned kYmm = 0x6, kZmm = 0xe6;
  const Cpuid base(1), extended(7), more(7, 1);
  const bool ymm = saves(kYmm), zmm = saves(kZmm);
  add(kAvx2, ymm && extended.ebx >> 5 & 1);
  add(kFma, ymm && base.ecx >> 12 & 1);
  add(kF16c, ymm && base.ecx >> 29 & 1);
  add(kAvxVnni, ymm && extended.eax >= 1 && more.eax >> 4 & 1);
  add(kAvx512f, zmm && extended.ebx >> 16 & 1);
  add(kAvx512bw, zmm && extended.ebx >> 30 & 1);
  add(kAvx512vl, zmm && extended.ebx >> 31 & 1);
  add(kAvx512dq, zmm && extended.ebx >> 17 & 1);
  add(kAvx512vbmi, zmm && extended.ecx >> 1 & 1);
  add(kAvx512bf16, zmm && extended.eax >= 1 && more.eax >> 5 & 1);
  add(kAvx512vnni, zmm && extended.ecx >> 11 & 1);
  add(kAmxBf16, may_use_tiles());
#endif
  return features;
}

bool is_intel() {
#if QLORA_X86
  return Cpuid(0).ebx == signature_INTEL_ebx;
#else
  return false;
#endif
}

// vpmaddwd issues twice per cycle, as vfmadd does, on Intel's cores since Skylake, which has CLFLUSHOPT, and on AMD's
// since Zen 3, which has VAES. On older ones it issues half as often.
bool has_fast_pairs() {
#if QLORA_X86
  const Cpuid extended(7);
  return is_intel() ? extended.ebx >> 23 & 1 : extended.ecx >> 9 & 1;
#else
  return false;
#endif
}

// AVX512-BF16 is avx512_bf16.
std::string canonical(const char* name) {
  std::string out;
  for (; *name; ++name)
    if (*name != '_' && *name != '-') out += static_cast<char>(std::tolower(static_cast<unsigned char>(*name)));
  return out;
}

bool wants_integers() {
  const char* const wanted = std::getenv("QLORA_CPU_INTEGERS");
  return !wanted || std::string(wanted) != "0";
}

const Isa& best_isa() {
  for (const Isa* isa : kIsas)
    if (supported(*isa)) return *isa;
  return kScalarIsa;
}

struct Selection {
  const Isa* isa = &best_isa();
  bool forced = false;
  std::string error;
};

const Selection& selection() {
  static const Selection selected = [] {
    Selection s;
    const char* name = std::getenv("QLORA_CPU_ISA");
    if (!name || !*name) return s;
    const Isa* const isa = find_isa(name);
    if (!isa) {
      s.error = std::string("QLORA_CPU_ISA: expected ") + isa_names() + ", got " + name;
    } else if (!compiled(*isa)) {
      s.error = std::string("QLORA_CPU_ISA: this build has no ") + isa->name + "; its best is " + s.isa->name;
    } else if (!supported(*isa)) {
      s.error = std::string("QLORA_CPU_ISA: this processor has no ") + isa->name + "; its best is " + s.isa->name;
    } else {
      s.isa = isa;
      s.forced = true;
    }
    return s;
  }();
  return selected;
}

}  // namespace

bool compiled(const Isa& isa) {
  const auto is = [&](const char* name) { return std::string(isa.name) == name; };
#define QLORA_SET(name) is(#name) ||
  return QLORA_CPU_ISAS false;
#undef QLORA_SET
}

bool supported(const Isa& isa) {
  static const uint32_t features = processor_features();
  return compiled(isa) && (isa.needs & ~features) == 0;
}

const Isa* find_isa(const char* name) {
  for (const Isa* isa : kIsas)
    if (canonical(isa->name) == canonical(name)) return isa;
  return nullptr;
}

const char* isa_names() {
  static const std::string names = [] {
    std::string out = kIsas[0]->name;
    const char* before = " or ";
    for (size_t i = 1; i < std::size(kIsas); ++i, before = ", ") out.insert(0, kIsas[i]->name + std::string(before));
    return out;
  }();
  return names.c_str();
}

const Isa& current_isa() { return *selection().isa; }

const char* isa_error() { return selection().error.empty() ? nullptr : selection().error.c_str(); }

const Cpu& current_cpu() {
  static const Cpu cpu = {current_isa().needs, is_intel(), selection().forced, has_fast_pairs(), wants_integers()};
  return cpu;
}

}  // namespace qlora::cpu
