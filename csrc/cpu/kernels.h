// The interface between the drivers of the CPU backend (ordinary C++, compiled once) and the kernels (compiled once per
// instruction set, see level_*.cpp): plain structs of arguments and one table of function pointers per level.
//
// A kernel works on a tile: `rows` x `cols` values of storage type T, `cols` contiguous, and computes in opmath type A.
// Two kinds of tile cover both layouts: a run (channels-first: one channel, rows = 1, per-channel vectors of one entry)
// and columns (channels-last: a column per channel, vectors of `cols` entries, padded so that 32 can be read from any
// multiple of 32). Bits come in words of 32 per row, bit i of word j for column 32*j + i.
#pragma once

#include <cstdint>

namespace fusednorm::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct OpMath {
  using type = float;
};
template <>
struct OpMath<double> {
  using type = double;
};
template <class T>
using opmath_t = typename OpMath<T>::type;

constexpr int kMaxTileRows = 64;

template <class A>
struct Affine {  // per-channel: z = (u - mean) * scale + shift
  const A* mean;
  const A* scale;
  const A* shift;
};

template <class T>
struct Apply {
  using A = opmath_t<T>;
  int64_t rows, cols;
  const T* x;  // [rows, ldx]
  T* y;        // [rows, ldy]
  int64_t ldx, ldy;
  int64_t ahead;  // elements from those of x to what is read soon after, and fetched meanwhile; or 0
  Affine<A> affine;
  A activation[2];       // parameters
  A multiplier;          // of what is kept
  const uint32_t* keep;  // [rows, ldkeep] bits, or null: everything is kept
  int64_t ldkeep;
  uint32_t* save;  // [rows, ldsave] bits out: keep, and the activation's derivative where one bit holds it; or null
  int64_t ldsave;
  bool past;  // y past the caches, if that can be
};

template <class T>
struct Backward {
  using A = opmath_t<T>;
  int64_t rows, cols;
  const T* x;  // [rows, ldx]
  const T* g;  // [rows, ldg]
  int64_t ldx, ldg;
  int64_t aheadx, aheadg;  // as in Apply
  Affine<A> affine;
  A activation[2];
  A multiplier;
  const uint32_t* keep;  // as in Apply
  int64_t ldkeep;
  bool keep_is_saved;  // the bits are what Apply saved
  double* sum_dz;      // [1 or cols] += sum of dz
  double* sum_dz_xmu;  // [1 or cols] += sum of dz * (x - mean)
  T* dx;               // [rows, lddx]
  int64_t lddx;
  const A* a;  // per-channel: dx = a*dz + b*(x - mean) + c
  const A* b;  // null: 0, with running statistics, so that an infinite x has no say
  const A* c;
  bool past;  // dx, as in Apply
};

// [add] [act] [drop] or [add] [drop] [act] in opmath type: the stages that Apply and Backward do not cover. A stage may
// work in place.
template <class A>
struct Elementwise {
  int64_t rows, cols;
  const A* x;  // [rows, ldx]
  int64_t ldx;
  int64_t ahead;  // as in Apply; aheadadd and aheadg, too
  const A* add;   // [rows, ldadd] forward: added to x first; or null
  int64_t ldadd;
  int64_t aheadadd;
  const A* g;  // [rows, ldg] backward: the gradient
  int64_t ldg;
  int64_t aheadg;
  A* y;  // [rows, ldy] forward: activation(x + add) * factor or activation((x + add) * factor); backward: their
         // gradient
  int64_t ldy;
  A activation[2];
  const A* act_weight;  // PReLU: per-channel
  bool factor_first;
  const float* m;  // [rows, ldm] the factor, or null: the multiplier where kept
  int64_t ldm;
  A multiplier;
  const uint32_t* keep;  // [rows, ldkeep] bits, or null: everything is kept
  int64_t ldkeep;
  uint32_t* save;  // as in Apply
  int64_t ldsave;
  double* sum;  // of weight_sums: [1 or cols] += sum of g times the activation's derivative by its weight
  bool past;    // y, as in Apply
};

// y = x * m, of storage type.
template <class T>
struct Scale {
  using A = opmath_t<T>;
  int64_t rows, cols;
  const T* x;  // [rows, ldx], or null: ones
  T* y;        // [rows, ldy]
  int64_t ldx, ldy;
  const float* m;  // [rows, ldm], or null: the multiplier where kept
  int64_t ldm;
  A multiplier;
  const uint32_t* keep;  // [rows, ldkeep] bits, or null: everything
  int64_t ldkeep;
  bool past;  // y, as in Apply
};

