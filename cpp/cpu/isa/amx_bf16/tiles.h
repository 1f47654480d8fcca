// The vocabulary tiles:: for AMX, and the state that it needs.
//
// A tile is 16 rows of 64 bytes: 16 x 32 bfloat16 as a, 16 pairs of rows x 16 columns as b, 16 x 16 float32 as sums. In
// memory its rows follow each other. What a program may not have is a tile that lives across a call: the compiler
// neither allocates nor saves tiles, so a kernel names them by number.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace tiles {

// While one lives, its thread may use tiles. It sets up the unit anew each time, for oneDNN sets it up its own way in
// the same threads, and clears it in the end: tiles that stay in use make every context switch save them.
class Session {
 public:
  Session() { _tile_loadconfig(&kConfig); }
  ~Session() { _tile_release(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static_assert(sizeof(Config) == 64);
  // Never a local: GCC's intrinsic says that it reads the first 8 bytes, and stores to the others could be left out.
  static const Config kConfig;
};
inline constexpr Session::Config Session::kConfig = {};

// In assembly: the macros of GCC 12 want a literal for a tile's number, and hold up every other access to memory.
using Tile = char[1024];

template <int tile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
inline void load(const void* p) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(p), "r"(int64_t{64}), "i"(tile), "m"(*static_cast<const Tile*>(p)));
}
// The same for what is read once from the second-level cache: it leaves the first to what is read again.
template <int tile>
inline void load_streamed(const void* p) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2"
               :
               : "r"(p), "r"(int64_t{64}), "i"(tile), "m"(*static_cast<const Tile*>(p)));
}
template <int tile>
inline void store(void* p) {
  asm volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(*static_cast<Tile*>(p)) : "r"(p), "r"(int64_t{64}), "i"(tile));
}
// sums += a · b, of bfloat16 pairs: sums[i][j] += a[i][2p] * b[p][2j] + a[i][2p + 1] * b[p][2j + 1]. Subnormals count
// as zero.
template <int sums, int a, int b>
inline void dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

}  // namespace tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
