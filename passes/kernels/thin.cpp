// Products of matrices of which one is thin (rank R), for x86 CPUs with fused multiply-adds: the matrix libraries run
// these shapes at half of what the arithmetic allows, or less. Plain C interface, no header of torch: this file compiles
// in seconds.
//
// Everything is one register tile: rows of A (one number broadcast at a time) times a packed panel of B (vectors).
// A number is a 32-bit unit: one float, or where the CPU multiplies bfloat16 (AVX512-BF16) a pair of neighbours along
// the inner dimension. Other 16-bit numbers are converted to floats while they are packed. Sums are float32 and are
// rounded once, after the scale. No atomics: a number of threads fixes every bit of the result.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define NATIVE_BF16 1
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
// Loops over what a tile holds in registers disappear.
#define UNROLL _Pragma("GCC unroll 8")

namespace {

using Int = std::int64_t;

// ---- what the machine has -------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr bool MANY_REGISTERS = LANES == 16;  // 32 vector registers; 16 elsewhere

// A tile keeps rows x vectors sums in registers, beside the vectors of B and one broadcast number of A.
constexpr int MAX_VECTORS = MANY_REGISTERS ? 4 : 2;
constexpr int tile_rows(int vectors) { return MANY_REGISTERS ? (vectors < 4 ? 8 : 6) : (vectors < 2 ? 8 : 6); }
constexpr int GRADIENT_RANKS = MANY_REGISTERS ? 8 : 4, GRADIENT_VECTORS = 2;
constexpr Int RUN = 128;   // units that are summed by themselves: a long sum is a sum of short ones, which rounds less
constexpr int MAX_ROWS = 8;
constexpr int LINE = 64;  // bytes of a cache line

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef std::uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef std::int32_t Mask __attribute__((vector_size(LANES * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(LANES * 2)));

template <class T>
INLINE T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// ---- element types --------------------------------------------------------------------------------------------------

struct Float {
  using Element = float;
  static INLINE Vector load(const Element* from) { return ::load<Vector>(from); }
  static INLINE void store(Element* to, Vector value) { std::memcpy(to, &value, sizeof value); }
};

struct Bfloat16 {
  using Element = std::uint16_t;
  static INLINE Vector load(const Element* from) {
    return (Vector)(__builtin_convertvector(::load<Halves>(from), Bits) << 16);
  }
  static INLINE void store(Element* to, Vector value) {
#ifdef NATIVE_BF16
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(to, &rounded, sizeof rounded);
#else
    const Bits bits = (Bits)value, even = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Bits number = (Bits)(Mask)(value == value);
    const Halves rounded = __builtin_convertvector(((even >> 16) & number) | (~number & 0x7fc0u), Halves);
    std::memcpy(to, &rounded, sizeof rounded);
#endif
  }
};

#ifdef __F16C__
struct Float16 {
  using Element = std::uint16_t;
  static INLINE Vector load(const Element* from) {
#ifdef __AVX512F__
    return (Vector)_mm512_cvtph_ps(::load<__m256i>(from));
#else
    return (Vector)_mm256_cvtph_ps(::load<__m128i>(from));
#endif
  }
  static INLINE void store(Element* to, Vector value) {
#ifdef __AVX512F__
    const __m256i rounded = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const __m128i rounded = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#endif
    std::memcpy(to, &rounded, sizeof rounded);
  }
};
#endif

// The first `count` of LANES elements.
template <class Type>
INLINE Vector load_part(const typename Type::Element* from, Int count) {
  typename Type::Element part[LANES] = {};
  std::memcpy(part, from, std::min<Int>(count, LANES) * sizeof *part);
  return Type::load(part);
}

template <class Type>
INLINE void store_part(typename Type::Element* to, Vector value, Int count) {
  typename Type::Element part[LANES];
  Type::store(part, value);
  std::memcpy(to, part, std::min<Int>(count, LANES) * sizeof *part);
}

// ---- how a type is multiplied: units of PAIR elements along the inner dimension -------------------------------------

// As floats.
template <class T>
struct Single {
  using Type = T;
  using Element = typename T::Element;
  using Unit = float;
  using Many = Vector;
  static constexpr int PAIR = 1;
  static constexpr bool DIRECT = std::is_same_v<Element, float>;  // memory holds units as they are
  static INLINE Unit unit(Element first, Element) {
    const Element part[LANES] = {first};
    return T::load(part)[0];
  }
  static INLINE Many broadcast(const void* from) { return Vector{} + ::load<float>(from); }
  static INLINE Vector multiply(Vector sum, Many a, Many b) { return sum + a * b; }
  // LANES elements of a row (the second row is not used) as units.
  static INLINE void interleave(Unit* to, const Element* first, const Element*) {
    const Vector value = T::load(first);
    std::memcpy(to, &value, sizeof value);
  }
  // Two vectors at a time, in the order that suits the machine: here the natural one.
  static INLINE void interleave_two(Unit* to, const Element* first, const Element*) {
    interleave(to, first, nullptr);
    interleave(to + LANES, first + LANES, nullptr);
  }
  static INLINE void into_order(Unit*) {}
  static INLINE void natural_order(Vector&, Vector&) {}
  static INLINE void load_two(Vector& first, Vector& second, const Element* from) {
    first = T::load(from);
    second = T::load(from + LANES);
  }
  static INLINE void store_two(Element* to, Vector first, Vector second) {
    T::store(to, first);
    T::store(to + LANES, second);
  }
};

#ifdef NATIVE_BF16
struct Pairs {
  using Type = Bfloat16;
  using Element = std::uint16_t;
  using Unit = std::uint32_t;
  using Many = __m512i;
  static constexpr int PAIR = 2;
  static constexpr bool DIRECT = true;
  static INLINE Unit unit(Element first, Element second) { return first | (Unit)second << 16; }
  static INLINE Many broadcast(const void* from) { return _mm512_set1_epi32(::load<std::int32_t>(from)); }
  static INLINE Vector multiply(Vector sum, Many a, Many b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static INLINE void interleave(Unit* to, const Element* first, const Element* second) {
    const __m512i low = _mm512_cvtepu16_epi32(::load<__m256i>(first));
    const __m512i high = _mm512_cvtepu16_epi32(::load<__m256i>(second));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // Two vectors at a time: of each eight neighbours the first has four and the second the others, as the instructions
  // that zip 16-bit numbers leave them. With the natural order a tile of C costs twice as many instructions to read
  // and write.
  static INLINE void interleave_two(Unit* to, const Element* first, const Element* second) {
    const __m512i a = ::load<__m512i>(first), b = ::load<__m512i>(second);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(to + LANES, _mm512_unpackhi_epi16(a, b));
  }
  static INLINE void into_order(Unit* units) {
    const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const __m512i a = ::load<__m512i>(units), b = ::load<__m512i>(units + LANES);
    _mm512_storeu_si512(units, _mm512_permutex2var_epi32(a, index, b));
    _mm512_storeu_si512(units + LANES, _mm512_permutex2var_epi32(a, _mm512_add_epi32(index, _mm512_set1_epi32(4)), b));
  }
  static INLINE void natural_order(Vector& first, Vector& second) {
    const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512 a = (__m512)first, b = (__m512)second;
    first = (Vector)_mm512_permutex2var_ps(a, index, b);
    second = (Vector)_mm512_permutex2var_ps(a, _mm512_add_epi32(index, _mm512_set1_epi32(8)), b);
  }
  static INLINE void load_two(Vector& first, Vector& second, const Element* from) {
    const __m512i both = ::load<__m512i>(from);
    first = (Vector)_mm512_unpacklo_epi16(__m512i{}, both);
    second = (Vector)_mm512_unpackhi_epi16(__m512i{}, both);
  }
  static INLINE void store_two(Element* to, Vector first, Vector second) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), both));
  }
};
using ForBfloat16 = Pairs;
#else
using ForBfloat16 = Single<Bfloat16>;
#endif

