// The look-up of trained rows, compiled once per instruction set.
#pragma once
#include "trained_update.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace torchrec_compress {
namespace {

constexpr int64_t ROWS_AHEAD = 16;  // rows that are on their way from memory

// The rows of a batch's ids.
struct BatchRows {
  const TrainedTable table;
  const TrainedBatch batch;
  const int64_t last;

  BatchRows(const TrainedTable& table, const TrainedBatch& batch, int64_t end)
      : table(table), batch(batch), last(offset(end) - 1) {}

  inline int64_t offset(int64_t bag) const {
    return batch.offsets ? read_number(batch.offsets, batch.offset_bytes, bag) : bag;
  }
  inline int64_t id(int64_t p) const { return read_number(batch.ids, batch.id_bytes, p); }
  inline bool is_wrong(int64_t p) const { return uint64_t(id(p)) >= uint64_t(table.num_rows); }
  inline const uint8_t* at(int64_t p) const { return table.rows + id(p) * table.row_bytes; }
  inline float scale(const uint8_t* row) const { return Scale::decode(row[table.row_bytes - 1]); }
  inline float share(int64_t from, int64_t to) const {
    return batch.is_mean && to - from > 1 ? 1.0f / float(to - from) : 1.0f;
  }
  inline void fetch(int64_t p) const {
    const uint8_t* row = at(p < last ? p : last);
    __builtin_prefetch(row);
    __builtin_prefetch(row + table.row_bytes - 1);
    for (int64_t j = 64; j < table.row_bytes - 1; j += 64) __builtin_prefetch(row + j);
  }
  inline void fetch_first(int64_t begin) const {
    const int64_t first = offset(begin);
    for (int64_t p = first; p < first + ROWS_AHEAD && p <= last; ++p) fetch(p);
  }
};

// Rows of WIDTH numbers, summed in registers.
template <int WIDTH, int BITS>
int64_t sum_rows(const TrainedTable& table, const TrainedBatch& batch, int64_t begin, int64_t end, float* out) {
  constexpr int N = WIDTH < SUM_LANES ? WIDTH : SUM_LANES, PARTS = WIDTH / N;
  const BatchRows rows(table, batch, end);
  rows.fetch_first(begin);
  int64_t p = rows.offset(begin);
  for (int64_t bag = begin; bag < end; ++bag) {
    const int64_t from = p, to = rows.offset(bag + 1);
    typename Lanes<N>::Vector sums[PARTS];
    UNROLL
    for (int q = 0; q < PARTS; ++q) sums[q] = typename Lanes<N>::Vector{};
    for (; p < to; ++p) {
      if (__builtin_expect(rows.is_wrong(p), false)) return p;
      rows.fetch(p + ROWS_AHEAD);
      const uint8_t* row = rows.at(p);
      const float factor = rows.batch.weights ? rows.scale(row) * rows.batch.weights[p] : rows.scale(row);
      UNROLL
      for (int q = 0; q < PARTS; ++q) sums[q] += factor * numbers<N, BITS>(row + q * N * BITS / 8);
    }
    const float share = rows.share(from, to);
    UNROLL
    for (int q = 0; q < PARTS; ++q) store<N>(out + bag * WIDTH + q * N, sums[q] * share);
  }
  return -1;
}

// Rows of any width.
template <int BITS>
int64_t sum_any_rows(const TrainedTable& table, const TrainedBatch& batch, int64_t begin, int64_t end, float* out) {
  const BatchRows rows(table, batch, end);
  const int width = table.width;
  rows.fetch_first(begin);
  int64_t p = rows.offset(begin);
  for (int64_t bag = begin; bag < end; ++bag) {
    const int64_t from = p, to = rows.offset(bag + 1);
    float* sums = out + bag * width;
    for (int j = 0; j < width; ++j) sums[j] = 0;
    for (; p < to; ++p) {
      if (__builtin_expect(rows.is_wrong(p), false)) return p;
      rows.fetch(p + ROWS_AHEAD);
      const uint8_t* row = rows.at(p);
      const float factor = rows.batch.weights ? rows.scale(row) * rows.batch.weights[p] : rows.scale(row);
      for (int j = 0; j < width; ++j) sums[j] += factor * number<BITS>(row, j);
    }
    const float share = rows.share(from, to);
    for (int j = 0; j < width; ++j) sums[j] *= share;
  }
  return -1;
}

template <int BITS>
int64_t forward_bits(const TrainedTable& table, const TrainedBatch& batch, int64_t begin, int64_t end, float* out) {
  switch (table.width) {
    case 8: return sum_rows<8, BITS>(table, batch, begin, end, out);
    case 16: return sum_rows<16, BITS>(table, batch, begin, end, out);
    case 32: return sum_rows<32, BITS>(table, batch, begin, end, out);
    case 64: return sum_rows<64, BITS>(table, batch, begin, end, out);
    case 128: return sum_rows<128, BITS>(table, batch, begin, end, out);
  }
  return sum_any_rows<BITS>(table, batch, begin, end, out);
}

int64_t forward(const TrainedTable& table, const TrainedBatch& batch, int64_t begin, int64_t end, float* out) {
  if (begin == end) return -1;
  return table.bits == 8 ? forward_bits<8>(table, batch, begin, end, out)
                         : forward_bits<4>(table, batch, begin, end, out);
}

template <int BITS>
void weight_gradients_bits(const TrainedTable& table, const TrainedBatch& batch, const TrainedGrads& grads,
                           int64_t begin, int64_t end, float* out) {
  const BatchRows rows(table, batch, end);
  const int width = table.width;
  rows.fetch_first(begin);
  int64_t p = rows.offset(begin);
  for (int64_t bag = begin; bag < end; ++bag) {
    const int64_t from = p, to = rows.offset(bag + 1);
    const float* grad = grads.grads + bag * grads.step;
    for (; p < to; ++p) {
      rows.fetch(p + ROWS_AHEAD);
      const uint8_t* row = rows.at(p);
      float lanes[16] = {};
      int j = 0;
      for (; j + 16 <= width; j += 16)
        for (int k = 0; k < 16; ++k) lanes[k] += number<BITS>(row, j + k) * grad[j + k];
      for (int k = 0; j + k < width; ++k) lanes[k] += number<BITS>(row, j + k) * grad[j + k];
      out[p] = sum_of_lanes(lanes) * rows.scale(row) * rows.share(from, to);
    }
  }
}

void weight_gradients(const TrainedTable& table, const TrainedBatch& batch, const TrainedGrads& grads, int64_t begin,
                      int64_t end, float* out) {
  if (begin == end) return;
  table.bits == 8 ? weight_gradients_bits<8>(table, batch, grads, begin, end, out)
                  : weight_gradients_bits<4>(table, batch, grads, begin, end, out);
}

}  // namespace

extern const TrainedKernels TRAINED;
const TrainedKernels TRAINED = {forward, weight_gradients, update};

}  // namespace torchrec_compress
