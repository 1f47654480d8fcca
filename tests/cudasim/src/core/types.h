// PTX scalar types and state spaces, shared by the parser and the decoder.
#pragma once
#include <cstdint>
#include <string_view>

namespace cudasim {

enum class Ty : uint8_t {
  none,
  pred,
  b8,
  u8,
  s8,
  b16,
  u16,
  s16,
  f16,
  bf16,
  b32,
  u32,
  s32,
  f32,
  f16x2,
  bf16x2,
  tf32,
  b64,
  u64,
  s64,
  f64,
  b128,
  // types that only appear as qualifiers of cvt / mma
  e4m3,
  e5m2,
  e4m3x2,
  e5m2x2,
  e2m1,
  e2m3,
  e3m2,
  e2m1x2,
  e2m3x2,
  e3m2x2,
  e8m0x2,
  e4m3x4,
  e5m2x4,
  u4,
  s4,
  b1,
  u16x2,
  s16x2,
};

inline Ty parse_type(std::string_view s) {
  struct E {
    const char* n;
    Ty t;
  };
  static const E table[] = {
      {"pred", Ty::pred},     {"b8", Ty::b8},         {"u8", Ty::u8},         {"s8", Ty::s8},
      {"b16", Ty::b16},       {"u16", Ty::u16},       {"s16", Ty::s16},       {"f16", Ty::f16},
      {"bf16", Ty::bf16},     {"b32", Ty::b32},       {"u32", Ty::u32},       {"s32", Ty::s32},
      {"f32", Ty::f32},       {"f16x2", Ty::f16x2},   {"bf16x2", Ty::bf16x2}, {"tf32", Ty::tf32},
      {"b64", Ty::b64},       {"u64", Ty::u64},       {"s64", Ty::s64},       {"f64", Ty::f64},
      {"b128", Ty::b128},     {"e4m3", Ty::e4m3},     {"e5m2", Ty::e5m2},     {"e4m3x2", Ty::e4m3x2},
      {"e5m2x2", Ty::e5m2x2}, {"e2m1", Ty::e2m1},     {"e2m3", Ty::e2m3},     {"e3m2", Ty::e3m2},
      {"e2m1x2", Ty::e2m1x2}, {"e2m3x2", Ty::e2m3x2}, {"e3m2x2", Ty::e3m2x2}, {"ue8m0x2", Ty::e8m0x2},
      {"e4m3x4", Ty::e4m3x4}, {"e5m2x4", Ty::e5m2x4}, {"u4", Ty::u4},         {"s4", Ty::s4},
      {"b1", Ty::b1},         {"u16x2", Ty::u16x2},   {"s16x2", Ty::s16x2}};
  for (auto& e : table)
    if (s == e.n) return e.t;
  return Ty::none;
}

// Bytes of one value of the type (a predicate counts as 1 in memory).
inline int ty_size(Ty t) {
  switch (t) {
    case Ty::none:
      return 0;
    case Ty::pred:
    case Ty::b8:
    case Ty::u8:
    case Ty::s8:
    case Ty::e4m3:
    case Ty::e5m2:
    case Ty::e2m1:
    case Ty::e2m3:
    case Ty::e3m2:
    case Ty::u4:
    case Ty::s4:
    case Ty::b1:
    case Ty::e2m1x2:
      return 1;
    case Ty::b16:
    case Ty::u16:
    case Ty::s16:
    case Ty::f16:
    case Ty::bf16:
    case Ty::e4m3x2:
    case Ty::e5m2x2:
    case Ty::e2m3x2:
    case Ty::e3m2x2:
    case Ty::e8m0x2:
      return 2;
    case Ty::b32:
    case Ty::u32:
    case Ty::s32:
    case Ty::f32:
    case Ty::f16x2:
    case Ty::bf16x2:
    case Ty::tf32:
    case Ty::u16x2:
    case Ty::s16x2:
    case Ty::e4m3x4:
    case Ty::e5m2x4:
      return 4;
    case Ty::b64:
    case Ty::u64:
    case Ty::s64:
    case Ty::f64:
      return 8;
    case Ty::b128:
      return 16;
  }
  return 0;
}
inline bool ty_signed(Ty t) { return t == Ty::s8 || t == Ty::s16 || t == Ty::s32 || t == Ty::s64; }
inline bool ty_float(Ty t) {
  return t == Ty::f16 || t == Ty::bf16 || t == Ty::f32 || t == Ty::f64 || t == Ty::f16x2 || t == Ty::bf16x2 ||
         t == Ty::tf32;
}

enum class Space : uint8_t { generic, global, constant, shared, shared_cluster, local, param, none };

}  // namespace cudasim