// ---- the register tile ----------------------------------------------------------------------------------------------

// A[row, :] times a panel [units, VECTORS * LANES]; units of a row are STEP apart. The sums are registers as long as they
// are only named by constants.
template <class F, int ROWS, int VECTORS, int STEP = 1>
INLINE void tile(Vector (&sums)[ROWS][VECTORS], const char* const* rows, const typename F::Unit* panel, Int units,
                 Int ahead = 0) {
  const char* row_of[ROWS];
  UNROLL
  for (int row = 0; row < ROWS; ++row) {
    row_of[row] = rows[row];
    UNROLL
    for (int v = 0; v < VECTORS; ++v) sums[row][v] = Vector{};
  }
  for (Int unit = 0; unit < units;) {
    const Int stop = std::min(unit + LINE / 4, units);
    if (ahead) {
      UNROLL
      for (int row = 0; row < ROWS; ++row) __builtin_prefetch(row_of[row] + ahead + unit * 4, 0, 0);
    }
    for (; unit < stop; ++unit, panel += VECTORS * LANES) {
      typename F::Many b[VECTORS];
      UNROLL
      for (int v = 0; v < VECTORS; ++v) b[v] = load<typename F::Many>(panel + v * LANES);
      UNROLL
      for (int row = 0; row < ROWS; ++row) {
        const typename F::Many a = F::broadcast(row_of[row] + unit * (STEP * 4));
        UNROLL
        for (int v = 0; v < VECTORS; ++v) sums[row][v] = F::multiply(sums[row][v], a, b[v]);
      }
    }
  }
}

