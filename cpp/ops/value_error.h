// Turns a wrong argument into Python's ValueError on every supported torch: QLORA_BOX(&f) is a TORCH_BOX(&f) that does
// so, and QLORA_BOX_ARGS(&f) the same for an f that takes its arguments as one struct (arguments.h). pybind11 converts
// std::invalid_argument to a ValueError where it calls the operator. torch 2.15 calls operators without pybind11 and,
// besides its own exceptions, converts only pybind11's, which it recognizes by name. So this header declares the one
// exception it needs, without pybind11 and Python, because programs without Python load this library too. That is why
// Python's symbols are optional.
#pragma once

#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cpp/format/portable.h"
#include "cpp/ops/arguments.h"
#include "cpp/ops/stable.h"

struct _object;
extern "C" QLORA_OPTIONAL _object* PyExc_ValueError;
extern "C" QLORA_OPTIONAL void PyErr_SetString(_object* type, const char* text);

namespace pybind11 {

class QLORA_EXPORT_TYPE builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;  // called by torch, with the GIL held
};

}  // namespace pybind11

namespace qlora {

class ValueError final : public pybind11::builtin_exception {
 public:
  using builtin_exception::builtin_exception;
  void set_error() const override {
    QLORA_FIND("python3.dll", PyErr_SetString)(*QLORA_FIND("python3.dll", PyExc_ValueError), what());
  }
};

template <void (*boxed)(StableIValue*, uint64_t, uint64_t)>
void with_value_errors(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  try {
    boxed(stack, arguments, outputs);
  } catch (const std::invalid_argument& error) {
    throw ValueError(error.what());
  }
}

// For an operator that takes a struct of cpp/ops/arguments.h by value. The struct is filled from the stack.
template <class Args, class Result>
void box(Result (*operation)(Args), StableIValue* stack) {
  Args args;
  uint64_t i = 0;
  for_each_field(args, [&](const auto& field) {
    field.value = stable::detail::to<std::remove_reference_t<decltype(field.value)>>(stack[i++]);
  });
  Result result = operation(std::move(args));
  if constexpr (std::is_same_v<Result, Tensor>) {
    stack[0] = stable::detail::from(result);
  } else {
    i = 0;
    std::apply([&](const auto&... part) { ((stack[i++] = stable::detail::from(part)), ...); }, result);
  }
}
template <auto operation>
void boxed_args(StableIValue* stack, uint64_t, uint64_t) {
  box(operation, stack);
}

}  // namespace qlora

#define QLORA_BOX(implementation) &qlora::with_value_errors<&TORCH_BOX(implementation)>
#define QLORA_BOX_ARGS(implementation) &qlora::with_value_errors<&qlora::boxed_args<implementation>>
