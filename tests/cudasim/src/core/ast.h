// Syntax tree of one PTX module. Names are views into the module's own copy of the text.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "types.h"

namespace cudasim {

struct AOperand {
  enum Kind : uint8_t {
    reg,      // reg id (neg: "!p" or "-r")
    special,  // %tid.x and the like: name
    num,      // integer or float bits in imm (float width in imm_float: 0, 32 or 64)
    sym,      // variable, parameter, function or label: name, imm = byte offset
    vec,      // {a, b, ...}: elems
    addr,     // [base + imm], base = elems[0] if present; tensor coordinates in elems[1]
    pair,     // a|b: elems
    sink,     // _
    list,     // ( a, b ) of a call
  };
  Kind kind = num;
  bool neg = false;
  uint8_t imm_float = 0;
  int32_t reg_id = -1;
  int32_t var_id = -1;  // function-scope variable, when sym names one
  int32_t scope = 0;    // scope a symbol was used in (labels resolve late)
  int64_t imm = 0;
  std::string_view name;
  std::vector<AOperand> elems;
};

struct AInstr {
  std::string_view text;  // full source text, for messages
  uint32_t line = 0;
  std::vector<std::string_view> mods;  // opcode split at '.', mods[0] is the base name
  std::vector<AOperand> ops;
  int32_t pred = -1;  // guard predicate register id
  bool pred_neg = false;
};

struct AVar {  // any variable that has storage
  std::string_view name;
  Space space = Space::none;
  uint32_t align = 1;
  uint64_t size = 0;  // bytes
  Ty type = Ty::none;
  bool external = false;  // extern, sized elsewhere (extern .shared T x[])
  struct Init {
    uint64_t value;
    uint8_t width;
    std::string_view symbol;
    int64_t addend;
    bool generic;
    uint64_t mask_shift;
  };
  std::vector<Init> init;
};

struct ALabel {
  std::string_view name;
  int32_t scope;
  uint32_t index;
};
struct ABranchTable {
  std::string_view name;
  int32_t scope;
  std::vector<std::string_view> targets;
};

struct AFunction {
  std::string_view name;
  bool is_entry = false, has_body = false;
  std::vector<AVar> params, returns;
  std::vector<AVar> vars;             // .local / .shared / .param declared in the body
  std::vector<Ty> regs;               // by register id
  std::vector<int32_t> scope_parent;  // scope tree; 0 is the function body
  std::vector<AInstr> body;
  std::vector<ALabel> labels;
  std::vector<ABranchTable> tables;
  uint32_t maxntid = 0, reqntid = 0;
  uint32_t cluster[3] = {0, 0, 0};
};

struct AModule {
  std::string text;
  uint32_t target = 0;     // 80, 90, ...
  std::vector<AVar> vars;  // module scope
  std::unordered_map<std::string_view, uint32_t> var_index;
  std::deque<AFunction> functions;
  std::unordered_map<std::string_view, uint32_t> func_index;
};

// Returns false and sets error (with a line number) on malformed text.
bool parse_ptx(AModule& module, std::string* error);

}  // namespace cudasim
