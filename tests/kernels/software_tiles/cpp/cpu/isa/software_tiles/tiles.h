// The vocabulary tiles:: in plain C++. It ends the process if a kernel misuses it: without a Session, with a tile that
// holds nothing yet, or with memory outside of the scratch.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/dtypes.h"
#include "tests/kernels/software_tiles/scratch.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace tiles {

inline void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "tiles: %s\n", what);
  std::abort();
}

struct State {
  bool session = false;
  bool filled[8] = {};
  float sums[8][16][16];
  uint16_t elements[8][16][32];
};
inline thread_local State state;

class Session {
 public:
  Session() {
    expect(!state.session, "a session in a session");
    state.session = true;
    for (bool& filled : state.filled) filled = false;
  }
  ~Session() { state.session = false; }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

template <int tile>
inline void zero() {
  expect(state.session, "zero without a session");
  std::memset(state.sums[tile], 0, sizeof(state.sums[tile]));
  state.filled[tile] = true;
}
template <int tile>
inline void load(const void* p) {
  expect(state.session, "load without a session");
  expect(reinterpret_cast<uintptr_t>(p) % 64 == 0, "load from an address that is no multiple of 64");
  expect(is_scratch(p, 1024), "load from beyond the scratch");
  std::memcpy(state.sums[tile], p, 1024);
  std::memcpy(state.elements[tile], p, 1024);
  state.filled[tile] = true;
}
template <int tile>
inline void load_streamed(const void* p) {
  load<tile>(p);
}
template <int tile>
inline void store(void* p) {
  expect(state.session, "store without a session");
  expect(state.filled[tile], "store of a tile that holds nothing");
  expect(is_scratch(p, 1024), "store beyond the scratch");
  std::memcpy(p, state.sums[tile], 1024);
}
template <int sums, int a, int b>
inline void dot() {
  expect(state.session && state.filled[sums] && state.filled[a] && state.filled[b], "dot of a tile that holds nothing");
  for (int i = 0; i < 16; ++i) {
    for (int pair = 0; pair < 16; ++pair) {
      for (int j = 0; j < 16; ++j) {
        for (int e = 0; e < 2; ++e) {
          const bfloat16 x{state.elements[a][i][2 * pair + e]}, y{state.elements[b][pair][2 * j + e]};
          state.sums[sums][i][j] += to_float(x) * to_float(y);
        }
      }
    }
  }
}

}  // namespace tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