// ---- operands -------------------------------------------------------------------------------------------------------

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(Int count) {
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)));
}

Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }

// A strided matrix. `row` and `column` are in elements.
template <class Element>
struct Matrix {
  Element* data;
  Int row, column;
  INLINE Element& at(Int i, Int j) const { return data[i * row + j * column]; }
  Matrix transposed() const { return {data, column, row}; }
};

// The part of `count` things, in steps of `step`, that thread `thread` of `threads` does.
struct Part {
  Int begin, end;
  Part(Int count, Int step, int thread, int threads) {
    const Int steps = ceil_div(count, step);
    begin = std::min(count, steps * thread / threads * step);
    end = std::min(count, steps * (thread + 1) / threads * step);
  }
};

// B [inner, outer] in panels [units][vectors * LANES], padded with zeros; vectors by twos in the order of F.
template <class F>
struct Panels {
  Int inner, outer, units, vectors, count;
  Buffer<typename F::Unit> units_of;

  Panels(Int inner, Int outer) : inner(inner), outer(outer), units(ceil_div(inner, F::PAIR)) {
    const Int all = ceil_div(outer, LANES);
    count = ceil_div(all, MAX_VECTORS);
    vectors = ceil_div(all, count);
    units_of = buffer<typename F::Unit>(count * units * vectors * LANES);
  }
  Int width() const { return vectors * LANES; }
  typename F::Unit* panel(Int index) const { return units_of.get() + index * units * width(); }

  // One thread's part of the packing.
  void pack(Matrix<const typename F::Element> b, int thread, int threads) const {
    const Part part(count * units, 1, thread, threads);
    for (Int line = part.begin; line < part.end; ++line) {
      typename F::Unit* to = units_of.get() + line * width();
      const Int i = line % units * F::PAIR, j = line / units * width(), lanes = std::min(width(), outer - j);
      const bool whole = i + F::PAIR <= inner;
      Int lane = 0;
      if (whole && b.column == 1)
        for (; lane + LANES <= lanes; lane += LANES)
          F::interleave(to + lane, &b.at(i, j + lane), &b.at(i + F::PAIR - 1, j + lane));
      if (whole && F::DIRECT && b.row == 1)
        for (; lane < lanes; ++lane) to[lane] = load<typename F::Unit>(&b.at(i, j + lane));
      for (; lane < lanes; ++lane)
        to[lane] = F::unit(b.at(i, j + lane), F::PAIR > 1 && whole ? b.at(i + 1, j + lane) : typename F::Element{});
      for (; lane < width(); ++lane) to[lane] = typename F::Unit{};
      for (int v = 0; v + 1 < vectors; v += 2) F::into_order(to + v * LANES);
    }
  }
};

