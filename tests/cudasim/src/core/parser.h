// The recursive-descent parser of PTX text.
#pragma once
#include "ast.h"
#include "lexer.h"

namespace cudasim {

class Parser : Lexer {
 public:
  explicit Parser(AModule& m) : Lexer({m.text.data(), m.text.size()}), m_(m) {}
  void run() {
    while (skip(), p_ < end_) top_level();
  }

 private:
  AModule& m_;

  // State of the function being parsed.
  AFunction* f_ = nullptr;
  struct Scope {
    int32_t id;
    std::unordered_map<std::string_view, int32_t> regs;
    struct Range {
      int32_t first;
      uint32_t count;
    };
    std::unordered_map<std::string_view, Range> ranges;
    std::unordered_map<std::string_view, int32_t> vars;
  };
  std::vector<Scope> scopes_;

  // module scope
  void top_level();
  void parse_target();
  void skip_section();
  static Space space_of(std::string_view d);
  AVar variable(Space space, bool ext);
  void initializer(AVar& v, uint8_t width);
  void addend(AVar::Init& in);
  void module_variable(std::string_view d, bool ext);

  // functions
  void param_list(std::vector<AVar>& out);
  void function(bool entry);
  void skip_attributes();
  void open_scope();
  void body();
  void label(std::string_view n);
  void body_directive();
  void reg_decl();
  int32_t find_reg(std::string_view n);
  int32_t find_var(std::string_view n);

  // instructions
  void instruction();
  AOperand operand();
  AOperand simple_operand();
  AOperand name_operand();
};

}  // namespace cudasim
