// Shared by the files of integer instructions.
#pragma once
#include "select.h"

namespace cudasim {

template <class T>
using U = std::make_unsigned_t<T>;
template <class T>
constexpr int width = int(sizeof(T) * 8);

template <class F, int N>
bool sel_plain(Decoder& d, const AInstr& in, Op& op) {
  Ty t = last_type(in);
  if (!operands(d, in, op, t, N)) return false;
  if constexpr (N == 1)
    return done(op, PICK_INT(h1, F, t));
  else if constexpr (N == 2)
    return done(op, PICK_INT(h2, F, t));
  else
    return done(op, PICK_INT(h3, F, t));
}

}  // namespace cudasim
