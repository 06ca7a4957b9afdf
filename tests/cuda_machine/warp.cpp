#include "warp.h"

#include <string.h>

#include "instructions.h"
#include "machine.h"

namespace machine {

namespace {

// An operand that is in all lanes alike.
bool same_everywhere(const Warp& w, const Operand& from, uint64_t* value, size_t bytes) {
  using Kind = Operand::Kind;
  if (from.kind == Kind::immediate) {
    *value = from.value;
  } else if (from.kind == Kind::uniform) {
    *value = from.index == kUniformZero ? 0 : w.uniform[from.index];
    if (bytes == 8 && from.index != kUniformZero) *value |= uint64_t{w.uniform[from.index + 1]} << 32;
  } else if (from.kind == Kind::constant) {
    if (from.index != 0 || from.value + bytes > w.block->constants.size()) fail("a constant outside of the arguments");
    *value = 0;
    memcpy(value, w.block->constants.data() + from.value, bytes);
  } else {
    return false;
  }
  return true;
}

Lanes raw(const Warp& w, const Operand& from) {
  Lanes found{};
  uint64_t value;
  if (same_everywhere(w, from, &value, 4)) {
    found.fill(static_cast<uint32_t>(value));
  } else if (from.kind == Operand::Kind::general) {
    if (from.index != kZero) found = w.general[from.index];
  } else {
    fail("an operand that is no register: " + from.name);
  }
  if (from.half >= 0) {
    for (uint32_t& v : found) v = from.half ? v >> 16 : v & 0xffff;
  } else if (from.byte >= 0) {
    for (uint32_t& v : found) v = v >> 8 * from.byte & 0xff;
  }
  return found;
}

Pairs raw_pair(const Warp& w, const Operand& from) {
  Pairs found{};
  uint64_t value;
  if (same_everywhere(w, from, &value, 8)) {
    found.fill(value);
  } else if (from.kind != Operand::Kind::general) {
    fail("an operand that is no pair of registers: " + from.name);
  } else if (from.index != kZero) {
    for (int i = 0; i < kLanes; ++i) {
      found[i] = uint64_t{w.general[from.index + 1][i]} << 32 | w.general[from.index][i];
    }
  }
  return found;
}

}  // namespace

Lanes Warp::read(const Operand& from) const {
  Lanes found = raw(*this, from);
  for (uint32_t& v : found) {
    if (from.absolute && static_cast<int32_t>(v) < 0) v = 0 - v;
    if (from.inverted) v = ~v;
    if (from.negative) v = 0 - v;
  }
  return found;
}

Lanes Warp::read_float(const Operand& from) const {
  Lanes found = raw(*this, from);
  for (uint32_t& v : found) {
    if (from.absolute) v &= 0x7fffffffu;
    if (from.negative) v ^= 0x80000000u;
  }
  return found;
}

Pairs Warp::read_pair(const Operand& from) const {
  Pairs found = raw_pair(*this, from);
  for (uint64_t& v : found) {
    if (from.negative) v = 0 - v;
  }
  return found;
}

Pairs Warp::read_double(const Operand& from) const {
  Pairs found = raw_pair(*this, from);
  for (uint64_t& v : found) {
    if (from.absolute) v &= ~(uint64_t{1} << 63);
    if (from.negative) v ^= uint64_t{1} << 63;
  }
  return found;
}

Mask Warp::test(const Operand& from) const {
  Mask found = 0;
  if (from.kind == Operand::Kind::uniform_predicate) {
    found = from.index == kTrue || uniform_predicate[from.index] ? ~Mask{0} : 0;
  } else if (from.kind == Operand::Kind::predicate) {
    found = from.index == kTrue ? ~Mask{0} : predicate[from.index];
  } else {
    fail("an operand that is no predicate");
  }
  return from.inverted ? ~found : found;
}

void Warp::write(const Operand& to, const Lanes& values, Mask lanes) {
  if (!lanes) return;
  if (to.kind == Operand::Kind::uniform) {
    if (to.index != kUniformZero) uniform[to.index] = values[__builtin_ctz(lanes)];
  } else if (to.kind != Operand::Kind::general) {
    fail("a result that is no register");
  } else if (to.index != kZero) {
    for_lanes(lanes, [&](int i) { general[to.index][i] = values[i]; });
  }
}

void Warp::write_pair(const Operand& to, const Pairs& values, Mask lanes) {
  Lanes low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = static_cast<uint32_t>(values[i]);
    high[i] = static_cast<uint32_t>(values[i] >> 32);
  }
  const bool zero = to.index == (to.kind == Operand::Kind::uniform ? kUniformZero : kZero);
  if (zero) return;
  Operand next = to;
  ++next.index;
  write(to, low, lanes);
  write(next, high, lanes);
}

void Warp::set(const Operand& to, Mask values, Mask lanes) {
  if (!lanes || to.index == kTrue) return;
  if (to.kind == Operand::Kind::uniform_predicate) {
    uniform_predicate[to.index] = (values >> __builtin_ctz(lanes) & 1) != 0;
  } else {
    predicate[to.index] = (predicate[to.index] & ~lanes) | (values & lanes);
  }
}

}  // namespace machine
