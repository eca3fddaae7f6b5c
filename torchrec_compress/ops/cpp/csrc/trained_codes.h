// The codes that trained rows and their states are made of, as ops/trained.py says; compiled once per instruction set.
// Loops are plain, for the compiler to vectorise.
#pragma once
#include "lanes.h"
#include "trained.h"

namespace torchrec_compress {
namespace {

constexpr uint32_t INFINITE = 0x7F800000;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits & 0x7FFFFFFF;
}

inline uint32_t sign_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits >> 31;
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// A float in a byte: code 0 is 0, code c is the float of bits (c + BASE) << SHIFT.
template <int SHIFT, int BASE>
struct SmallFloat {
  static constexpr uint32_t CUT = (1u << SHIFT) - 1;
  static constexpr uint32_t SMALLEST = uint32_t(1 + BASE) << SHIFT;

  static inline float decode(uint32_t code) {
    const uint32_t none = ((code + 255) >> 8) - 1;  // all bits where the code is 0, and no condition
    return float_of((code + BASE) << SHIFT & ~none);
  }

  static inline int round_up(float value) {
    const int code = int((bits_of(value) + CUT) >> SHIFT) - BASE;
    return code < 1 ? 1 : code;
  }

  static inline int round_by(uint32_t random, float value) {
    const float smallest = float_of(SMALLEST);
    const int wide = int((bits_of(value) + (random & CUT)) >> SHIFT) - BASE;
    const int narrow = float(int(random >> 8)) * (smallest * 5.9604644775390625e-8f) < value;  // 2^-24
    return value >= smallest ? wide : narrow;
  }
};

using Scale = SmallFloat<20, (127 - 25) * 8>;
using RowState = SmallFloat<21, (127 - 40) * 4>;
using Share = SmallFloat<20, 127 * 8 - 255>;
using SignedShare = SmallFloat<20, 127 * 8 - 127>;
using RowMoment = SmallFloat<21, (127 - 52) * 4>;

// 32 bits for the number `index` of a row (Wellons, "lowbias32").
inline uint32_t spread(uint32_t start, int index) {
  uint32_t x = start + uint32_t(index + 1) * 0x9E3779B9u;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

typedef int8_t Signed __attribute__((may_alias));

inline float number8(const uint8_t* row, int j) { return float(reinterpret_cast<const Signed*>(row)[j]); }
inline float number4(const uint8_t* row, int j) { return float(int((row[j >> 1] >> (j & 1) * 4 & 15) ^ 8) - 8); }

template <int BITS>
inline float number(const uint8_t* row, int j) {
  return BITS == 8 ? number8(row, j) : number4(row, j);
}

#if defined(__AVX2__)
// The 8 or 16 numbers of a row from `from` on, as bytes of one each.
template <int N, int BITS>
inline __m128i number_bytes(const uint8_t* from) {
  if (BITS == 8) {
    if (N == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  }
  uint64_t both = 0;
  __builtin_memcpy(&both, from, N / 2);
  const __m128i packed = _mm_cvtsi64_si128(int64_t(both)), low = _mm_set1_epi8(15), sign = _mm_set1_epi8(8);
  const __m128i pairs =
      _mm_unpacklo_epi8(_mm_and_si128(packed, low), _mm_and_si128(_mm_srli_epi16(packed, 4), low));
  return _mm_sub_epi8(_mm_xor_si128(pairs, sign), sign);
}
#endif

template <int N, int BITS>
inline typename Lanes<N>::Vector numbers(const uint8_t* from) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(number_bytes<N, BITS>(from)));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(number_bytes<N, BITS>(from)));
#endif
  typename Lanes<N>::Vector found;
  for (int j = 0; j < N; ++j) found[j] = number<BITS>(from, j);
  return found;
}

}  // namespace
}  // namespace torchrec_compress
