// Reads and decompresses the containers in which nvcc embeds device code.
#include "fatbin.h"

#include <dlfcn.h>
#include <elf.h>

#include <cstddef>
#include <cstring>

namespace cudasim::runtime {
namespace {

struct ContainerHeader {
  uint32_t magic;
  uint16_t version;
  uint16_t header_size;
  uint64_t size;
};

struct EntryHeader {
  uint16_t kind;
  uint16_t version;
  uint32_t header_size;
  uint64_t payload_size;     // with padding
  uint32_t compressed_size;  // without
  uint32_t unknown0;
  uint16_t minor, major;
  uint32_t arch;
  uint32_t name_offset, name_size;
  uint64_t flags;
  uint64_t unknown1;
  uint64_t uncompressed_size;
};
static_assert(sizeof(EntryHeader) == 64);

constexpr uint64_t kFlagLz4 = 0x2000, kFlagZstd = 0x8000;
constexpr uint64_t kFlagArchSpecific = 0x100000, kFlagFamilySpecific = 0x200000;

// The LZ4 block format: (token, literals, match offset) sequences without framing.
bool lz4_decompress(std::string_view in, std::string& out, size_t expected) {
  out.clear();
  out.reserve(expected);
  size_t pos = 0;
  auto extended = [&](size_t length) {
    if (length != 15) return length;
    while (pos < in.size()) {
      const auto byte = static_cast<uint8_t>(in[pos++]);
      length += byte;
      if (byte != 255) break;
    }
    return length;
  };
  while (pos < in.size()) {
    const auto token = static_cast<uint8_t>(in[pos++]);
    const size_t literals = extended(token >> 4);
    if (literals > in.size() - pos) return false;
    out.append(in.substr(pos, literals));
    pos += literals;
    if (pos == in.size() || out.size() >= expected) break;  // the last sequence has no match
    if (in.size() - pos < 2) return false;
    const size_t offset = static_cast<uint8_t>(in[pos]) | static_cast<uint8_t>(in[pos + 1]) << 8;
    pos += 2;
    const size_t match = extended(token & 15) + 4;
    if (offset == 0 || offset > out.size()) return false;
    for (size_t i = 0; i < match; ++i) out.push_back(out[out.size() - offset]);
  }
  return out.size() == expected;
}

// Almost every Linux machine has libzstd, but few have its headers, so it is looked up at run time.
struct Zstd {
  size_t (*decompress)(void*, size_t, const void*, size_t) = nullptr;
  unsigned (*is_error)(size_t) = nullptr;
  Zstd() {
    if (void* library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL)) {
      decompress = reinterpret_cast<decltype(decompress)>(dlsym(library, "ZSTD_decompress"));
      is_error = reinterpret_cast<decltype(is_error)>(dlsym(library, "ZSTD_isError"));
    }
  }
};

}  // namespace

std::vector<FatbinEntry> read_fatbin(const void* data) {
  std::vector<FatbinEntry> entries;
  ContainerHeader container;
  std::memcpy(&container, data, sizeof container);
  if (container.magic != kFatbinMagic || container.version != 1) return entries;
  const char* pos = static_cast<const char*>(data) + container.header_size;
  const char* end = pos + container.size;
  while (end - pos >= static_cast<std::ptrdiff_t>(sizeof(EntryHeader))) {
    EntryHeader header;
    std::memcpy(&header, pos, sizeof header);
    const uint64_t left = static_cast<uint64_t>(end - pos);
    if (header.header_size < 48 || header.header_size > left || header.payload_size > left - header.header_size) break;
    const bool compressed = header.flags & (kFlagLz4 | kFlagZstd);
    const uint64_t size = compressed && header.compressed_size && header.compressed_size <= header.payload_size
                              ? header.compressed_size
                              : header.payload_size;
    entries.push_back({.kind = header.kind,
                       .arch = header.arch,
                       .arch_specific = (header.flags & (kFlagArchSpecific | kFlagFamilySpecific)) != 0,
                       .flags = header.flags,
                       .payload = {pos + header.header_size, size},
                       .uncompressed_size = compressed ? header.uncompressed_size : 0});
    pos += header.header_size + header.payload_size;
  }
  return entries;
}

