// Tests an instruction set's kernels, without Python and torch, so that it can be compiled for another processor and
// emulated:
//
//   kernels_test --sets       prints the sets that this processor has
//   kernels_test SET          tests the kernels that the set adds, and that QLORA_CPU_ISA selects it
//   kernels_test --best SET   tests that the set is in use by default
//   kernels_test --lacks SET  tests that this processor does not support the set, with an error that says so
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/isa/isa.h"
#include "tests/kernels/codec_test.h"
#include "tests/kernels/linear_test.h"
#include "tests/kernels/report.h"

namespace {

using namespace qlora::cpu;

template <class Problem>
void remove(const KernelsFor<Problem>& other, KernelsFor<Problem>* own) {
  for (const KernelInfo& info : kKernelInfo)
    if (other[info.kernel] == (*own)[info.kernel]) (*own)[info.kernel] = nullptr;
}

// The set without what its table shares with that of a smaller set, which is tested as part of that one.
Kernels own_kernels(const Kernels& set) {
  Kernels own = set;
  for (const auto table : kTables) {
    const Kernels& other = table();
    if (other.isa == set.isa || (other.isa->needs & ~set.isa->needs)) continue;
    remove(other.forward, &own.forward);
    remove(other.dx, &own.dx);
    remove(other.dlora, &own.dlora);
    if (other.codec == set.codec) own.codec = nullptr;
  }
  return own;
}

int fail(const char* text, const char* name) {
  std::printf("FAILED %s: %s\n", name, text);
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--sets") == 0) {
    for (const Isa* isa : kIsas)
      if (supported(*isa)) std::printf("%s\n", isa->name);
    return 0;
  }
  const char* const option = argc == 3 ? argv[1] : "";
  if (argc < 2 || argc > 3) return fail("expected --sets, a set, --best SET or --lacks SET", argv[0]);
  const char* const name = argv[argc - 1];
  static std::string setting = std::string("QLORA_CPU_ISA=") + name;  // the environment refers to it
  if (std::strcmp(option, "--best") != 0) putenv(setting.data());     // Windows has no setenv
  if (std::strcmp(option, "--lacks") == 0) return isa_error() ? 0 : fail("it is there", name);
  if (const char* error = isa_error()) return fail(error, name);
  if (std::strcmp(current_isa().name, name) != 0) return fail("another set is in use", name);
  if (*option) return 0;

  const Kernels* set = nullptr;
  for (const auto table : kTables)
    if (table().isa == &current_isa()) set = &table();
  if (!set) return fail("it has no table of kernels", name);
  kernels_test::Report report;
  const Kernels own = own_kernels(*set);
  if (own.codec) test_codec(own, &report);
  test_linear(own, &report);
  std::printf("%s: %d checks, %d failed\n", name, report.checks, report.failures);
  return report.failures ? 1 : 0;
}
