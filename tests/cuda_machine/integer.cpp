// Integers, bits and predicates.
#include <algorithm>

#include "instructions.h"

namespace machine {
namespace {

using I = const Instruction&;

template <class F>
Lanes lanewise(F f) {
  Lanes found;
  for (int i = 0; i < kLanes; ++i) found[i] = static_cast<uint32_t>(f(i));
  return found;
}
template <class F>
Pairs pairwise(F f) {
  Pairs found;
  for (int i = 0; i < kLanes; ++i) found[i] = static_cast<uint64_t>(f(i));
  return found;
}
template <class F>
Mask where(F f) {
  Mask found = 0;
  for (int i = 0; i < kLanes; ++i) found |= Mask{f(i)} << i;
  return found;
}
int64_t extended(uint32_t v) { return static_cast<int32_t>(v); }

void mov(Warp& w, I in, Mask active) { w.write(in.operands[0], w.read(in.operands[1]), active); }

// One addend, so that the carry of a sum of three is that of the hardware: -x is ~x + 1.
uint64_t addend(const Operand& from, uint32_t value) {
  const bool complement = from.negative && from.kind != Operand::Kind::immediate;
  return complement ? uint64_t{~(0u - value)} + 1 : value;
}

void iadd3(Warp& w, I in, Mask active) {
  Operands from(in);
  const Operand& to = from.next();
  const Operand* carries[] = {from.next_predicate(), from.next_predicate()};
  const Operand* terms[] = {&from.next(), &from.next(), &from.next()};
  Pairs sum{};
  for (const Operand* term : terms) {
    const Lanes values = w.read(*term);
    for (int i = 0; i < kLanes; ++i) sum[i] += addend(*term, values[i]);
  }
  if (in.has(Mod::X)) {
    while (const Operand* carry = from.next_predicate()) {
      const Mask set = w.test(*carry);
      for (int i = 0; i < kLanes; ++i) sum[i] += set >> i & 1;
    }
  }
  w.write(to, lanewise([&](int i) { return sum[i]; }), active);
  for (unsigned k = 0; k < 2; ++k) {
    if (carries[k]) w.set(*carries[k], where([&](int i) { return (sum[i] >> 32) > k; }), active);
  }
}

void viadd(Warp& w, I in, Mask active) {
  const Lanes a = w.read(in.operands[1]), b = w.read(in.operands[2]);
  w.write(in.operands[0], lanewise([&](int i) { return a[i] + b[i]; }), active);
}

void imad(Warp& w, I in, Mask active) {
  Operands from(in);
  const Operand& to = from.next();
  const Operand* carry = from.next_predicate();
  const Lanes a = w.read(from.next()), b = w.read(from.next());
  const Operand& c = from.next();
  const Operand* carried = in.has(Mod::X) ? from.next_predicate() : nullptr;
  const Mask more = carried ? w.test(*carried) : 0;
  if (in.has(Mod::WIDE) || in.has(Mod::HI)) {
    const Pairs added = w.read_pair(c);
    const bool plain = in.has(Mod::U32);
    const Pairs product = pairwise(
        [&](int i) { return plain ? uint64_t{a[i]} * b[i] : static_cast<uint64_t>(extended(a[i]) * extended(b[i])); });
    const Pairs sum = pairwise([&](int i) { return product[i] + added[i]; });
    if (carry) w.set(*carry, where([&](int i) { return sum[i] < product[i]; }), active);
    if (in.has(Mod::WIDE)) {
      w.write_pair(to, sum, active);
    } else {
      w.write(to, lanewise([&](int i) { return (sum[i] >> 32) + (more >> i & 1); }), active);
    }
    return;
  }
  expect(!carry, in, "has a carry that is not known here");
  const Lanes added = w.read(c);
  w.write(to, lanewise([&](int i) { return a[i] * b[i] + added[i] + (more >> i & 1); }), active);
}

void lea(Warp& w, I in, Mask active) {
  Operands from(in);
  const Operand& to = from.next();
  const Operand* carry = from.next_predicate();
  const Lanes a = w.read(from.next()), b = w.read(from.next());
  const bool high = in.has(Mod::HI), sign = in.has(Mod::SX32);
  const Lanes c = high && !sign ? w.read(from.next()) : Lanes{};
  const Lanes shift = w.read(from.next());
  const Operand* carried = in.has(Mod::X) ? from.next_predicate() : nullptr;
  const Mask more = carried ? w.test(*carried) : 0;
  const Pairs sum = pairwise([&](int i) {
    uint64_t shifted = uint64_t{a[i] << shift[i]};
    if (sign) shifted = static_cast<uint32_t>(static_cast<uint64_t>(extended(a[i])) << shift[i] >> 32);
    if (high && !sign) shifted = static_cast<uint32_t>((uint64_t{c[i]} << 32 | a[i]) << shift[i] >> 32);
    return shifted + b[i] + (more >> i & 1);
  });
  w.write(to, lanewise([&](int i) { return sum[i]; }), active);
  if (carry) w.set(*carry, where([&](int i) { return sum[i] >> 32 != 0; }), active);
}

uint32_t by_table(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t found = 0;
  for (int k = 0; k < 8; ++k) {
    if (table >> k & 1) found |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return found;
}

void lop3(Warp& w, I in, Mask active) {
  Operands from(in);
  const Operand* nonzero = from.next_predicate();
  const Operand& to = from.next();
  const Lanes a = w.read(from.next()), b = w.read(from.next()), c = w.read(from.next());
  const uint32_t table = w.read(from.next())[0];
  const Lanes found = lanewise([&](int i) { return by_table(a[i], b[i], c[i], table); });
  w.write(to, found, active);
  // Or what an earlier one has found, of the lower words of pairs for instance.
  if (nonzero) w.set(*nonzero, where([&](int i) { return found[i] != 0; }) | w.test(in.operands.back()), active);
}

void plop3(Warp& w, I in, Mask active) {
  const auto& o = in.operands;
  const Mask a = w.test(o[2]), b = w.test(o[3]), c = w.test(o[4]);
  w.set(o[0], by_table(a, b, c, static_cast<uint32_t>(o[5].value)), active);
  w.set(o[1], by_table(a, b, c, static_cast<uint32_t>(o[6].value)), active);
}

// Of the pair {high, low}, shifted left or right: its low word, or its high one.
void shf(Warp& w, I in, Mask active) {
  const Lanes low = w.read(in.operands[1]), by = w.read(in.operands[2]), high = w.read(in.operands[3]);
  const bool left = in.has(Mod::L), wide = in.has(Mod::U64) || in.has(Mod::S64), upper = in.has(Mod::HI);
  const bool sign = in.has(Mod::S32) || in.has(Mod::S64);
  const auto shifted = [&](int i) -> uint64_t {
    const uint64_t pair = uint64_t{high[i]} << 32 | low[i];
    const uint32_t most = wide ? 63 : 32, n = in.has(Mod::W) ? by[i] & (wide ? 63 : 31) : std::min(by[i], most);
    if (wide || (left && upper)) {
      if (left) return pair << n;
      return sign ? static_cast<uint64_t>(static_cast<int64_t>(pair) >> n) : pair >> n;
    }
    if (left) return uint64_t{low[i]} << n;
    if (!upper) return pair >> n;  // a funnel
    return (sign ? static_cast<uint64_t>(extended(high[i]) >> n) : uint64_t{high[i]} >> n) << 32;
  };
  w.write(in.operands[0], lanewise([&](int i) { return upper ? shifted(i) >> 32 : shifted(i); }), active);
}

template <class T>
bool compare(const Instruction& in, T a, T b) {
  if (in.has(Mod::LT)) return a < b;
  if (in.has(Mod::LE)) return a <= b;
  if (in.has(Mod::GT)) return a > b;
  if (in.has(Mod::GE)) return a >= b;
  if (in.has(Mod::EQ)) return a == b;
  expect(in.has(Mod::NE), in, "compares in a way that is not known here");
  return a != b;
}

void isetp(Warp& w, I in, Mask active) {
  const auto& o = in.operands;
  const Lanes a = w.read(o[2]), b = w.read(o[3]);
  // Of the upper words, with what the lower ones gave where the upper ones are equal.
  const Mask lower = in.has(Mod::EX) ? w.test(o[5]) : 0;
  const Mask holds = where([&](int i) {
    if (in.has(Mod::EX) && a[i] == b[i]) return (lower >> i & 1) != 0;
    return in.has(Mod::U32) ? compare(in, a[i], b[i])
                            : compare(in, static_cast<int32_t>(a[i]), static_cast<int32_t>(b[i]));
  });
  const Mask other = w.test(o[4]);
  const auto combined = [&](Mask m) { return in.has(Mod::AND) ? m & other : in.has(Mod::OR) ? m | other : m ^ other; };
  w.set(o[0], combined(holds), active);
  w.set(o[1], combined(~holds), active);
}

void sel(Warp& w, I in, Mask active) {
  const Lanes a = w.read(in.operands[1]), b = w.read(in.operands[2]);
  const Mask first = w.test(in.operands[3]);
  w.write(in.operands[0], lanewise([&](int i) { return first >> i & 1 ? a[i] : b[i]; }), active);
}

void prmt(Warp& w, I in, Mask active) {
  const Lanes a = w.read(in.operands[1]), selector = w.read(in.operands[2]), b = w.read(in.operands[3]);
  w.write(in.operands[0], lanewise([&](int i) {
            const uint64_t bytes = uint64_t{b[i]} << 32 | a[i];
            uint32_t found = 0;
            for (int k = 0; k < 4; ++k) {
              const uint32_t which = selector[i] >> 4 * k & 15, byte = bytes >> 8 * (which & 7) & 255;
              found |= (which & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * k;
            }
            return found;
          }),
          active);
}

void iabs(Warp& w, I in, Mask active) {
  const Lanes a = w.read(in.operands[1]);
  w.write(in.operands[0], lanewise([&](int i) { return static_cast<int32_t>(a[i]) < 0 ? 0 - a[i] : a[i]; }), active);
}

// The smaller or the larger of a + more and b: of 32 bits, or of each half.
uint32_t extreme(I in, uint32_t a, uint32_t more, uint32_t b, bool smallest) {
  if (!in.has(Mod::U16X2)) {
    const uint32_t sum = a + more;
    const bool less = in.has(Mod::U32) ? sum < b : static_cast<int32_t>(sum) < static_cast<int32_t>(b);
    return less == smallest ? sum : b;
  }
  uint32_t found = 0;
  for (int half = 0; half < 32; half += 16) {
    const uint16_t sum = static_cast<uint16_t>((a >> half) + (more >> half)), other = static_cast<uint16_t>(b >> half);
    found |= uint32_t{(sum < other) == smallest ? sum : other} << half;
  }
  return found;
}
void vimnmx(Warp& w, I in, Mask active) {
  const Lanes a = w.read(in.operands[1]), b = w.read(in.operands[2]);
  const Mask least = w.test(in.operands[3]);
  w.write(in.operands[0], lanewise([&](int i) { return extreme(in, a[i], 0, b[i], least >> i & 1); }), active);
}
void viaddmnmx(Warp& w, I in, Mask active) {
  const Lanes a = w.read(in.operands[1]), b = w.read(in.operands[2]), c = w.read(in.operands[3]);
  const Mask least = w.test(in.operands[4]);
  w.write(in.operands[0], lanewise([&](int i) { return extreme(in, a[i], b[i], c[i], least >> i & 1); }), active);
}

// ---- predicates as bits ---------------------------------------------------------------------------------------------
void p2r(Warp& w, I in, Mask active) {
  const Lanes old = w.read(in.operands[2]);
  const uint32_t bits = static_cast<uint32_t>(in.operands[3].value);
  w.write(in.operands[0], lanewise([&](int i) {
            uint32_t found = 0;
            for (int k = 0; k < 7; ++k) found |= (w.predicate[k] >> i & 1) << k;
            return (old[i] & ~bits) | (found & bits);
          }),
          active);
}
void r2p(Warp& w, I in, Mask active) {
  const Lanes from = w.read(in.operands[1]);
  for (int k = 0; k < 7; ++k) {
    if (!(in.operands[2].value >> k & 1)) continue;
    const Mask set = where([&](int i) { return (from[i] >> k & 1) != 0; });
    w.predicate[k] = (w.predicate[k] & ~active) | (set & active);
  }
}

void cs2r(Warp& w, I in, Mask active) {
  expect(in.operands[1].name == "SRZ", in, "reads a register that is not known here");
  if (in.has(Mod::WORD)) {
    w.write(in.operands[0], Lanes{}, active);
  } else {
    w.write_pair(in.operands[0], Pairs{}, active);
  }
}

}  // namespace

const Named* integer_instructions() {
  static const Named all[] = {
      {"MOV", mov},     {"UMOV", mov},    {"R2UR", mov},     {"IADD3", iadd3},   {"UIADD3", iadd3},
      {"VIADD", viadd}, {"IMAD", imad},   {"UIMAD", imad},   {"LEA", lea},       {"ULEA", lea},
      {"LOP3", lop3},   {"ULOP3", lop3},  {"PLOP3", plop3},  {"UPLOP3", plop3},  {"SHF", shf},
      {"USHF", shf},    {"ISETP", isetp}, {"UISETP", isetp}, {"SEL", sel},       {"USEL", sel},
      {"PRMT", prmt},   {"UPRMT", prmt},  {"IABS", iabs},    {"VIMNMX", vimnmx}, {"VIADDMNMX", viaddmnmx},
      {"P2R", p2r},     {"R2P", r2p},     {"CS2R", cs2r},    {nullptr, nullptr},
  };
  return all;
}

}  // namespace machine
