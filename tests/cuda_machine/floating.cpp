// Floating point, in single, double and half precision. What the hardware approximates (reciprocals, exponentials) is
// computed in double precision and rounded, so results differ from a GPU's in the last bit; everything else is exact.
#include <fenv.h>
#include <math.h>

#include <algorithm>

#include "../cuda/device.cuh"
#include "instructions.h"

namespace machine {
namespace {

using I = const Instruction&;
using fusednorm::cuda::BFloat16;
using fusednorm::cuda::Float16;

float flushed(I in, float v) { return in.has(Mod::FTZ) && fpclassify(v) == FP_SUBNORMAL ? copysignf(0, v) : v; }

// Computes under the instruction's rounding.
template <class F>
auto rounded(I in, F f) {
  const int mode = in.has(Mod::RM)   ? FE_DOWNWARD
                   : in.has(Mod::RP) ? FE_UPWARD
                   : in.has(Mod::RZ) ? FE_TOWARDZERO
                                     : FE_TONEAREST;
  if (mode == FE_TONEAREST) return f();
  fesetround(mode);
  const auto found = f();
  fesetround(FE_TONEAREST);
  return found;
}

template <class F>
void singles(Warp& w, I in, Mask active, F f) {
  Lanes found{};
  for_lanes(active, [&](int i) {
    const float value = flushed(in, rounded(in, [&] { return f(i); }));
    found[i] = bits_of(in.has(Mod::SAT) ? fminf(fmaxf(value, 0), 1) : value);
  });
  w.write(in.operands[0], found, active);
}
template <class F>
void doubles(Warp& w, I in, Mask active, F f) {
  Pairs found{};
  for_lanes(active, [&](int i) { found[i] = bits_of(rounded(in, [&] { return f(i); })); });
  w.write_pair(in.operands[0], found, active);
}

void fadd(Warp& w, I in, Mask active) {
  const Lanes a = w.read_float(in.operands[1]), b = w.read_float(in.operands[2]);
  singles(w, in, active, [&](int i) {
    volatile float x = flushed(in, as_float(a[i])), y = flushed(in, as_float(b[i]));
    return float(x + y);
  });
}
void fmul(Warp& w, I in, Mask active) {
  const Lanes a = w.read_float(in.operands[1]), b = w.read_float(in.operands[2]);
  singles(w, in, active, [&](int i) {
    volatile float x = flushed(in, as_float(a[i])), y = flushed(in, as_float(b[i]));
    return float(x * y);
  });
}
void ffma(Warp& w, I in, Mask active) {
  const Lanes a = w.read_float(in.operands[1]), b = w.read_float(in.operands[2]), c = w.read_float(in.operands[3]);
  singles(w, in, active, [&](int i) {
    volatile float x = flushed(in, as_float(a[i])), y = flushed(in, as_float(b[i])), z = flushed(in, as_float(c[i]));
    return fmaf(x, y, z);
  });
}
void dadd(Warp& w, I in, Mask active) {
  const Pairs a = w.read_double(in.operands[1]), b = w.read_double(in.operands[2]);
  doubles(w, in, active, [&](int i) {
    volatile double x = as_double(a[i]), y = as_double(b[i]);
    return double(x + y);
  });
}
void dmul(Warp& w, I in, Mask active) {
  const Pairs a = w.read_double(in.operands[1]), b = w.read_double(in.operands[2]);
  doubles(w, in, active, [&](int i) {
    volatile double x = as_double(a[i]), y = as_double(b[i]);
    return double(x * y);
  });
}
void dfma(Warp& w, I in, Mask active) {
  const Pairs a = w.read_double(in.operands[1]), b = w.read_double(in.operands[2]), c = w.read_double(in.operands[3]);
  doubles(w, in, active, [&](int i) {
    volatile double x = as_double(a[i]), y = as_double(b[i]), z = as_double(c[i]);
    return fma(x, y, z);
  });
}

// With .NAN a NaN among the two is the result; else the other one is.
void fmnmx(Warp& w, I in, Mask active) {
  const Lanes a = w.read_float(in.operands[1]), b = w.read_float(in.operands[2]);
  const Mask least = w.test(in.operands[3]);
  singles(w, in, active, [&](int i) {
    const float x = flushed(in, as_float(a[i])), y = flushed(in, as_float(b[i]));
    if (isnan(x) || isnan(y)) return in.has(Mod::UNORDERED) ? NAN : isnan(x) ? y : x;
    const bool first = x < y || (x == y && signbit(x));
    return first == ((least >> i & 1) != 0) ? x : y;
  });
}

void fsel(Warp& w, I in, Mask active) {
  const Lanes a = w.read_float(in.operands[1]), b = w.read_float(in.operands[2]);
  const Mask first = w.test(in.operands[3]);
  Lanes found;
  for (int i = 0; i < kLanes; ++i) found[i] = first >> i & 1 ? a[i] : b[i];
  w.write(in.operands[0], found, active);
}

// ---- comparisons ----------------------------------------------------------------------------------------------------
bool compare(I in, double a, double b) {
  const bool unordered = isnan(a) || isnan(b);
  if (in.has(Mod::NUM)) return !unordered;
  if (in.has(Mod::UNORDERED)) return unordered;
  const auto either = [&](Mod ordered, Mod or_unordered, bool holds) {
    return (in.has(ordered) && holds && !unordered) || (in.has(or_unordered) && (holds || unordered));
  };
  return either(Mod::LT, Mod::LTU, a < b) || either(Mod::LE, Mod::LEU, a <= b) || either(Mod::GT, Mod::GTU, a > b) ||
         either(Mod::GE, Mod::GEU, a >= b) || either(Mod::EQ, Mod::EQU, a == b) || either(Mod::NE, Mod::NEU, a != b);
}
template <class Value>
void compared(Warp& w, I in, Mask active, Value value) {
  Mask holds = 0;
  for_lanes(active, [&](int i) { holds |= Mask{compare(in, value(0, i), value(1, i))} << i; });
  const Mask other = w.test(in.operands[4]);
  const auto combined = [&](Mask m) { return in.has(Mod::AND) ? m & other : in.has(Mod::OR) ? m | other : m ^ other; };
  w.set(in.operands[0], combined(holds), active);
  w.set(in.operands[1], combined(~holds), active);
}
void fsetp(Warp& w, I in, Mask active) {
  const Lanes v[] = {w.read_float(in.operands[2]), w.read_float(in.operands[3])};
  compared(w, in, active, [&](int k, int i) { return flushed(in, as_float(v[k][i])); });
}
void dsetp(Warp& w, I in, Mask active) {
  const Pairs v[] = {w.read_double(in.operands[2]), w.read_double(in.operands[3])};
  compared(w, in, active, [&](int k, int i) { return as_double(v[k][i]); });
}

// Whether a/b needs more than the usual steps. The hardware's rule is not known; those steps are exact well within this
// one, and the others always.
void fchk(Warp& w, I in, Mask active) {
  const Lanes a = w.read_float(in.operands[1]), b = w.read_float(in.operands[2]);
  Mask needs = 0;
  for_lanes(active, [&](int i) {
    const int of_a = a[i] >> 23 & 255, of_b = b[i] >> 23 & 255;
    const bool plain =
        of_b > 1 && of_b < 253 && (a[i] << 1 == 0 || (of_a > 24 && of_a < 254 && abs(of_a - of_b) < 125));
    needs |= Mask{!plain} << i;
  });
  w.set(in.operands[0], needs, active);
}

void mufu(Warp& w, I in, Mask active) {
  const Lanes a = w.read_float(in.operands[1]);
  Lanes found{};
  for_lanes(active, [&](int i) {
    if (in.has(Mod::RCP64H) || in.has(Mod::RSQ64H)) {  // of a double's upper word
      const double x = as_double(uint64_t{a[i]} << 32);
      found[i] = static_cast<uint32_t>(bits_of(in.has(Mod::RCP64H) ? 1 / x : 1 / sqrt(x)) >> 32);
      return;
    }
    const double x = as_float(a[i]);
    double y = NAN;
    if (in.has(Mod::RCP)) y = 1 / x;
    if (in.has(Mod::RSQ)) y = 1 / sqrt(x);
    if (in.has(Mod::SQRT)) y = sqrt(x);
    if (in.has(Mod::EX2)) y = exp2(x);
    if (in.has(Mod::LG2)) y = log2(x);
    if (in.has(Mod::SIN)) y = sin(x * 2 * M_PI);  // of turns
    if (in.has(Mod::COS)) y = cos(x * 2 * M_PI);
    found[i] = bits_of(static_cast<float>(y));
  });
  w.write(in.operands[0], found, active);
}

// ---- conversions ----------------------------------------------------------------------------------------------------
template <class T>
T to_integer(I in, double v) {
  if (isnan(v)) return in.has(Mod::NTZ) ? 0 : T(1) << (8 * sizeof(T) - 1);
  v = in.has(Mod::TRUNC) ? trunc(v) : in.has(Mod::FLOOR) ? floor(v) : in.has(Mod::CEIL) ? ceil(v) : nearbyint(v);
  const double least = static_cast<double>(std::numeric_limits<T>::min());
  const double most = static_cast<double>(std::numeric_limits<T>::max());
  return v <= least ? std::numeric_limits<T>::min() : v >= most ? std::numeric_limits<T>::max() : static_cast<T>(v);
}
void f2i(Warp& w, I in, Mask active) {
  const bool wide = in.has(Mod::U64) || in.has(Mod::S64);
  const Operand& from = in.operands[1];
  const Pairs doubles = in.has(Mod::F64) ? w.read_double(from) : Pairs{};
  const Lanes singles = in.has(Mod::F64) ? Lanes{} : w.read_float(from);
  Pairs found{};
  for_lanes(active, [&](int i) {
    const double v = in.has(Mod::F64) ? as_double(doubles[i]) : flushed(in, as_float(singles[i]));
    found[i] = in.has(Mod::U64)   ? to_integer<uint64_t>(in, v)
               : in.has(Mod::S64) ? static_cast<uint64_t>(to_integer<int64_t>(in, v))
               : in.has(Mod::U32) ? to_integer<uint32_t>(in, v)
                                  : static_cast<uint32_t>(to_integer<int32_t>(in, v));
  });
  Lanes low;
  for (int i = 0; i < kLanes; ++i) low[i] = static_cast<uint32_t>(found[i]);
  wide ? w.write_pair(in.operands[0], found, active) : w.write(in.operands[0], low, active);
}

// The integer that an instruction converts: 64 bits wide, or narrower, with sign or without.
void i2f(Warp& w, I in, Mask active) {
  const Operand& from = in.operands[1];
  const bool wide = in.has(Mod::U64) || in.has(Mod::S64), plain = in.has(Mod::U64) || in.has(Mod::U32);
  const Pairs pairs = wide ? w.read_pair(from) : Pairs{};
  const Lanes words = wide ? Lanes{} : w.read(from);
  Pairs found{};
  for_lanes(active, [&](int i) {
    int64_t v = wide ? static_cast<int64_t>(pairs[i]) : plain ? int64_t{words[i]} : static_cast<int32_t>(words[i]);
    if (in.has(Mod::U16)) v = words[i] & 0xffff;
    if (in.has(Mod::S16)) v = static_cast<int16_t>(words[i]);
    if (in.has(Mod::U8)) v = words[i] & 0xff;
    volatile int64_t integer = v;
    const bool large = in.has(Mod::U64);
    if (in.has(Mod::F64)) {
      found[i] = bits_of(rounded(in, [&] { return large ? double(uint64_t(integer)) : double(integer); }));
    } else {
      found[i] = bits_of(rounded(in, [&] { return large ? float(uint64_t(integer)) : float(integer); }));
    }
  });
  Lanes low;
  for (int i = 0; i < kLanes; ++i) low[i] = static_cast<uint32_t>(found[i]);
  in.has(Mod::F64) ? w.write_pair(in.operands[0], found, active) : w.write(in.operands[0], low, active);
}
void i2fp(Warp& w, I in, Mask active) {
  const Lanes a = w.read(in.operands[1]);
  singles(w, in, active, [&](int i) {
    return in.has(Mod::U32) ? static_cast<float>(a[i]) : static_cast<float>(static_cast<int32_t>(a[i]));
  });
}

void f2f(Warp& w, I in, Mask active) {
  if (in.text.find("F32.F64") != std::string::npos) {
    const Pairs a = w.read_double(in.operands[1]);
    singles(w, in, active, [&](int i) {
      volatile double x = as_double(a[i]);
      return float(x);
    });
  } else {
    expect(in.text.find("F64.F32") != std::string::npos, in, "converts in a way that is not known here");
    const Lanes a = w.read_float(in.operands[1]);
    doubles(w, in, active, [&](int i) { return double{flushed(in, as_float(a[i]))}; });
  }
}

void frnd(Warp& w, I in, Mask active) {
  const auto to_whole = [&](auto v) {
    return in.has(Mod::TRUNC)   ? std::trunc(v)
           : in.has(Mod::FLOOR) ? std::floor(v)
           : in.has(Mod::CEIL)  ? std::ceil(v)
                                : std::rint(v);
  };
  if (in.has(Mod::F64)) {
    const Pairs a = w.read_double(in.operands[1]);
    return doubles(w, in, active, [&](int i) { return to_whole(as_double(a[i])); });
  }
  const Lanes a = w.read_float(in.operands[1]);
  singles(w, in, active, [&](int i) { return to_whole(as_float(a[i])); });
}

template <class T>
uint32_t narrowed(float v) {
  return fusednorm::cuda::narrow<T>(v).bits;
}
// Two floats, the first one into the upper half.
void f2fp(Warp& w, I in, Mask active) {
  const Lanes a = w.read_float(in.operands[1]), b = w.read_float(in.operands[2]);
  const auto narrow = in.has(Mod::BF16) ? narrowed<BFloat16> : narrowed<Float16>;
  Lanes found{};
  for_lanes(active, [&](int i) { found[i] = narrow(as_float(a[i])) << 16 | narrow(as_float(b[i])); });
  w.write(in.operands[0], found, active);
}

bool is_zero(const Operand& from) { return from.kind == Operand::Kind::general && from.index == kZero; }

// Half precision serves to widen, and to make constants.
void hadd2(Warp& w, I in, Mask active) {
  expect(in.has(Mod::F32) && is_zero(in.operands[1]) && in.operands[2].half >= 0, in, "does more than widen");
  const Lanes a = w.read(in.operands[2]);
  singles(w, in, active, [&](int i) { return fusednorm::cuda::widen(Float16{static_cast<uint16_t>(a[i])}); });
}
void hfma2(Warp& w, I in, Mask active) {
  expect(is_zero(in.operands[1]) && is_zero(in.operands[2]), in, "does more than make a constant");
  const uint32_t bits = static_cast<uint32_t>(in.operands[3].value << 16 | in.operands[4].value);
  Lanes found;
  found.fill(bits);
  w.write(in.operands[0], found, active);
}

}  // namespace

const Named* floating_instructions() {
  static const Named all[] = {
      {"FADD", fadd},   {"FMUL", fmul},   {"FFMA", ffma},     {"FMNMX", fmnmx}, {"FSEL", fsel}, {"FSETP", fsetp},
      {"FCHK", fchk},   {"MUFU", mufu},   {"DADD", dadd},     {"DMUL", dmul},   {"DFMA", dfma}, {"DSETP", dsetp},
      {"F2I", f2i},     {"I2F", i2f},     {"I2FP", i2fp},     {"F2F", f2f},     {"FRND", frnd}, {"F2FP", f2fp},
      {"HADD2", hadd2}, {"HFMA2", hfma2}, {nullptr, nullptr},
  };
  return all;
}

}  // namespace machine
