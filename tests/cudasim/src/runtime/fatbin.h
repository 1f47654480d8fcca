// Reads the containers in which nvcc embeds device code ("fat binaries").
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace cudasim::runtime {

// What an extension passes to __cudaRegisterFatBinary.
struct FatbinWrapper {
  uint32_t magic;    // kFatbinWrapperMagic
  uint32_t version;  // 2: `extra` is a null-terminated array of further containers
  const void* data;
  const void* const* extra;
};
inline constexpr uint32_t kFatbinWrapperMagic = 0x466243b1;
inline constexpr uint32_t kFatbinMagic = 0xba55ed50;

struct FatbinEntry {
  enum Kind : uint16_t { ptx = 1, elf = 2 };
  uint16_t kind;
  uint32_t arch;       // 90 for compute_90 / sm_90
  bool arch_specific;  // compute_90a, compute_120f
  uint64_t flags;
  std::string_view payload;    // maybe compressed
  uint64_t uncompressed_size;  // 0 when not compressed
};

// Lists a container's entries; stops at the first malformed one.
std::vector<FatbinEntry> read_fatbin(const void* data);

// The entry's PTX text or ELF image. On failure returns an empty string and fills `error`.
std::string unpack(const FatbinEntry&, std::string* error);

// What ptxas decided for each kernel, read from a SASS image.
struct SassKernel {
  int registers = 0;
  uint32_t shared_bytes = 0;
  uint32_t instructions = 0;  // in its code, of 16 bytes each
};
std::unordered_map<std::string, SassKernel> read_cubin(std::string_view elf);

}  // namespace cudasim::runtime
