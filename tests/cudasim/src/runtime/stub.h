// A stand-in for a function of the real library that is not simulated. It is weak, so a real implementation in another
// file replaces it.
#pragma once
#include <stdio.h>
#include <stdlib.h>

#define CUDASIM_STUB(name)                                                   \
  extern "C" __attribute__((visibility("default"), weak)) int name() {       \
    if (const char* on = getenv("CUDASIM_LOG"); on && *on)                   \
      fputs("cudasim: " #name " is not simulated and was called\n", stderr); \
    return CUDASIM_STUB_STATUS;                                              \
  }