// Rows of A as the tile reads them: where they stand, or copied as units.
template <class F>
struct Rows {
  Matrix<const typename F::Element> a;
  Int inner, units, stride;
  bool direct;
  Buffer<typename F::Unit> copy;

  Rows(Matrix<const typename F::Element> a, Int inner)
      : a(a), inner(inner), units(ceil_div(inner, F::PAIR)), stride(units + 16) {
    direct = F::DIRECT && a.column == 1 && inner % F::PAIR == 0;
    if (!direct) copy = buffer<typename F::Unit>(MAX_ROWS * stride);
  }
  // From a number to the one `count` rows below it, in bytes; 0 for a copy.
  INLINE Int ahead(int count) const { return direct ? count * a.row * Int(sizeof(typename F::Element)) : 0; }
  // `count` rows from `begin`; rows past `end` repeat the last one.
  INLINE void point(const char** rows, Int begin, Int end, int count) const {
    for (int row = 0; row < count; ++row) {
      const Int i = std::min(begin + row, end - 1);
      if (direct) {
        rows[row] = reinterpret_cast<const char*>(a.data + i * a.row);
      } else {
        typename F::Unit* to = copy.get() + row * stride;
        rows[row] = reinterpret_cast<const char*>(to);
        Int unit = 0;
        if (F::PAIR == 1 && a.column == 1)
          for (; unit + LANES <= units; unit += LANES) F::interleave(to + unit, &a.at(i, unit), nullptr);
        for (; unit < units; ++unit) {
          const Int j = unit * F::PAIR;
          to[unit] = F::unit(a.at(i, j), F::PAIR > 1 && j + 1 < inner ? a.at(i, j + 1) : typename F::Element{});
        }
      }
    }
  }
};

// ---- C = scale * A B, or C += scale * A B ---------------------------------------------------------------------------

// Writes (ADD: adds) scale * sums to `rows` rows and `columns` columns at `to`, the whole tile or less.
template <class F, bool ADD, int ROWS, int VECTORS>
INLINE void write(Vector (&sums)[ROWS][VECTORS], typename F::Element* to, Int stride, Int rows, Int columns,
                  float scale) {
  using Type = typename F::Type;
  if (rows >= ROWS && columns >= VECTORS * LANES) {
    UNROLL
    for (int row = 0; row < ROWS; ++row) {
      typename F::Element* at = to + row * stride;
      UNROLL
      for (int v = 0; v + 1 < VECTORS; v += 2, at += 2 * LANES) {
        Vector first{}, second{};
        if (ADD) F::load_two(first, second, at);
        F::store_two(at, sums[row][v] * scale + first, sums[row][v + 1] * scale + second);
      }
      if (VECTORS % 2) Type::store(at, sums[row][VECTORS - 1] * scale + (ADD ? Type::load(at) : Vector{}));
    }
    return;
  }
  float copy[ROWS][VECTORS * LANES];
  UNROLL
  for (int row = 0; row < ROWS; ++row) {
    UNROLL
    for (int v = 0; v + 1 < VECTORS; v += 2) F::natural_order(sums[row][v], sums[row][v + 1]);
    UNROLL
    for (int v = 0; v < VECTORS; ++v) Float::store(&copy[row][v * LANES], sums[row][v]);
  }
  for (Int row = 0; row < std::min<Int>(rows, ROWS); ++row)
    for (Int j = 0; j < std::min<Int>(columns, VECTORS * LANES); j += LANES) {
      typename F::Element* at = to + row * stride + j;
      const Vector sum = Float::load(&copy[row][j]);
      store_part<Type>(at, ADD ? sum * scale + load_part<Type>(at, columns - j) : sum * scale, columns - j);
    }
}

