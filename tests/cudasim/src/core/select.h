// Helpers shared by the files that select instruction handlers.
#pragma once
#include <type_traits>

#include "decode.h"
#include "lanes.h"

namespace cudasim {

// Handlers of one to three operands of the same type; F::f is the lane function.
template <class T, class F>
void h1(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T* a = w.r<T>(o.a);
  each(d, m, [&](int i) { return T(F::f(a[i])); });
}
template <class T, class F>
void h2(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T *a = w.r<T>(o.a), *b = w.r<T>(o.b);
  each(d, m, [&](int i) { return T(F::f(a[i], b[i])); });
}
template <class T, class F>
void h3(Warp& w, const Op& o, uint32_t m) {
  T* d = w.r<T>(o.dst);
  const T *a = w.r<T>(o.a), *b = w.r<T>(o.b), *c = w.r<T>(o.c);
  each(d, m, [&](int i) { return T(F::f(a[i], b[i], c[i])); });
}

// Picks an instantiation by integer type (signed and unsigned kept apart).
#define PICK_INT(H, F, t)      \
  [&]() -> Handler {           \
    switch (t) {               \
      case Ty::u16:            \
      case Ty::b16:            \
        return H<uint16_t, F>; \
      case Ty::s16:            \
        return H<int16_t, F>;  \
      case Ty::u32:            \
      case Ty::b32:            \
        return H<uint32_t, F>; \
      case Ty::s32:            \
        return H<int32_t, F>;  \
      case Ty::u64:            \
      case Ty::b64:            \
        return H<uint64_t, F>; \
      case Ty::s64:            \
        return H<int64_t, F>;  \
      default:                 \
        return nullptr;        \
    }                          \
  }()

inline bool operands(Decoder& d, const AInstr& in, Op& op, Ty t, size_t n) {
  if (in.ops.size() != n + 1) return false;
  op.dst = d.dst(in.ops[0], ty_size(t));
  uint32_t* to[4] = {&op.a, &op.b, &op.c, &op.d};
  for (size_t i = 0; i < n; ++i) *to[i] = d.src(in.ops[i + 1], t);
  return true;
}
inline bool done(Op& op, Handler h) {
  op.fn = h;
  return h != nullptr;
}

// add, sub, mul, fma, min, ... of f32/f64 and of the half types.
bool select_float(Decoder&, const AInstr&, Op&);
bool select_half(Decoder&, const AInstr&, Op&);
inline bool is_half(Ty t) { return t == Ty::f16 || t == Ty::bf16 || t == Ty::f16x2 || t == Ty::bf16x2; }

// Comparison of set / setp / slct for floats (defined with the integer ones).
enum Cmp : uint8_t { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };
bool parse_cmp(std::string_view s, Cmp* c, bool* is_unsigned);
template <class T>
inline bool compare(Cmp c, T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    switch (c) {
      case EQ:
        return a == b;
      case NE:
        return a < b || a > b;
      case LT:
        return a < b;
      case LE:
        return a <= b;
      case GT:
        return a > b;
      case GE:
        return a >= b;
      case EQU:
        return !(a < b || a > b);
      case NEU:
        return !(a == b);
      case LTU:
        return !(a >= b);
      case LEU:
        return !(a > b);
      case GTU:
        return !(a <= b);
      case GEU:
        return !(a < b);
      case NUM:
        return a == a && b == b;
      case NAN_:
        return !(a == a && b == b);
    }
  } else {
    switch (c) {
      case EQ:
        return a == b;
      case NE:
        return a != b;
      case LT:
        return a < b;
      case LE:
        return a <= b;
      case GT:
        return a > b;
      case GE:
        return a >= b;
      default:
        return false;
    }
  }
  return false;
}

}  // namespace cudasim
