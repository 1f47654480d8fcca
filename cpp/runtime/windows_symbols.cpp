// Finds what cpp/format/portable.h calls optional symbols, on Windows.
#include <windows.h>

#include "cpp/format/portable.h"

namespace qlora {

void* find_symbol(const char* library, const char* name) {
  const HMODULE module = LoadLibraryA(library);  // already loaded where the symbol is needed, and never unloaded
  return module ? reinterpret_cast<void*>(GetProcAddress(module, name)) : nullptr;
}

}  // namespace qlora
