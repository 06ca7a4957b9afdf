// How kernels walk a tile: in blocks of 32 columns, one word of bits each. A block is 32 / width vectors. The columns
// left over go through a padded copy, so there is no scalar code, and a value's bits do not depend on where in a tile
// it stood.

constexpr int kBlock = 32;
template <class A>
constexpr int kVectors = kBlock / Vec<A>::width;  // of a block

#define FN_UNROLL _Pragma("GCC unroll 16")

// Runs f(v) for every vector of a block: unrolled, v a constant, or a loop where that would be much code, which is an
// exponential for each of many vectors. Unrolled, the compiler can work at several vectors at once: a processor does
// not look far enough ahead to find the next one behind a polynomial.
template <class A, class Activation>
constexpr bool kUnrolled = Activation::one_bit || kVectors<A> <= 4;
template <class F, int... v>
FN_INLINE void for_each_of(std::integer_sequence<int, v...>, F f) {
  (f(Constant<v>{}), ...);
}
template <bool unrolled, int n, class F>
FN_INLINE void for_vectors(F f) {
  if constexpr (unrolled) {
    for_each_of(std::make_integer_sequence<int, n>{}, f);
  } else {
    _Pragma("GCC unroll 1") for (int v = 0; v < n; ++v) f(v);
  }
}

// A per-channel vector: an entry for each run of a tile, held in a register, or an entry per column.
template <Span span, class A>
struct PerChannel {
  Vec<A> value;
  FN_INLINE PerChannel(const A* p, int64_t row) : value(p ? p[row] : A(0)) {}
  FN_INLINE Vec<A> operator[](int64_t) const { return value; }
};
template <class A>
struct PerChannel<kColumns, A> {
  const A* p;
  FN_INLINE PerChannel(const A* pointer, int64_t) : p(pointer) {}
  FN_INLINE Vec<A> operator[](int64_t column) const { return Vec<A>::load(p + column); }
};
template <Span span, class A>
struct Channel {
  PerChannel<span, A> mean, scale, shift;
  FN_INLINE Channel(const Affine<A>& q, int64_t row) : mean(q.mean, row), scale(q.scale, row), shift(q.shift, row) {}
  FN_INLINE Vec<A> normalize(Vec<A> x, int64_t column) const {
    return math::normalize(x, mean[column], scale[column], shift[column]);
  }
};

