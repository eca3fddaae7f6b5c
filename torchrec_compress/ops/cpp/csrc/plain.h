// The common case: product codes of one byte in codebooks of 256 codewords. Without hot rows every byte is a codeword,
// so codes are summed where they lie, without a look at them before, and the distance between codebooks is a constant.
#pragma once
#include "gather.h"
#include "lanes.h"

// Without it GCC keeps arrays of vectors in memory.
#define UNROLL _Pragma("GCC unroll 16")

namespace torchrec_compress {
namespace {

constexpr int64_t PLAIN_SIZE = 256;   // codewords per codebook
constexpr int64_t FETCH_AHEAD = 128;  // positions whose codes are on their way from memory
constexpr int64_t BAGS_AHEAD = 16;    // bags whose gradients are
constexpr int64_t AT_ONCE = 64;       // positions whose codes are walked over group by group
const float ONE = 1.0f;

inline bool is_plain(const Lookup& lookup) {
  return !lookup.is_residual && lookup.code_bytes == 1 && lookup.codebook_size == PLAIN_SIZE;
}

// The codes of positions in a code table.
template <typename Id>
struct TableRows {
  const uint8_t* codes;
  const Id* ids;
  int64_t stride, num_rows, last;

  TableRows(const Batch& batch, const Lookup& lookup, int64_t first, int64_t stop)
      : codes(reinterpret_cast<const uint8_t*>(lookup.codes)),
        ids(static_cast<const Id*>(batch.ids)),
        stride(lookup.stride),
        num_rows(lookup.num_rows),
        last(stop - 1) {
    for (int64_t p = first; p < first + FETCH_AHEAD && p < stop; ++p) __builtin_prefetch(at(p));
  }

  inline bool is_wrong(int64_t p) const { return uint64_t(ids[p]) >= uint64_t(num_rows); }
  inline const uint8_t* at(int64_t p) const { return codes + int64_t(ids[p]) * stride; }
  inline void fetch(int64_t p) const { __builtin_prefetch(at(p + FETCH_AHEAD < last ? p + FETCH_AHEAD : last)); }
};

// The codes of positions, gathered before.
struct GivenRows {
  const uint8_t* codes;
  int64_t stride;

  explicit GivenRows(const Lookup& lookup)
      : codes(reinterpret_cast<const uint8_t*>(lookup.codes) - lookup.first_row * lookup.stride),
        stride(lookup.stride) {}

  inline bool is_wrong(int64_t) const { return false; }
  inline const uint8_t* at(int64_t p) const { return codes + p * stride; }
  inline void fetch(int64_t) const {}
};

// The factors of a bag's positions: its weights, of which step 0 repeats a one, times its scale.
struct Factors {
  const float* weights;
  int64_t step;
  float scale;