std::string unpack(const FatbinEntry& entry, std::string* error) {
  std::string out;
  if (entry.flags & kFlagZstd) {
    static const Zstd zstd;
    if (!zstd.decompress) {
      *error =
          "the device code is zstd-compressed and libzstd.so.1 is not installed "
          "(install it, or build the code with nvcc --no-compress)";
      return {};
    }
    out.resize(entry.uncompressed_size);
    const size_t size = zstd.decompress(out.data(), out.size(), entry.payload.data(), entry.payload.size());
    if (zstd.is_error(size)) {
      *error = "corrupt zstd-compressed device code";
      return {};
    }
    out.resize(size);
  } else if (entry.flags & kFlagLz4) {
    if (!lz4_decompress(entry.payload, out, entry.uncompressed_size)) {
      *error = "corrupt LZ4-compressed device code";
      return {};
    }
  } else {
    out.assign(entry.payload);
  }
  if (entry.kind == FatbinEntry::ptx)  // text, maybe with NULs at the end as padding
    while (!out.empty() && out.back() == '\0') out.pop_back();
  return out;
}

std::unordered_map<std::string, SassKernel> read_cubin(std::string_view elf) {
  std::unordered_map<std::string, SassKernel> kernels;
  Elf64_Ehdr header;
  if (elf.size() < sizeof header) return kernels;
  std::memcpy(&header, elf.data(), sizeof header);
  auto section = [&](unsigned index, Elf64_Shdr& out) {
    const uint64_t at = header.e_shoff + static_cast<uint64_t>(index) * header.e_shentsize;
    if (at + sizeof out > elf.size()) return false;
    std::memcpy(&out, elf.data() + at, sizeof out);
    return true;
  };
  const auto bytes_of = [elf](const Elf64_Shdr& s) {
    return s.sh_offset <= elf.size() && s.sh_size <= elf.size() - s.sh_offset ? elf.substr(s.sh_offset, s.sh_size)
                                                                              : std::string_view();
  };
  Elf64_Shdr names;
  if (!section(header.e_shstrndx, names)) return kernels;
  const std::string_view section_names = bytes_of(names);
  std::string_view symbols, symbol_names, info;
  for (unsigned i = 0; i < header.e_shnum; ++i) {
    Elf64_Shdr s, linked;
    if (!section(i, s) || s.sh_name >= section_names.size()) break;
    const std::string_view name = section_names.data() + s.sh_name;
    constexpr std::string_view kShared = ".nv.shared.", kText = ".text.";
    if (s.sh_type == SHT_SYMTAB && section(s.sh_link, linked)) {
      symbols = bytes_of(s);
      symbol_names = bytes_of(linked);
    } else if (name == ".nv.info") {
      info = bytes_of(s);
    } else if (name.starts_with(kShared)) {
      kernels[std::string(name.substr(kShared.size()))].shared_bytes = static_cast<uint32_t>(s.sh_size);
    } else if (name.starts_with(kText)) {
      kernels[std::string(name.substr(kText.size()))].instructions = static_cast<uint32_t>(s.sh_size / 16);
    }
  }
  // .nv.info is a list of attributes: format, number, then a 16-bit value or size. The register count
  // is attribute 0x2f, a sized one that holds a symbol's index and the number.
  constexpr uint8_t kSized = 4, kRegisterCount = 0x2f;
  for (size_t pos = 0; pos + 4 <= info.size();) {
    const auto format = static_cast<uint8_t>(info[pos]), number = static_cast<uint8_t>(info[pos + 1]);
    uint16_t size;
    std::memcpy(&size, &info[pos + 2], 2);
    pos += 4;
    if (format != kSized) continue;
    if (size > info.size() - pos) break;
    if (number == kRegisterCount && size == 8) {
      uint32_t values[2];
      std::memcpy(values, &info[pos], 8);
      Elf64_Sym symbol;
      const size_t at = values[0] * sizeof symbol;
      if (at + sizeof symbol <= symbols.size()) {
        std::memcpy(&symbol, &symbols[at], sizeof symbol);
        if (symbol.st_name < symbol_names.size())
          kernels[symbol_names.data() + symbol.st_name].registers = static_cast<int>(values[1]);
      }
    }
    pos += size;
  }
  return kernels;
}

}  // namespace cudasim::runtime