template <class T>
FN_INLINE void copy_padded(const T* from, T* to, int64_t n, T fill = T{}) {
  for (int64_t i = 0; i < kBlock; ++i) to[i] = i < n ? from[i] : fill;
}
template <class T>
FN_INLINE void copy_out(const T* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// The processor's own prefetching stops at pages and at the end of a tile, and few loads are in flight meanwhile.
template <class T>
FN_INLINE void fetch_block(const T* p, int64_t ahead) {  // 0: nothing
  if (!ahead) return;
  p += ahead;
  FN_UNROLL for (int i = 0; i < kBlock; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 0, 2);
}

// A block's pointers, or padded copies of what is there; what stands ahead of it is fetched meanwhile.
template <class T>
struct Block {
  alignas(64) T padded[kBlock];
  FN_INLINE const T* at(const T* p, int64_t rest, int64_t ahead = 0) {
    fetch_block(p, ahead);
    if (rest >= kBlock) return p;
    copy_padded(p, padded, rest);
    return padded;
  }
};

// How a kernel leaves a row of results, in pieces: a block from `column` on, of which those up to `end` are not yet
// written. Cache lines may go past the caches. A part of a line would cost more than that spares, and so would a line
// that is written again in the ordinary way: it would be read first. So where values may be computed twice, the first
// piece ends where a line does, and the last one is a block over its neighbour; elsewhere rows must begin with lines.
// What is to see lines that went past the caches comes behind a fence, which waits for all of them: one for each
// thread's part of a tensor (for_tasks), not for each tile.
template <class T>
class Results {
 public:
  using V = Vec<opmath_t<T>>;
  static constexpr bool kPast = FN_VECTOR_BYTES == 64 || (FN_VECTOR_BYTES == 32 && sizeof(T) == sizeof(opmath_t<T>));
  struct Piece {
    int64_t column, end;
    bool whole;  // may be written as it is
  };
  FN_INLINE Results(bool past_caches, T* p, int64_t ld, int64_t cols, bool twice)
      : p_(p),
        cols_(cols),
        past_caches_(kPast && past_caches && ((twice && cols >= 16 * kBlock) || off_line(p) + off_line(p + ld) == 0)),
        twice_(twice && cols >= kBlock),
        lead_(0) {}
  FN_INLINE void to_row(T* p) {
    p_ = p;
    if (past_caches_ && off_line(p)) [[unlikely]] {
      lead_ = (64 - off_line(p)) / static_cast<int64_t>(sizeof(T));
    } else {
      lead_ = 0;
    }
  }

  // Behind `done` columns that are written.
  FN_INLINE Piece piece(int64_t done) const {
    const int64_t rest = cols_ - done;
    if (rest >= kBlock && done >= lead_) [[likely]] {
      return {done, done + kBlock, true};
    }
    if (done < lead_) return {0, lead_, false};
    if (!twice_) return {done, cols_, false};
    const int64_t column = cols_ - kBlock;
    return {column, cols_, !past_caches_ || off_line(p_ + column) == 0};
  }
  // Of a block of values.
  FN_INLINE void store(const V (&values)[kVectors<opmath_t<T>>], int64_t done, Piece piece) const {
    if (piece.whole) [[likely]] {
      return store(values, p_ + piece.column, past_caches_);
    }
    alignas(64) T out[kBlock];
    store(values, out, false);
    copy_out(out + (done - piece.column), p_ + done, piece.end - done);
  }

 private:
  static FN_INLINE int64_t off_line(const T* p) { return reinterpret_cast<uintptr_t>(p) % 64; }
  static FN_INLINE void store(const V (&values)[kVectors<opmath_t<T>>], T* p, bool past) {
#if FN_VECTOR_BYTES == 64
    const auto line = [&](int i, __m512i values) FN_LAMBDA_INLINE {
      past ? _mm512_stream_si512((__m512i*)p + i, values) : _mm512_storeu_si512((__m512i*)p + i, values);
    };
    if constexpr (sizeof(T) == 2) {
      line(0, narrow_line(values[0].raw, values[1].raw, p));
    } else {
      FN_UNROLL for (int v = 0; v < kVectors<T>; ++v) line(v, (__m512i)values[v].raw);
    }
#else
    FN_UNROLL for (int v = 0; v < kVectors<opmath_t<T>>; ++v) {
#if FN_VECTOR_BYTES == 32
      if (kPast && past) {
        _mm256_stream_si256((__m256i*)(p + v * V::width), (__m256i)values[v].raw);
        continue;
      }
#endif
      values[v].store(p + v * V::width);
    }
#endif
  }

  T* p_;
  int64_t cols_;
  bool past_caches_, twice_;
  int64_t lead_;  // columns of the row's first line, if that is not whole
};

FN_INLINE uint32_t first_bits(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// ---- lanes, summed in double
FN_INLINE void add_lanes(double* to, Vec<double> a) { (Vec<double>::load(to) + a).store(to); }
FN_INLINE void add_lanes(double* to, Vec<float> a) {
  const DoublePair d = widen(a);
  add_lanes(to, d.low);
  add_lanes(to + Vec<double>::width, d.high);
}

// 32 lanes in registers, or what a level has of them.
class Total {
 public:
  FN_INLINE void add(const Vec<double>* block) {
    FN_UNROLL for (int v = 0; v < kVectors<double>; ++v) parts_[v] = parts_[v] + block[v];
  }
  FN_INLINE void add(const Vec<float>* block) {
    FN_UNROLL for (int v = 0; v < kVectors<float>; ++v) {
      const DoublePair d = widen(block[v]);
      parts_[2 * v] = parts_[2 * v] + d.low;
      parts_[2 * v + 1] = parts_[2 * v + 1] + d.high;
    }
  }
  // Always in the same tree.
  FN_INLINE double sum() {
    FN_UNROLL for (int half = kVectors<double> / 2; half > 0; half /= 2) {
      FN_UNROLL for (int v = 0; v < half; ++v) parts_[v] = parts_[v] + parts_[v + half];
    }
    constexpr int width = Vec<double>::width;
    alignas(64) double lanes[width];
    parts_[0].store(lanes);
    FN_UNROLL for (int half = width / 2; half > 0; half /= 2) {
      FN_UNROLL for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }

 private:
  Vec<double> parts_[kVectors<double>]{};
};
