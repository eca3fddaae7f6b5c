// The common case: product codes of one byte in codebooks of 256 codewords, no hot rows. Every byte is a codeword, so
// codes are summed where they lie, without a look at them before, and the distance between codebooks is a constant.
#pragma once
#include "gather.h"
#include "lanes.h"

// Without it GCC keeps arrays of vectors in memory.
#define UNROLL _Pragma("GCC unroll 16")

namespace torchrec_compress {
namespace {

constexpr int64_t PLAIN_SIZE = 256;   // codewords per codebook
constexpr int64_t FETCH_AHEAD = 128;  // positions whose codes are on their way from memory
constexpr int64_t BAGS_AHEAD = 8;     // bags whose gradients are
const float ONE = 1.0f;

inline bool is_plain(const Lookup& lookup) {
  return !lookup.is_residual && lookup.code_bytes == 1 && lookup.codebook_size == PLAIN_SIZE && lookup.num_hot == 0;
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

// The positions [from, to) of a bag.
struct Bag {
  int64_t from, to;
  const float* weights;  // step 0 repeats a one
  int64_t weight_step;
  float scale;

  Bag(const Batch& batch, const Lookup& lookup, int64_t bag) : from(offset(batch, bag)), to(offset(batch, bag + 1)) {
    weights = batch.weights ? batch.weights + from : &ONE;
    weight_step = batch.weights ? 1 : 0;
    scale = lookup.is_mean && to - from > 1 ? 1.0f / float(to - from) : 1.0f;
  }
};

// Sums the codewords of CHUNKS codes; returns the first position whose id is out of range, or -1.
template <int WIDTH, int CHUNKS, bool IS_FIRST, typename Rows>
__attribute__((always_inline)) inline int64_t plain_sum(const Lookup& lookup, Rows rows, Bag bag, int64_t m, float* out) {
  constexpr int N = WIDTH < SUM_LANES ? WIDTH : SUM_LANES, PARTS = WIDTH / N;
  typename Lanes<N>::Vector sums[CHUNKS][PARTS];
  UNROLL
  for (int c = 0; c < CHUNKS; ++c)
    UNROLL
    for (int q = 0; q < PARTS; ++q) sums[c][q] = typename Lanes<N>::Vector{};
  const float* books = lookup.codebooks + m * PLAIN_SIZE * WIDTH;
  const float* weight = bag.weights;
  char* const saved = lookup.saved ? lookup.saved + m : nullptr;
  const int64_t saved_step = lookup.saved_step;
  for (int64_t p = bag.from; p < bag.to; ++p, weight += bag.weight_step) {
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
    for (int q = 0; q < PARTS; ++q) {
      float* to = out + (m + c) * WIDTH + q * N;
      lookup.is_streamed ? stream<N>(to, bag.scale * sums[c][q]) : store<N>(to, bag.scale * sums[c][q]);
    }
  return -1;
}

template <int WIDTH, int CHUNKS, typename Rows>
__attribute__((always_inline)) inline int64_t plain_bag(const Lookup& lookup, const Rows& rows, const Bag& bag, int64_t m, float* out) {
  for (; m + CHUNKS <= lookup.num_codes; m += CHUNKS) {
    const int64_t wrong = m == 0 ? plain_sum<WIDTH, CHUNKS, true>(lookup, rows, bag, m, out)
                                 : plain_sum<WIDTH, CHUNKS, false>(lookup, rows, bag, m, out);
    if (wrong >= 0) return wrong;
  }
  if constexpr (CHUNKS > 1) return plain_bag<WIDTH, CHUNKS / 2>(lookup, rows, bag, m, out);
  return -1;
}

template <int WIDTH, typename Rows>
Wrong plain_forward(const Batch& batch, const Lookup& lookup, const Rows& rows, int64_t begin, int64_t end) {
  constexpr int CHUNKS = SUM_REGISTERS / (WIDTH <= SUM_LANES ? 1 : WIDTH / SUM_LANES);
  for (int64_t bag = begin; bag < end; ++bag) {
    float* out = lookup.out + (bag - lookup.first_bag) * lookup.row_step;
    const int64_t wrong = plain_bag<WIDTH, CHUNKS>(lookup, rows, Bag(batch, lookup, bag), 0, out);
    if (wrong >= 0) return {Wrong::ID, wrong};
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
void plain_scatter(const Batch& batch, const Lookup& lookup, int64_t m) {
  constexpr int N = WIDTH < LANES ? WIDTH : LANES, PARTS = WIDTH / N;
  const GivenRows rows(lookup);
  float* books = lookup.grad_codebooks + m * PLAIN_SIZE * WIDTH;
  for (int64_t b = 0; b < lookup.num_bags; ++b) {
    const Bag bag(batch, lookup, lookup.first_bag + b);
    const float* from = lookup.grad + b * lookup.row_step + m * WIDTH;
    for (int j = 0; j < CHUNKS * WIDTH; j += 16) __builtin_prefetch(from + BAGS_AHEAD * lookup.row_step + j);
    typename Lanes<N>::Vector grad[CHUNKS][PARTS];
    UNROLL
    for (int c = 0; c < CHUNKS; ++c)
      UNROLL
      for (int q = 0; q < PARTS; ++q) grad[c][q] = bag.scale * load<N>(from + c * WIDTH + q * N);
    const float* weight = bag.weights;
    for (int64_t p = bag.from; p < bag.to; ++p, weight += bag.weight_step) {
      const uint8_t* codes = rows.at(p) + m;
      UNROLL
      for (int c = 0; c < CHUNKS; ++c) {
        float* slot = books + (c * PLAIN_SIZE + codes[c]) * WIDTH;
        UNROLL
        for (int q = 0; q < PARTS; ++q) {
          const auto share = IS_WEIGHTED ? *weight * grad[c][q] : grad[c][q];
          store<N>(slot + q * N, load<N>(slot + q * N) + share);
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
