#include "code.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <fstream>
#include <iostream>

#include "../cuda/device.cuh"
#include "instructions.h"

namespace machine {
namespace {

bool starts(const std::string& text, const char* with) { return text.compare(0, strlen(with), with) == 0; }

std::string trimmed(const std::string& text) {
  const size_t from = text.find_first_not_of(" \t"), to = text.find_last_not_of(" \t");
  return from == std::string::npos ? "" : text.substr(from, to - from + 1);
}

// At `separator`, but not within brackets.
std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (char c : text) {
    depth += (c == '[') - (c == ']');
    if (c == separator && depth == 0) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  for (std::string& part : parts) part = trimmed(part);
  return parts;
}

const std::map<std::string, int>& mods() {
  static const std::map<std::string, int> known = [] {
    std::map<std::string, int> known{{"32", int(Mod::WORD)},
                                     {"64", int(Mod::DOUBLE)},
                                     {"128", int(Mod::QUAD)},
                                     {"NAN", int(Mod::UNORDERED)},
                                     {"U16x2", int(Mod::U16X2)}};
#define MACHINE_MOD(name) known.emplace(#name, int(Mod::name));
    MACHINE_MODS(MACHINE_MOD)
#undef MACHINE_MOD
    return known;
  }();
  return known;
}

// ---- operands -------------------------------------------------------------------------------------------------------
// A register's number: R12, RZ, UR4, URZ; -1 for something else.
int numbered(const std::string& text, const char* prefix, const char* zero, int zero_index) {
  if (text == zero) return zero_index;
  if (!starts(text, prefix)) return -1;
  const std::string digits = text.substr(strlen(prefix));
  const bool is_number = !digits.empty() && digits.find_first_not_of("0123456789") == std::string::npos;
  return is_number ? atoi(digits.c_str()) : -1;
}

uint64_t hexadecimal(const std::string& text) {
  const bool negative = text[0] == '-';
  const uint64_t value = strtoull(text.c_str() + negative, nullptr, 16);
  return negative ? -value : value;
}

uint64_t number(const std::string& text, char type) {
  if (text.find("0x") != std::string::npos) return hexadecimal(text);
  double value;
  if (text.find("NAN") != std::string::npos) {
    value = text[0] == '-' ? -NAN : NAN;
  } else if (text.find("INF") != std::string::npos) {
    value = text[0] == '-' ? -INFINITY : INFINITY;
  } else {
    char* end;
    value = strtod(text.c_str(), &end);
    if (end == text.c_str() || *end) fail("no number: " + text);
  }
  uint64_t bits = 0;
  if (type == 'D') {
    memcpy(&bits, &value, 8);
  } else if (type == 'H') {
    bits = fusednorm::cuda::narrow<fusednorm::cuda::Float16>(static_cast<float>(value)).bits;
  } else {
    const float single = static_cast<float>(value);
    memcpy(&bits, &single, 4);
  }
  return bits;
}

// [R4.64+UR5+0x10], [R3.X4+0x80], [0x40], c[0x0][R4+0x28]: what stands within the last brackets.
void read_address(const std::string& inside, Operand& to) {
  for (std::string part : split(inside, '+')) {
    if (part.empty()) continue;
    if (const size_t x = part.find(".X"); x != std::string::npos) {
      to.scale = atoi(part.c_str() + x + 2);
      part.resize(x);
    }
    if (part.size() > 3 && part.substr(part.size() - 3) == ".64") {
      to.wide = true;
      part.resize(part.size() - 3);
    }
    if (const int at = numbered(part, "R", "RZ", kZero); at >= 0) {
      to.base = at;
    } else if (const int at = numbered(part, "UR", "URZ", kUniformZero); at >= 0) {
      to.uniform = at;
    } else {
      to.value += hexadecimal(part);
    }
  }
}

Operand read_operand(std::string text, char type) {
  using Kind = Operand::Kind;
  Operand found;
  if (const size_t reuse = text.find(".reuse"); reuse != std::string::npos) text.erase(reuse, 6);
  if (starts(text, "`(")) {
    found.kind = Kind::special;
    found.name = text.substr(2, text.size() - 3);
    return found;
  }
  if (text[0] == '!' || text[0] == '~') found.inverted = true, text.erase(0, 1);
  const bool minus = text[0] == '-' && text.size() > 1 && strchr("RUc|", text[1]);
  if (minus) found.negative = true, text.erase(0, 1);
  if (text[0] == '|') {
    found.absolute = true;
    text.erase(text.find_last_of('|'), 1).erase(0, 1);
  }
  if (starts(text, "c[")) {
    found.kind = Kind::constant;
    found.index = static_cast<int>(hexadecimal(text.substr(2, text.find(']') - 2)));
    const size_t from = text.rfind('[') + 1;
    read_address(text.substr(from, text.rfind(']') - from), found);
    return found;
  }
  if (text.back() == ']') {
    found.kind = Kind::address;
    const size_t from = text.rfind('[') + 1;  // desc[UR4][R2.64]: the descriptor says nothing of where
    read_address(text.substr(from, text.size() - 1 - from), found);
    return found;
  }
  std::string plain = text;
  if (const size_t dot = plain.find(".H"); dot != std::string::npos) {
    found.half = plain[dot + 2] - '0';
    plain.resize(dot);
  } else if (const size_t dot = plain.find(".B"); dot != std::string::npos) {
    found.byte = plain[dot + 2] - '0';
    plain.resize(dot);
  }
  if ((found.index = numbered(plain, "R", "RZ", kZero)) >= 0) {
    found.kind = Kind::general;
  } else if ((found.index = numbered(plain, "UR", "URZ", kUniformZero)) >= 0) {
    found.kind = Kind::uniform;
  } else if ((found.index = numbered(plain, "P", "PT", kTrue)) >= 0) {
    found.kind = Kind::predicate;
  } else if ((found.index = numbered(plain, "UP", "UPT", kTrue)) >= 0) {
    found.kind = Kind::uniform_predicate;
  } else if (starts(text, "SR") || text == "PR" || (found.index = numbered(text, "B", "", -1)) >= 0) {
    found.kind = Kind::special;
    found.name = text;
  } else {
    found.kind = Kind::immediate;
    found.value = number(text, type);
  }
  return found;
}

Instruction read_instruction(uint32_t pc, const std::string& text) {
  Instruction found;
  found.pc = pc;
  found.text = text;
  found.guard.kind = Operand::Kind::predicate;
  found.guard.index = kTrue;
  std::string rest = text;
  if (rest[0] == '@') {
    const size_t end = rest.find(' ');
    found.guard = read_operand(rest.substr(1, end - 1), 'I');
    rest = trimmed(rest.substr(end));
  }
  const size_t end = rest.find(' ');
  const std::vector<std::string> name = split(rest.substr(0, end), '.');
  found.opcode = name[0];
  for (size_t i = 1; i < name.size(); ++i) {
    const auto at = mods().find(name[i]);
    if (at == mods().end()) fail("unknown modifier ." + name[i] + ": " + text);
    found.mods.set(static_cast<size_t>(at->second));
  }
  found.execute = handler(found.opcode);
  if (!found.execute) fail("unknown instruction " + found.opcode + ": " + text);
  const char type = found.opcode[0];
  rest = end == std::string::npos ? "" : trimmed(rest.substr(end));
  rest = trimmed(rest.substr(0, rest.find("(*")));  // a branch's targets
  if (found.opcode == "RET" || found.opcode == "BRX") rest.insert(rest.find(' '), ",");
  if (!rest.empty()) {
    for (const std::string& operand : split(rest, ',')) found.operands.push_back(read_operand(operand, type));
  }
  return found;
}

}  // namespace

void fail(const std::string& message) {
  std::cerr << "cuda_machine: " << message << std::endl;
  exit(3);
}

// The bytes of a line of a data section.
void read_bytes(const std::string& line, std::vector<unsigned char>& to) {
  if (line.find(".byte") == std::string::npos) return;
  for (const std::string& byte : split(line.substr(line.find(".byte") + 5), ',')) {
    to.push_back(static_cast<unsigned char>(hexadecimal(byte)));
  }
}

std::map<std::string, Kernel> read_listing(const std::string& path) {
  std::ifstream file(path);
  if (!file) fail("cannot read " + path);
  std::map<std::string, Kernel> kernels;
  Kernel* kernel = nullptr;
  std::vector<unsigned char>* data = nullptr;
  std::map<std::string, uint32_t> labels;
  const auto link = [&] {
    if (!kernel) return;
    for (Instruction& instruction : kernel->code) {
      for (Operand& operand : instruction.operands) {
        if (operand.kind != Operand::Kind::special) continue;
        if (const auto at = labels.find(operand.name); at != labels.end()) operand.value = at->second;
      }
    }
  };
  std::string line;
  while (std::getline(file, line)) {
    if (const size_t at = line.find(".section\t"); at != std::string::npos) {
      link();
      labels.clear();
      const std::string name = line.substr(at + 9, line.find(',') - at - 9);
      kernel = starts(name, ".text.") ? &kernels[name.substr(6)] : nullptr;
      data = nullptr;
      if (starts(name, ".nv.constant") && name[13] == '.' && name[12] != '0') {
        data = &kernels[name.substr(14)].constants[name[12] - '0'];
      }
      continue;
    }
    if (data) read_bytes(line, *data);
    if (!kernel || line.empty()) continue;
    const uint32_t next = static_cast<uint32_t>(16 * kernel->code.size());
    if (line[0] != ' ' && line[0] != '\t' && line.back() == ':') {
      labels[line.substr(0, line.size() - 1)] = next;
    } else if (const size_t at = line.find("/*"); at != std::string::npos && line.back() == ';') {
      const uint32_t pc = static_cast<uint32_t>(strtoul(line.c_str() + at + 2, nullptr, 16));
      if (pc != next) fail("the listing leaves out something before: " + line);
      const size_t from = line.find("*/", at) + 2;
      kernel->code.push_back(read_instruction(pc, trimmed(line.substr(from, line.size() - 1 - from))));
    }
  }
  link();
  return kernels;
}

}  // namespace machine
