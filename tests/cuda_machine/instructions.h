// The instructions that the executor knows, by name; each executes for the lanes of `active`. Their operands are in the
// order of the listing.
#pragma once

#include "warp.h"

namespace machine {

using Handler = void (*)(Warp&, const Instruction&, Mask active);

struct Named {
  const char* name;
  Handler handler;
};
// Null for one that nobody knows.
Handler handler(const std::string& name);
// Those of each file; a null name ends them.
const Named* integer_instructions();
const Named* floating_instructions();
const Named* memory_instructions();
const Named* control_instructions();

// What an instruction cannot be executed with: ends the process with its text.
[[noreturn]] void refuse(const Instruction& instruction, const std::string& why);
inline void expect(bool holds, const Instruction& instruction, const char* why) {
  if (!holds) refuse(instruction, why);
}

// Whether an operand is a predicate, and so one of those that may be there or not.
inline bool is_predicate(const Operand& operand) {
  return operand.kind == Operand::Kind::predicate || operand.kind == Operand::Kind::uniform_predicate;
}
// Walks the operands: the destination, the predicates that are written, and then what is read.
struct Operands {
  const Instruction& of;
  size_t at = 0;
  explicit Operands(const Instruction& instruction) : of(instruction) {}
  const Operand& next() {
    expect(at < of.operands.size(), of, "has fewer operands than expected");
    return of.operands[at++];
  }
  const Operand* next_predicate() {
    return at < of.operands.size() && is_predicate(of.operands[at]) ? &of.operands[at++] : nullptr;
  }
};

}  // namespace machine
