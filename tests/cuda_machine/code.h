// Machine code as the executor takes it: what nvdisasm prints of a cubin, read into instructions.
#pragma once

#include <stdint.h>

#include <bitset>
#include <map>
#include <string>
#include <vector>

namespace machine {

struct Warp;

constexpr int kZero = 255, kUniformZero = 63, kTrue = 7;  // RZ, URZ, PT and UPT

struct Operand {
  enum class Kind { general, uniform, predicate, uniform_predicate, immediate, constant, address, special };
  Kind kind = Kind::immediate;
  int index = 0;  // of the register or predicate; of a constant's bank
  bool negative = false, absolute = false, inverted = false;
  int half = -1, byte = -1;    // of the register, as values of so many bits; or the whole of it
  uint64_t value = 0;          // an immediate's bits, as the instruction takes them; an offset; a label's pc
  int base = kZero;            // constant and address: a general register,
  bool wide = false;           // which is a pair,
  int scale = 1;               // times this,
  int uniform = kUniformZero;  // and a uniform one
  std::string name;            // of something special
};

enum class Mod : int;  // what stands behind the dots of an opcode

struct Instruction {
  uint32_t pc = 0;
  std::string text, opcode;
  std::bitset<128> mods;
  Operand guard;
  std::vector<Operand> operands;
  void (*execute)(Warp&, const Instruction&, uint32_t active) = nullptr;
  bool has(Mod mod) const { return mods[static_cast<int>(mod)]; }
};

// clang-format off
#define MACHINE_MODS(M) \
  M(AND) M(OR) M(XOR) M(EX) M(X) M(HI) M(L) M(R) M(W) M(MOV) M(SHL) M(IADD) M(WIDE) M(LUT) M(MMA) M(PACK_AB) \
  M(LT) M(LE) M(GT) M(GE) M(EQ) M(NE) M(LTU) M(LEU) M(GTU) M(GEU) M(EQU) M(NEU) M(NUM) M(UNORDERED) \
  M(U8) M(S8) M(U16) M(S16) M(U16X2) M(U32) M(S32) M(U64) M(S64) M(F16) M(F32) M(F64) M(BF16) M(SX32) M(WORD) M(DOUBLE) M(QUAD) \
  M(FTZ) M(NTZ) M(RM) M(RP) M(RZ) M(TRUNC) M(FLOOR) M(CEIL) M(SAT) \
  M(RCP) M(RSQ) M(EX2) M(LG2) M(SIN) M(COS) M(SQRT) M(RCP64H) M(RSQ64H) \
  M(BFLY) M(IDX) M(UP) M(DOWN) M(DIV) M(CONV) M(REL) M(NOINC) M(NODEC) M(SYNC) M(DEFER_BLOCKING) M(ALL) M(COLLECTIVE) \
  M(E) M(CONSTANT) M(STRONG) M(GPU) M(SYS) M(IVALL) M(SC) M(LU) M(EF) M(EL)
// clang-format on
enum class Mod : int {
#define MACHINE_MOD(name) name,
  MACHINE_MODS(MACHINE_MOD)
#undef MACHINE_MOD
};

struct Kernel {
  std::vector<Instruction> code;                        // at pc / 16
  std::map<int, std::vector<unsigned char>> constants;  // of the banks behind that of the arguments
};

// The kernels of a listing, by name. Ends the process at an instruction that the executor does not know.
std::map<std::string, Kernel> read_listing(const std::string& path);

[[noreturn]] void fail(const std::string& message);

}  // namespace machine