template <class F, int VECTORS>
void product_rows(const Rows<F>& a, const Panels<F>& b, Matrix<typename F::Element> c, Int begin, Int end, float scale,
                  bool accumulate) {
  constexpr int ROWS = tile_rows(VECTORS);
  const char* rows[ROWS];
  for (Int i = begin; i < end; i += ROWS) {
    a.point(rows, i, end, ROWS);
    for (Int index = 0; index < b.count; ++index) {
      const Int j = index * b.width();
      typename F::Element* to = c.data + i * c.row + j;
      if (b.count > 1) {
        UNROLL
        for (int row = 0; row < ROWS; ++row)
          for (int byte = 0; byte < VECTORS * LANES * int(sizeof *to); byte += LINE)
            __builtin_prefetch(reinterpret_cast<char*>(to + (row + ROWS) * c.row) + byte, 1);
      }
      Vector sums[ROWS][VECTORS];
      const Int ahead = index == 0 && b.units > 64 ? a.ahead(ROWS) : 0;
      tile<F>(sums, rows, b.panel(index), std::min(b.units, RUN), ahead);
      for (Int unit = RUN; unit < b.units; unit += RUN) {
        const char* rest[ROWS];
        for (int row = 0; row < ROWS; ++row) rest[row] = rows[row] + unit * 4;
        Vector more[ROWS][VECTORS];
        tile<F>(more, rest, b.panel(index) + unit * b.width(), std::min(b.units - unit, RUN), ahead);
        UNROLL
        for (int row = 0; row < ROWS; ++row) {
          UNROLL
          for (int v = 0; v < VECTORS; ++v) sums[row][v] += more[row][v];
        }
      }
      if (accumulate)
        write<F, true>(sums, to, c.row, end - i, b.outer - j, scale);
      else
        write<F, false>(sums, to, c.row, end - i, b.outer - j, scale);
    }
  }
}

template <class F>
void product_part(const Rows<F>& a, const Panels<F>& b, Matrix<typename F::Element> c, Int begin, Int end, float scale,
                  bool accumulate) {
  if constexpr (MAX_VECTORS > 2) {
    if (b.vectors == 4) return product_rows<F, 4>(a, b, c, begin, end, scale, accumulate);
    if (b.vectors == 3) return product_rows<F, 3>(a, b, c, begin, end, scale, accumulate);
  }
  if (b.vectors == 2) return product_rows<F, 2>(a, b, c, begin, end, scale, accumulate);
  return product_rows<F, 1>(a, b, c, begin, end, scale, accumulate);
}

template <class F>
void product(Int m, Int n, Int k, Matrix<const typename F::Element> a, Matrix<const typename F::Element> b,
             Matrix<typename F::Element> c, float scale, bool accumulate, int threads) {
  const Panels<F> panels(k, n);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), all = omp_get_num_threads();
    panels.pack(b, thread, all);
    const Rows<F> rows(a, k);
    const Part part(m, 24, thread, all);
#pragma omp barrier
    product_part(rows, panels, c, part.begin, part.end, scale, accumulate);
  }
}

// ---- D = scale * X^T H, and in the same read of X: G = scale * X B -------------------------------------------------

// One thread's share of D, as floats [columns / STRIP][ranks][STRIP].
template <class F>
struct Sums {
  Int columns, ranks, width, height;
  Buffer<float> sums;
  Buffer<typename F::Unit> h, strips;
  // Rows whose sums stay in registers, and how many strips of columns are packed at a time: 16 KB of units.
  static constexpr Int UNITS = 64, BLOCK = UNITS * F::PAIR, STRIP = GRADIENT_VECTORS * LANES, STRIPS = 64 / STRIP;

  Sums(Int columns, Int ranks)
      : columns(columns),
        ranks(ranks),
        width(ceil_div(columns, STRIP) * STRIP),
        height(ceil_div(ranks, GRADIENT_RANKS) * GRADIENT_RANKS),
        sums(buffer<float>(width * height)),
        h(buffer<typename F::Unit>(height * UNITS)),
        strips(buffer<typename F::Unit>(STRIPS * UNITS * STRIP)) {
    std::memset(sums.get(), 0, width * height * sizeof(float));
  }

  // The sums of one rank, from a column that is a multiple of LANES. Those of a tile stand together.
  INLINE float* at(Int rank, Int column) const {
    return sums.get() + column / STRIP * STRIP * height + rank * STRIP + column % STRIP;
  }

