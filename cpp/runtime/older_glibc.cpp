// What GCC's static runtime libraries ask of the glibc that they were compiled with, for an older one (QLORA_GLIBC in
// CMakeLists.txt). Hidden in each library that is linked with it.
#include <dlfcn.h>
#include <link.h>

#include <cstdint>

extern "C" {

// glibc 2.32: whether counts need no atomic instructions. To say that there may be threads is always right.
char __libc_single_threaded = 0;

// glibc 2.38: strtoul that knows C23's binary numbers, too; libstdc++ reads a setting with it.
unsigned long older_strtoul(const char* text, char** end, int base) __asm__("strtoul");
unsigned long __isoc23_strtoul(const char* text, char** end, int base) { return older_strtoul(text, end, base); }

#ifdef DLFO_STRUCT_HAS_EH_DBASE  // this compiler's glibc is 2.35 or newer, and its unwinder asks it by this function

// The object whose code `address` is in, for the unwinder; 0 where there is one. As the GNU C Library manual has it,
// "Dynamic Linker Introspection".
int _dl_find_object(void* address, dl_find_object* result) {
  struct Search {
    uintptr_t address;
    dl_find_object* result;
  } search{reinterpret_cast<uintptr_t>(address), result};
  const auto look = [](dl_phdr_info* object, size_t, void* context) -> int {
    const auto& [address, result] = *static_cast<Search*>(context);
    uintptr_t begin = UINTPTR_MAX, end = 0, unwind_table = 0;
    bool found = false;
    for (int i = 0; i < object->dlpi_phnum; ++i) {
      const auto& segment = object->dlpi_phdr[i];
      const uintptr_t first = object->dlpi_addr + segment.p_vaddr, last = first + segment.p_memsz;
      if (segment.p_type == PT_GNU_EH_FRAME) unwind_table = first;
      if (segment.p_type != PT_LOAD) continue;
      if (first < begin) begin = first;
      if (last > end) end = last;
      found |= first <= address && address < last;
    }
    if (!found || !unwind_table) return 0;
    *result = {};
    result->dlfo_map_start = reinterpret_cast<void*>(begin);
    result->dlfo_map_end = reinterpret_cast<void*>(end);
    result->dlfo_eh_frame = reinterpret_cast<void*>(unwind_table);
    return 1;
  };
  return dl_iterate_phdr(look, &search) == 1 ? 0 : -1;
}

#endif

}  // extern "C"
