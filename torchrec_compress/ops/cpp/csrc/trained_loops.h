// Loops over the numbers of a trained row and of its state, compiled once per instruction set.
#pragma once
#include "trained_codes.h"

namespace torchrec_compress {
namespace {

inline float sum_of_lanes(float (&lanes)[16]) {
  for (int half = 8; half; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

inline uint32_t largest_bits(const float* values, int width) {
  uint32_t largest = 0;
  for (int j = 0; j < width; ++j) {
    const uint32_t bits = bits_of(values[j]);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Loops over the numbers of a row. WIDTH 0 is any width. What is written is told apart from what is read, and signs are
// bits, not conditions, or the compiler would not vectorise them.
template <int WIDTH>
struct Loops {
  static constexpr int N = WIDTH && WIDTH < SUM_LANES ? WIDTH : SUM_LANES, PARTS = WIDTH / N;

  static inline int of(int width) { return WIDTH ? WIDTH : width; }

  // In 16 lanes, which are then halved.
  static inline float sum_of_squares(const float* values, int any) {
    const int width = of(any);
    float lanes[16] = {};
    int j = 0;
    if constexpr (WIDTH != 0 && WIDTH % 16 == 0) {
      constexpr int SUMS = 16 / SUM_LANES;
      typename Lanes<SUM_LANES>::Vector sums[SUMS] = {};
      for (; j < WIDTH; j += 16)
        for (int q = 0; q < SUMS; ++q) {
          const auto value = load<SUM_LANES>(values + j + q * SUM_LANES);
          sums[q] += value * value;
        }
      for (int q = 0; q < SUMS; ++q) store<SUM_LANES>(lanes + q * SUM_LANES, sums[q]);
    }
    for (; j + 16 <= width; j += 16)
      for (int k = 0; k < 16; ++k) lanes[k] += values[j + k] * values[j + k];
    for (int k = 0; j + k < width; ++k) lanes[k] += values[j + k] * values[j + k];
    return sum_of_lanes(lanes);
  }

  template <int BITS>
  static inline void decode(float* __restrict values, const uint8_t* __restrict row, float scale, int any) {
    if constexpr (WIDTH != 0)
      for (int q = 0; q < PARTS; ++q)
        store<N>(values + q * N, numbers<N, BITS>(row + q * N * BITS / 8) * scale);
    else
      for (int j = 0; j < any; ++j) values[j] = number<BITS>(row, j) * scale;
  }

  static inline void step(float* __restrict values, const float* __restrict grads, float factor, int any) {
    for (int j = 0; j < of(any); ++j) values[j] -= factor * grads[j];
  }

  static inline void step_each(float* __restrict values, float* __restrict sums, const float* __restrict grads,
                               float learning_rate, float eps, int any) {
    for (int j = 0; j < of(any); ++j) {
      sums[j] += grads[j] * grads[j];
      values[j] -= learning_rate / (__builtin_sqrtf(sums[j]) + eps) * grads[j];
    }
  }

  static inline void step_moments(float* __restrict moments, const float* __restrict grads, float beta, float rest,
                                  int any) {
    for (int j = 0; j < of(any); ++j) moments[j] = beta * moments[j] + rest * grads[j];
  }

  static inline void step_squares(float* __restrict sums, const float* __restrict grads, float beta, float rest,
                                  int any) {
    for (int j = 0; j < of(any); ++j) sums[j] = beta * sums[j] + rest * (grads[j] * grads[j]);
  }

  static inline void step_by_moments(float* __restrict values, const float* __restrict moments,
                                     const float* __restrict sums, float learning_rate, float correction, float eps,
                                     int any) {
    for (int j = 0; j < of(any); ++j)
      values[j] -= learning_rate / (__builtin_sqrtf(sums[j] * correction) + eps) * moments[j];
  }

  static inline void decode_signed(float* __restrict values, const uint8_t* __restrict codes, float largest, int any) {
    for (int j = 0; j < of(any); ++j) {
      const uint32_t code = codes[j];
      values[j] = float_of(bits_of(SignedShare::decode(code & 127) * largest) | (code & 128) << 24);
    }
  }

  static inline void round_signed(uint8_t* __restrict codes, const float* __restrict values, float largest,
                                  uint32_t random, int any) {
    for (int j = 0; j < of(any); ++j) {
      const float value = values[j] + 0.0f;  // a zero has no sign
      const int code = SignedShare::round_by(spread(random, j), float_of(bits_of(value)) / largest);
      codes[j] = uint8_t(uint32_t(code) | sign_of(value) << 7);
    }
  }

  static inline void decode_shares(float* __restrict sums, const uint8_t* __restrict codes, float largest, int any) {
    for (int j = 0; j < of(any); ++j) sums[j] = Share::decode(codes[j]) * largest;
  }

  // `first` is the number that the first of them has among the state's; codes are at least LEAST, 0 or 1.
  template <int LEAST>
  static inline void round_shares(uint8_t* __restrict codes, const float* __restrict sums, float largest,
                                  uint32_t random, int first, int any) {
    for (int j = 0; j < of(any); ++j) {
      const int code = Share::round_by(spread(random, first + j), sums[j] / largest);
      codes[j] = uint8_t(LEAST ? code + (code == 0) : code);
    }
  }

  // Rounds values to numbers of `LARGEST` at most, a byte each.
  template <int LARGEST>
  static inline void round(uint8_t* __restrict found, const float* __restrict values, float inverse, uint32_t random,
                           int any) {
    for (int j = 0; j < of(any); ++j) {
      const float dither = float(int((spread(random, j) >> 16) * 2 + 1)) * 7.62939453125e-6f;  // 2^-17
      const float moved = values[j] * inverse + dither;
      int number = int(moved);
      number -= float(number) > moved;
      number = number > LARGEST ? LARGEST : number;
      found[j] = uint8_t(number < -LARGEST ? -LARGEST : number);
    }
  }

  static inline void pack(uint8_t* __restrict row, const uint8_t* __restrict found, int any) {
    for (int j = 0; j < of(any) / 2; ++j) row[j] = uint8_t((found[2 * j] & 15) | found[2 * j + 1] << 4);
  }
};

}  // namespace
}  // namespace torchrec_compress