  // Adds X[begin:end]^T H[begin:end], at most BLOCK rows.
  void add(Matrix<const typename F::Element> x, Matrix<const typename F::Element> h_of, Int begin, Int end) {
    const Int units = ceil_div(end - begin, F::PAIR);
    for (Int unit = 0; unit < units; ++unit) pack(h_of, begin + unit * F::PAIR, end, unit);
    for (Int j = 0; j < width; j += STRIPS * STRIP) {
      const Int columns_here = std::min(width - j, STRIPS * STRIP);
      for (Int unit = 0; unit < units; ++unit) {
        const Int i = begin + unit * F::PAIR;
        interleave(x, i, std::min(end, i + F::PAIR), j, columns_here, strips.get() + unit * STRIP);
      }
      for (Int part = 0; part < columns_here; part += STRIP)
        for (Int rank = 0; rank < height; rank += GRADIENT_RANKS) {
          const char* rows[GRADIENT_RANKS];
          for (int row = 0; row < GRADIENT_RANKS; ++row)
            rows[row] = reinterpret_cast<const char*>(h.get() + rank * UNITS + row);
          Vector found[GRADIENT_RANKS][GRADIENT_VECTORS];
          tile<F, GRADIENT_RANKS, GRADIENT_VECTORS, GRADIENT_RANKS>(found, rows, strips.get() + part * UNITS, units);
          UNROLL
          for (int row = 0; row < GRADIENT_RANKS; ++row) {
            F::natural_order(found[row][0], found[row][1]);
            float* to = at(rank + row, j + part);
            UNROLL
            for (int v = 0; v < GRADIENT_VECTORS; ++v, to += LANES) Float::store(to, Float::load(to) + found[row][v]);
          }
        }
    }
  }

 private:
  // One unit of rows of H, to [ranks / GRADIENT_RANKS][unit][GRADIENT_RANKS].
  void pack(Matrix<const typename F::Element> h_of, Int i, Int end, Int unit) const {
    const bool whole = i + F::PAIR <= end;
    for (Int rank = 0; rank < height; rank += GRADIENT_RANKS) {
      typename F::Unit* to = h.get() + rank * UNITS + unit * GRADIENT_RANKS;
      for (Int row = 0; row < GRADIENT_RANKS; ++row) {
        typename F::Element first{}, second{};
        if (rank + row < ranks) first = h_of.at(i, rank + row);
        if (F::PAIR > 1 && rank + row < ranks && whole) second = h_of.at(i + 1, rank + row);
        to[row] = F::unit(first, second);
      }
    }
  }

  // One unit of rows: X[i:end, j:j + count] to one line of each strip.
  void interleave(Matrix<const typename F::Element> x, Int i, Int end, Int j, Int count, typename F::Unit* to) const {
    const typename F::Element* first = x.data + i * x.row + j;
    const typename F::Element* second = i + 1 < end ? first + x.row : nullptr;
    for (Int part = 0; part < count; part += STRIP, to += UNITS * STRIP) {
      const Int left = columns - j - part;
      if (left >= STRIP && (F::PAIR == 1 || second)) {
        F::interleave_two(to, first + part, second + part);
      } else {
        typename F::Element parts[2][STRIP] = {};
        const Int bytes = std::min<Int>(left, STRIP) * sizeof *first;
        if (left > 0) std::memcpy(parts[0], first + part, bytes);
        if (left > 0 && F::PAIR > 1 && second) std::memcpy(parts[1], second + part, bytes);
        F::interleave_two(to, parts[0], parts[1]);
      }
    }
    // The next columns; after the last ones, the first of the next rows.
    const typename F::Element* next = first + (j + count < columns ? count : BLOCK * x.row - j);
    for (Int byte = 0; byte < count * Int(sizeof *next); byte += LINE) {
      __builtin_prefetch(reinterpret_cast<const char*>(next) + byte, 0, 2);
      if (F::PAIR > 1) __builtin_prefetch(reinterpret_cast<const char*>(next + x.row) + byte, 0, 2);
    }
  }
};

