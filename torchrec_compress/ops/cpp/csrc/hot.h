// Hot rows: floats, or values of 8 or 4 bits that become floats where they are looked up.
#pragma once
#include "codebook_bags.h"
#include "lanes.h"

namespace torchrec_compress {
namespace {

// A float16 as a float. Not every processor with AVX2 need have an instruction for it, and one that flushes subnormal
// numbers to zero would lose small scales.
inline float half(const uint8_t* from) {
  const uint32_t bits = from[0] | uint32_t(from[1]) << 8, sign = (bits & 0x8000) << 16;
  const uint32_t exponent = bits & 0x7C00, rest = ((bits & 0x7FFF) << 13) + (112u << 23);  // from a bias of 15 to 127
  uint32_t whole = exponent == 0x7C00 ? rest + (112u << 23) : rest;  // infinities and NaN
  if (exponent == 0) {
    const float lowest = 0x1p-14f;
    float value;
    const uint32_t moved = rest + (1u << 23);
    __builtin_memcpy(&value, &moved, sizeof(value));
    value -= lowest;
    __builtin_memcpy(&whole, &value, sizeof(whole));
  }
  whole |= sign;
  float value;
  __builtin_memcpy(&value, &whole, sizeof(value));
  return value;
}

// Sixteen small integers, of which a function may use the first few.
typedef uint8_t Bytes __attribute__((vector_size(16)));

// N bytes from memory, and zeros. An integer on the way: fewer bytes than a vector's would go through memory once more.
template <int N>
inline Bytes load_bytes(const uint8_t* from) {
  typedef uint64_t Pair __attribute__((vector_size(16)));
  Pair pair = {};
  if constexpr (N == 16) {
    __builtin_memcpy(&pair, from, N);
  } else {
    uint64_t integer = 0;
    __builtin_memcpy(&integer, from, N);
    pair[0] = integer;
  }
  return (Bytes)pair;
}

// Gives each of N half bytes in memory a byte of its own.
template <int N>
inline Bytes load_halves(const uint8_t* from) {
  typedef uint16_t Pairs __attribute__((vector_size(16)));
  typedef uint8_t Half __attribute__((vector_size(8)));
  // in an integer twice as wide, a shift by half a byte moves the high half to the next byte: the lower one in memory
  // comes first on x86 and ARM
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "values are unpacked on little-endian processors");
  uint64_t halves = 0;
  __builtin_memcpy(&halves, from, N / 2);
  const Pairs wide = __builtin_convertvector((Half)halves, Pairs);
  return (Bytes)((wide | wide << 4) & 0x0F0F);
}

// The first N of sixteen bytes as floats. GCC 12 widens bytes to four times their size one by one.
template <int N>
inline typename Lanes<N>::Vector to_floats(Bytes bytes) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return _mm512_maskz_cvtepi32_ps(-1, _mm512_maskz_cvtepu8_epi32(-1, (__m128i)bytes));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32((__m128i)bytes));
#endif
#if defined(__x86_64__)
  if constexpr (N == 4) {
    const __m128i zero = _mm_setzero_si128();
    return _mm_cvtepi32_ps(_mm_unpacklo_epi16(_mm_unpacklo_epi8((__m128i)bytes, zero), zero));
  }
#endif
  typename Lanes<N>::Vector values;
  for (int i = 0; i < N; ++i) values[i] = float(bytes[i]);
  return values;
}

// A row of D values of BITS bits behind their scale and bias (ops/lowbit.py). With 4, the first of two is in the low
// half of their byte.
template <int BITS>
struct HotRow {
  const uint8_t* values;
  float scale, bias;

  explicit HotRow(const char* row) : values(reinterpret_cast<const uint8_t*>(row) + 4) {
    scale = half(values - 4);
    bias = half(values - 2);
  }

  inline float at(int64_t column) const {
    const int value = BITS == 8 ? values[column] : values[column / 2] >> (column % 2 * 4) & 15;
    return float(value) * scale + bias;
  }

  // N columns, N at least 2, from an even one on.
  template <int N>
  inline typename Lanes<N>::Vector load(int64_t column) const {
    const Bytes bytes = BITS == 8 ? load_bytes<N>(values + column) : load_halves<N>(values + column / 2);
    return to_floats<N>(bytes) * scale + bias;
  }
};

template <>
struct HotRow<32> {
  const float* values;

  explicit HotRow(const char* row) : values(reinterpret_cast<const float*>(row)) {}

  template <int N>
  inline typename Lanes<N>::Vector load(int64_t column) const {
    return torchrec_compress::load<N>(values + column);
  }
};

constexpr int64_t HOT_COLUMNS = 128;  // of a hot row that become floats at a time

template <int BITS>
__attribute__((noinline)) void dequantize(const char* row, int64_t column, int64_t count, float* to) {
  const HotRow<BITS> values(row);
  int64_t j = 0;
  if (column % 2 == 0)
    for (; j + LANES <= count; j += LANES) store<LANES>(to + j, values.template load<LANES>(column + j));
  for (; j < count; ++j) to[j] = values.at(column + j);
}

// Returns `count` columns of a hot row, at most HOT_COLUMNS, as floats: where they lie, or in `buffer`.
inline const float* hot_columns(const Lookup& lookup, int64_t number, int64_t column, int64_t count, float* buffer) {
  const char* row = lookup.hot_rows + number * lookup.hot_stride;
  if (lookup.hot_bits == 32) return reinterpret_cast<const float*>(row) + column;
  lookup.hot_bits == 8 ? dequantize<8>(row, column, count, buffer) : dequantize<4>(row, column, count, buffer);
  return buffer;
}

// Calls `work` for the columns of a hot row, some at a time.
template <typename Work>
inline void for_hot_columns(const Lookup& lookup, int64_t number, const Work& work) {
  float buffer[HOT_COLUMNS];
  for (int64_t j = 0; j < lookup.dim; j += HOT_COLUMNS) {
    const int64_t count = lookup.dim - j < HOT_COLUMNS ? lookup.dim - j : HOT_COLUMNS;
    work(hot_columns(lookup, number, j, count, buffer), j, count);
  }
}

// The number of the hot row that an escape code stands for, or a number beyond the last.
template <typename Code>
inline int64_t hot_number(const Lookup& lookup, const Code* codes) {
  int64_t number = codes[0] - lookup.first_size;
  for (int64_t m = 1; m < lookup.num_codes && number < lookup.num_hot; ++m)
    number = number * lookup.codebook_size + codes[m];
  return number;
}

// Fetches the cache lines of a range that is not aligned to them. GCC takes a call of a function that only fetches for
// one without effect, and leaves it out, unless it is inlined first.
__attribute__((always_inline)) inline void fetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
  __builtin_prefetch(from + bytes - 1);
}

}  // namespace
}  // namespace torchrec_compress