enum Span { kRun, kColumns };

template <class T>
struct KernelsFor {
  void (*const* apply[2])(const Apply<T>&);              // [Span][activation]
  void (*const* gradient_sums[2])(const Backward<T>&);   // [Span][activation]
  void (*const* input_gradient[2])(const Backward<T>&);  // [Span][activation]
  void (*scale)(const Scale<T>&);
  // from storage to opmath type and back; ahead, past: as in Apply
  void (*widen)(const T* x, int64_t ldx, int64_t ahead, opmath_t<T>* y, int64_t ldy, int64_t rows, int64_t cols,
                bool past);
  void (*narrow)(const opmath_t<T>* x, int64_t ldx, int64_t ahead, T* y, int64_t ldy, int64_t rows, int64_t cols,
                 bool past);
  // mean and sum of squared deviations of n values; `ahead` as in Apply
  void (*moments_run)(const T* x, int64_t n, int64_t ahead, double* mean, double* m2);
  // merges the moments of `rows` <= kMaxTileRows new rows into mean[cols], m2[cols], which hold those of `count` rows
  void (*moments_columns)(const T* x, int64_t rows, int64_t cols, int64_t ldx, int64_t ahead, double count,
                          double* mean, double* m2);
};

template <class A>
struct ElementwiseFor {
  void (*const* value[2])(const Elementwise<A>&);     // [Span][activation]
  void (*const* gradient[2])(const Elementwise<A>&);  // [Span][activation]
  void (*weight_sums[2])(const Elementwise<A>&);      // [Span]
};

// The draws of a tile are made in whole groups of 8 rows: of a run, in whole multiples of this.
constexpr int kRunDraws = 128;

struct Kernels {
  const char* level;
  // merges the moments of `rows` rows into those of `count` rows, for `cols` channels (padded to 32)
  void (*merge_moments)(double count, double* mean, double* m2, double rows, const double* row_mean,
                        const double* row_m2, int64_t cols);
  // Of `repeat` adjacent columns per channel: the moments of the channel from those of columns with `rows` values each;
  // and sums, added to the channel's. Columns are read 8 at a time.
  void (*fold_moments)(double rows, const double* mean, const double* m2, int64_t repeat, int64_t channels,
                       double* channel_mean, double* channel_m2);
  void (*fold_sums)(const double* columns, int64_t repeat, int64_t channels, double* sums);
  KernelsFor<float> f32;
  KernelsFor<double> f64;
  KernelsFor<BFloat16> bf16;
  KernelsFor<Float16> f16;
  ElementwiseFor<float> elementwise_f32;
  ElementwiseFor<double> elementwise_f64;
  // keep bits of rows [8*group, ...) of channel c: `words` words of 32 rows
  void (*keep_run)(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, uint32_t threshold, uint32_t* out,
                   int64_t words);
  // keep bits of the 8 rows of `group`, channels [c, c + 32*words): row i at out + i*ld
  void (*keep_columns)(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, uint32_t threshold,
                       uint32_t* out, int64_t words, int64_t ld);
  // multipliers of the same rows, uniform and Gaussian: n rows, rounded up to kRunDraws
  void (*multipliers_run[2])(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, float strength,
                             float* out, int64_t n);
  // and of the 8 rows of a group, cols channels rounded up to 32: row i at out + i*ld
  void (*multipliers_columns[2])(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, float strength,
                                 float* out, int64_t cols, int64_t ld);
  // test hook: the vector Philox at `rounds` 7 or 10, lane i with counter[0] + i; returns the number of lanes
  int (*philox_lanes)(int rounds, const uint32_t* counter, const uint32_t* key, uint32_t* out);
};

extern const Kernels kernels_default;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The table for this processor, as torch's own choice (ATEN_CPU_CAPABILITY is honoured) allows.
const Kernels& kernels();

// Whether a pass over a tensor of so many bytes is one over memory. Then results go past the caches: a line that is
// written whole need not be read first, and does not evict what is needed sooner, in training x, which backward reads.
// And kernels fetch ahead what is read soon; in the caches that would take as long as it spares. Measured with a next
// layer that reads the result, both pay from an eighth of the last-level cache on; in evaluation, from where the result
// and x exceed that cache.
bool outgrows_caches(int64_t bytes, bool training);

}  // namespace fusednorm::cpu
