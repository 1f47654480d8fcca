// The vocabulary tiles:: for AMX, and the state that it needs.
//
// A tile is 16 rows of 64 bytes: 16 x 32 bfloat16 as a, 16 pairs of rows x 16 columns as b, 16 x 16 float32 as sums. Or
// 16 x 64 int8 as a, 16 rows of four int8 x 16 columns as b, 16 x 16 int32 as sums. The compiler neither allocates nor
// saves tiles, so a kernel names them by number, and no tile may be in use across a call.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace tiles {

// A thread may use tiles while it has a Session. Each session configures the unit, because oneDNN configures it
// differently in the same threads. At its end it releases the tiles, because every context switch saves tiles in use.
class Session {
 public:
  Session() : Session(16, 16) {}
  // Tiles 0 to 3, the sums, and 4 and 5, for a, have `rows` rows. A row of a has `words` words of four bytes, and 6 and
  // 7, for b, have as many rows.
  Session(int rows, int words) {
    Config config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? 4 * words : 64);
      config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : words);
    }
    // GCC's intrinsic declares that it reads the first 8 bytes only, so stores to the others could be removed.
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Session() { _tile_release(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Config) == 64);
};

// In assembly, because GCC 12's macros need a literal as a tile's number and order all other memory accesses.
using Tile = char[1024];

template <int tile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
// Loads rows that lie `stride` bytes apart.
template <int tile, int stride = 64>
inline void load(const void* p) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(p), "r"(int64_t{stride}), "i"(tile), "m"(*static_cast<const char (*)[15 * stride + 64]>(p)));
}
// The same for data that is read once from the second-level cache. It leaves the first level to data that is read
// again.
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

// sums += a · b, of four int8: sums[i][j] += the sum over e of a[i][4w + e] * b[w][4j + e].
template <int sums, int a, int b>
inline void dot_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

}  // namespace tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