  Factors(const Batch& batch, bool is_mean, int64_t from, int64_t to)
      : weights(batch.weights ? batch.weights + from : &ONE),
        step(batch.weights ? 1 : 0),
        scale(is_mean && to - from > 1 ? 1.0f / float(to - from) : 1.0f) {}
};

template <int N, int WIDTH, int CHUNKS, int PARTS>
inline void write_sums(float* out, const typename Lanes<N>::Vector (&sums)[CHUNKS][PARTS], bool is_streamed) {
  if (is_streamed) {
    UNROLL
    for (int c = 0; c < CHUNKS; ++c)
      UNROLL
      for (int q = 0; q < PARTS; ++q) stream<N>(out + c * WIDTH + q * N, sums[c][q]);
  } else {
    UNROLL
    for (int c = 0; c < CHUNKS; ++c)
      UNROLL
      for (int q = 0; q < PARTS; ++q) store<N>(out + c * WIDTH + q * N, sums[c][q]);
  }
}

// Sums the codewords of codes [m, m + CHUNKS) in bags [begin, end); returns the first position whose id is out of
// range, or -1. A function of its own for every number of codes: together they would not fit in the registers.
template <int WIDTH, int CHUNKS, bool IS_FIRST, typename Rows>
__attribute__((noinline)) int64_t plain_sums(const Batch& given, const Lookup& lookup, const Rows& given_rows,
                                             int64_t begin, int64_t end, int64_t m) {
  constexpr int N = WIDTH < SUM_LANES ? WIDTH : SUM_LANES, PARTS = WIDTH / N;
  // copies, which a write to the output cannot change: they stay in registers
  const Rows rows = given_rows;
  const Batch batch = given;
  const bool is_mean = lookup.is_mean, is_streamed = lookup.is_streamed;
  const float* const books = lookup.codebooks + m * PLAIN_SIZE * WIDTH;
  char* const saved = lookup.saved ? lookup.saved + m : nullptr;
  const int64_t saved_step = lookup.saved_step, row_step = lookup.row_step;
  float* out = lookup.out + (begin - lookup.first_bag) * row_step + m * WIDTH;
  int64_t p = offset(batch, begin);
  for (int64_t bag = begin; bag < end; ++bag, out += row_step) {
    const int64_t to = offset(batch, bag + 1);
    const Factors factors(batch, is_mean, p, to);
    const float* weight = factors.weights;
    typename Lanes<N>::Vector sums[CHUNKS][PARTS];
    UNROLL
    for (int c = 0; c < CHUNKS; ++c)
      UNROLL
      for (int q = 0; q < PARTS; ++q) sums[c][q] = typename Lanes<N>::Vector{};
    for (; p < to; ++p, weight += factors.step) {
      if (IS_FIRST) {
        rows.fetch(p);
        if (__builtin_expect(rows.is_wrong(p), false)) return p;
      }
      const uint8_t* codes = rows.at(p) + m;
      if (saved) __builtin_memcpy(saved + p * saved_step, codes, CHUNKS);
      UNROLL
      for (int c = 0; c < CHUNKS; ++c) {
        const float* word = books + (c * PLAIN_SIZE + codes[c]) * WIDTH;
        UNROLL
        for (int q = 0; q < PARTS; ++q) sums[c][q] += *weight * load<N>(word + q * N);
      }
    }
    UNROLL
    for (int c = 0; c < CHUNKS; ++c)
      UNROLL
      for (int q = 0; q < PARTS; ++q) sums[c][q] *= factors.scale;
    write_sums<N, WIDTH>(out, sums, is_streamed);
  }
  return -1;
}

// As above, for all codes from m on.
template <int WIDTH, int CHUNKS, typename Rows>
int64_t plain_bags(const Batch& batch, const Lookup& lookup, const Rows& rows, int64_t begin, int64_t end, int64_t m) {
  for (; m + CHUNKS <= lookup.num_codes; m += CHUNKS) {
    const int64_t wrong = m == 0 ? plain_sums<WIDTH, CHUNKS, true>(batch, lookup, rows, begin, end, m)
                                 : plain_sums<WIDTH, CHUNKS, false>(batch, lookup, rows, begin, end, m);
    if (wrong >= 0) return wrong;
  }
  if constexpr (CHUNKS > 1) return plain_bags<WIDTH, CHUNKS / 2>(batch, lookup, rows, begin, end, m);
  return -1;
}

// The end of the bags from this one on whose codes, walked over again, are still in the cache.
inline int64_t bags_at_once(const Batch& batch, int64_t bag, int64_t end) {
  const int64_t last = offset(batch, bag) + AT_ONCE;
  int64_t stop = bag + 1;
  while (stop < end && offset(batch, stop + 1) <= last) ++stop;
  return stop;
}

template <int WIDTH, typename Rows>
Wrong plain_forward(const Batch& batch, const Lookup& lookup, const Rows& rows, int64_t begin, int64_t end) {
  constexpr int CHUNKS = SUM_REGISTERS / (WIDTH <= SUM_LANES ? 1 : WIDTH / SUM_LANES);
  for (int64_t bag = begin; bag < end;) {
    const int64_t stop = lookup.num_codes > CHUNKS ? bags_at_once(batch, bag, end) : end;
    const int64_t wrong = plain_bags<WIDTH, CHUNKS>(batch, lookup, rows, bag, stop, 0);
    if (wrong >= 0) return {Wrong::ID, wrong};
    bag = stop;
  }
  if (lookup.is_streamed) end_streams();
  return {Wrong::NOTHING, 0};
}

template <int WIDTH>
Wrong plain_forward(const Batch& batch, const Lookup& lookup, int64_t begin, int64_t end) {
  const int64_t first = offset(batch, begin), stop = offset(batch, end);
  if (lookup.is_gathered) return plain_forward<WIDTH>(batch, lookup, GivenRows(lookup), begin, end);
  return batch.id_bytes == 8
      ? plain_forward<WIDTH>(batch, lookup, TableRows<int64_t>(batch, lookup, first, stop), begin, end)
      : plain_forward<WIDTH>(batch, lookup, TableRows<int32_t>(batch, lookup, first, stop), begin, end);
}

// Adds to the codewords of CHUNKS codes.
template <int WIDTH, int CHUNKS, bool IS_WEIGHTED>
__attribute__((noinline)) void plain_scatter(const Batch& given, const Lookup& lookup, int64_t m) {
  constexpr int N = WIDTH < LANES ? WIDTH : LANES, PARTS = WIDTH / N;
  const GivenRows rows(lookup);
  const Batch batch = given;
  const bool is_mean = lookup.is_mean;
  const int64_t first = lookup.first_bag, num_bags = lookup.num_bags, row_step = lookup.row_step;
  float* const books = lookup.grad_codebooks + m * PLAIN_SIZE * WIDTH;
  const float* from = lookup.grad + m * WIDTH;
  int64_t p = offset(batch, first);
  for (int64_t b = 0; b < num_bags; ++b, from += row_step) {
    const int64_t to = offset(batch, first + b + 1);
    const Factors factors(batch, is_mean, p, to);
    for (int j = 0; j < CHUNKS * WIDTH; j += 16) __builtin_prefetch(from + BAGS_AHEAD * row_step + j);
    typename Lanes<N>::Vector grad[CHUNKS][PARTS];
    UNROLL
    for (int c = 0; c < CHUNKS; ++c)
      UNROLL
      for (int q = 0; q < PARTS; ++q) grad[c][q] = factors.scale * load<N>(from + c * WIDTH + q * N);
    const float* weight = factors.weights;
    for (; p < to; ++p, weight += factors.step) {
      const uint8_t* codes = rows.at(p) + m;
      UNROLL
      for (int c = 0; c < CHUNKS; ++c) {
        float* slot = books + (c * PLAIN_SIZE + codes[c]) * WIDTH;
        UNROLL
        for (int q = 0; q < PARTS; ++q) {
          const auto share = IS_WEIGHTED ? *weight * grad[c][q] : grad[c][q];
          add<N>(slot + q * N, share);
        }
      }
    }
  }
}

// Adds to the codewords of codes [m, end).
template <int WIDTH, int CHUNKS>
void plain_backward(const Batch& batch, const Lookup& lookup, int64_t m, int64_t end) {
  for (; m + CHUNKS <= end; m += CHUNKS)
    batch.weights ? plain_scatter<WIDTH, CHUNKS, true>(batch, lookup, m)
                  : plain_scatter<WIDTH, CHUNKS, false>(batch, lookup, m);
  if constexpr (CHUNKS > 1) plain_backward<WIDTH, CHUNKS / 2>(batch, lookup, m, end);
}

template <int WIDTH>
void plain_backward(const Batch& batch, const Lookup& lookup, int64_t m, int64_t end) {
  if (lookup.grad_codebooks) plain_backward<WIDTH, 16 * LANES / (WIDTH < LANES ? LANES : WIDTH)>(batch, lookup, m, end);
}

}  // namespace
}  // namespace torchrec_compress