template <class F>
void gradient(Int m, Int n, Int r, Matrix<const typename F::Element> x, Matrix<const typename F::Element> b,
              Matrix<const typename F::Element> h, Matrix<typename F::Element> g, Matrix<typename F::Element> d,
              float scale, int threads) {
  using Type = typename F::Type;
  const Panels<F> panels(b.data ? n : 0, b.data ? r : 1);
  const std::unique_ptr<std::unique_ptr<Sums<F>>[]> shares(new std::unique_ptr<Sums<F>>[threads]);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), all = omp_get_num_threads();
    if (b.data) panels.pack(b, thread, all);
    const Rows<F> rows(x, n);
    const Part part(m, 16, thread, all);
    shares[thread].reset(new Sums<F>(n, r));
#pragma omp barrier
    for (Int i = part.begin; i < part.end; i += Sums<F>::BLOCK) {
      const Int end = std::min(i + Sums<F>::BLOCK, part.end);
      if (b.data) product_part(rows, panels, g, i, end, scale, false);
      shares[thread]->add(x, h, i, end);
    }
#pragma omp barrier
    const Part columns(n, LANES, thread, all);
    for (Int rank = 0; rank < r; ++rank)
      for (Int j = columns.begin; j < columns.end; j += LANES) {
        Vector sum = Vector{};
        for (int share = 0; share < all; ++share)
          sum += Float::load(shares[share]->at(rank, j));
        const Int left = std::min<Int>(LANES, n - j);
        if (d.row == 1) {
          store_part<Type>(&d.at(j, rank), sum * scale, left);
        } else {
          typename F::Element part_of[LANES];
          Type::store(part_of, sum * scale);
          for (Int lane = 0; lane < left; ++lane) d.at(j + lane, rank) = part_of[lane];
        }
      }
  }
}

// Calls f with the way in which a type is multiplied; false for a type that this machine cannot do, or not fast: without
// fused multiply-adds a matrix library is faster, and what it makes of other architectures was not measured.
template <class Function>
bool dispatch(int type, Function f) {
#ifdef __FMA__
  if (type == 0) return f(Single<Float>()), true;
  if (type == 1) return f(ForBfloat16()), true;
#ifdef __F16C__
  if (type == 2) return f(Single<Float16>()), true;
#endif
#endif
  return false;
}

}  // namespace

// type: 0 float32, 1 bfloat16, 2 float16. Strides are in elements, and in pairs: rows, columns. Everything is of one
// type. Gives 0 when it did what was asked, 1 when there is no kernel for this.
extern "C" {

// The largest rank to use a type with; 0 for never.
int lora_fx_max_rank(int type) { return dispatch(type, [](auto) {}) ? 128 : 0; }

// c [m, n] = scale * a [m, k] @ b [k, n], or c += it; c's columns are neighbours.
int lora_fx_product(int type, Int m, Int n, Int k, const void* a, Int a_row, Int a_column, const void* b, Int b_row,
                    Int b_column, void* c, Int c_row, float scale, int accumulate, int threads) {
  return !dispatch(type, [&](auto format) {
    using F = decltype(format);
    using E = typename F::Element;
    product<F>(m, n, k, {static_cast<const E*>(a), a_row, a_column}, {static_cast<const E*>(b), b_row, b_column},
               {static_cast<E*>(c), c_row, 1}, scale, accumulate != 0, threads);
  });
}

// d [n, r] = scale * x [m, n].T @ h [m, r], and where b is not null g [m, r] = scale * x @ b [n, r] in the same read of
// x; the columns of x and g are neighbours.
int lora_fx_gradient(int type, Int m, Int n, Int r, const void* x, Int x_row, const void* b, Int b_row, Int b_column,
                     const void* h, Int h_row, Int h_column, void* g, Int g_row, void* d, Int d_row, Int d_column,
                     float scale, int threads) {
  return !dispatch(type, [&](auto format) {
    using F = decltype(format);
    using E = typename F::Element;
    gradient<F>(m, n, r, {static_cast<const E*>(x), x_row, 1}, {static_cast<const E*>(b), b_row, b_column},
                {static_cast<const E*>(h), h_row, h_column}, {static_cast<E*>(g), g_row, 1},
                {static_cast<E*>(d), d_row, d_column}, scale, threads);
  });
}
}
