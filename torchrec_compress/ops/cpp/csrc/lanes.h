// Vectors of floats as the compiler of each instruction set has them.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace torchrec_compress {
namespace {

#if defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // wider vectors than the machine's go through the stack in GCC
#endif
// what sums are kept in; scattered additions are slower in the wide vectors of AVX-512 than in two halves
#if defined(__AVX512F__)
constexpr int SUM_LANES = 16, SUM_REGISTERS = 16;
#else
constexpr int SUM_LANES = LANES, SUM_REGISTERS = 8;
#endif

template <int N>
struct Lanes {
  typedef float Vector __attribute__((vector_size(N * 4)));
  typedef float Memory __attribute__((vector_size(N * 4), aligned(4), may_alias));  // unaligned
};

template <int N>
inline typename Lanes<N>::Vector load(const float* from) {
  return *reinterpret_cast<const typename Lanes<N>::Memory*>(from);
}

template <int N>
inline void store(float* to, typename Lanes<N>::Vector value) {
  *reinterpret_cast<typename Lanes<N>::Memory*>(to) = value;
}

template <int N>
inline void add(float* to, typename Lanes<N>::Vector value) {
  store<N>(to, load<N>(to) + value);
}

// Writes past the caches, to an address that is a multiple of the vector's size; end_streams() must follow.
template <int N>
inline void stream(float* to, typename Lanes<N>::Vector value) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return _mm512_stream_ps(to, value);
#endif
#if defined(__AVX__)
  if constexpr (N == 8) return _mm256_stream_ps(to, value);
#endif
#if defined(__x86_64__)
  if constexpr (N == 4) return _mm_stream_ps(to, value);
#endif
  store<N>(to, value);
}

inline void end_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace torchrec_compress
