// The vocabulary tiles:: in plain C++. It ends the process if a kernel misuses it: without a Session, with a tile that
// holds nothing yet, or with memory outside of the scratch and of the stack, whose ends the address sanitizer checks.
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

// A tile has 16 rows of 64 bytes, or as many as the session says.
struct State {
  bool session = false;
  bool filled[8] = {};
  int rows[8], row_bytes[8];
  alignas(64) char bytes[8][16][64];
};
inline thread_local State state;

class Session {
 public:
  Session() : Session(16, 16) {}
  Session(int rows, int words) {
    expect(!state.session, "a session in a session");
    state.session = true;
    for (int tile = 0; tile < 8; ++tile) {
      state.filled[tile] = false;
      state.rows[tile] = tile < 6 ? rows : words;
      state.row_bytes[tile] = tile == 4 || tile == 5 ? 4 * words : 64;
    }
  }
  ~Session() { state.session = false; }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

inline void expect_memory(const void* p, int64_t bytes, int alignment = 64) {
  const char here = 0;
  const auto distance = reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(&here);
  const bool is_on_stack = distance > 0 && distance < (1 << 20);
  expect(is_on_stack || is_scratch(p, bytes), "memory beyond the scratch");
  expect(reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(alignment) == 0, "rows that cross a cache line");
}

template <int tile>
inline void zero() {
  expect(state.session, "zero without a session");
  std::memset(state.bytes[tile], 0, sizeof(state.bytes[tile]));
  state.filled[tile] = true;
}
template <int tile, int stride = 64>
inline void load(const void* p) {
  expect(state.session, "load without a session");
  expect_memory(p, (state.rows[tile] - 1) * stride + state.row_bytes[tile], state.row_bytes[tile]);
  std::memset(state.bytes[tile], 0, sizeof(state.bytes[tile]));
  for (int row = 0; row < state.rows[tile]; ++row)
    std::memcpy(state.bytes[tile][row], static_cast<const char*>(p) + row * stride,
                static_cast<size_t>(state.row_bytes[tile]));
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
  expect_memory(p, state.rows[tile] * 64);
  std::memcpy(p, state.bytes[tile], static_cast<size_t>(state.rows[tile]) * 64);
}

// Calls add(i, word, j) for the words, of a's row i and b's row `word` and column j, whose products are added to sums.
template <int sums, int a, int b, class Add>
inline void multiply_words(const Add& add) {
  expect(state.session && state.filled[sums] && state.filled[a] && state.filled[b], "dot of a tile that holds nothing");
  expect(state.row_bytes[a] == 4 * state.rows[b] && state.rows[sums] == state.rows[a], "dot of other shapes");
  for (int i = 0; i < state.rows[a]; ++i)
    for (int word = 0; word < state.rows[b]; ++word)
      for (int j = 0; j < 16; ++j) add(i, word, j);
}
template <class T>
inline T& element(int tile, int row, int column) {
  return *reinterpret_cast<T*>(state.bytes[tile][row] + column * static_cast<int>(sizeof(T)));
}
template <int sums, int a, int b>
inline void dot() {
  multiply_words<sums, a, b>([](int i, int word, int j) {
    for (int e = 0; e < 2; ++e)
      element<float>(sums, i, j) +=
          to_float(element<bfloat16>(a, i, 2 * word + e)) * to_float(element<bfloat16>(b, word, 2 * j + e));
  });
}
template <int sums, int a, int b>
inline void dot_int8() {
  multiply_words<sums, a, b>([](int i, int word, int j) {
    for (int e = 0; e < 4; ++e)
      element<int32_t>(sums, i, j) += element<int8_t>(a, i, 4 * word + e) * element<int8_t>(b, word, 4 * j + e);
  });
}

}  // namespace tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
