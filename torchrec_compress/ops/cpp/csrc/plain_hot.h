// As plain.h, of tables with hot rows. Which positions are hot is found out well ahead of the sums, so that their rows
// are on the way from memory by then.
#pragma once
#include "hot.h"
#include "plain.h"

namespace torchrec_compress {
namespace {

// The codes of positions and their hot rows.
class Places {
 public:
  static constexpr int64_t STEP = AT_ONCE;  // positions that are looked at together, while those before are summed

  // Of positions [first, stop). `bytes` of a hot row will be touched, which are `stride` apart from `rows` on.
  Places(const Batch& batch, const Lookup& lookup, int64_t first, int64_t stop, const void* rows, int64_t stride,
         int64_t bytes)
      : lookup_(lookup),
        ids_(lookup.is_gathered ? nullptr : batch.ids),
        id_bytes_(batch.id_bytes),
        next_(first),
        stop_(stop),
        rows_(static_cast<const char*>(rows)),
        stride_(stride),
        bytes_(bytes) {
    if (ids_) fetch_codes(first, first + FETCH_AHEAD < stop ? first + FETCH_AHEAD : stop);
  }

  // Looks at what must be known to sum a STEP of positions from p on; returns the first that is wrong.
  inline Wrong reach(int64_t p) {
    while (next_ < stop_ && next_ < p + STEP) {
      const Wrong wrong = look();
      if (wrong.kind != Wrong::NOTHING) return wrong;
    }
    return {Wrong::NOTHING, 0};
  }

  inline const uint8_t* codes_at(int64_t p) const { return codes_[p & RING_MASK]; }
  // The number of a position's hot row, or -1.
  inline int64_t hot_at(int64_t p) const { return hot_[p & RING_MASK]; }

 private:
  static constexpr int64_t RING = 2 * STEP, RING_MASK = RING - 1;

  inline int64_t row(int64_t p) const { return ids_ ? read(ids_, id_bytes_, p) : p - lookup_.first_row; }
  __attribute__((always_inline)) inline void fetch_codes(int64_t first, int64_t last) const {
    const char* const codes = lookup_.codes;
    const int64_t stride = lookup_.stride;
    for (int64_t p = first; p < last; ++p) __builtin_prefetch(codes + row(p) * stride);
  }

  // Looks at the next positions. Those that are hot are listed first: a branch for each would be a guess.
  __attribute__((noinline)) Wrong look() {
    const Lookup lookup = lookup_;
    const int64_t first = next_, last = first + STEP < stop_ ? first + STEP : stop_, bytes = bytes_;
    int64_t hot[STEP], num_hot = 0;
    Wrong wrong = {Wrong::NOTHING, 0};
    for (int64_t p = first; p < last; ++p) {
      const int64_t found = row(p);
      if (__builtin_expect(ids_ && uint64_t(found) >= uint64_t(lookup.num_rows), false)) {
        wrong = {Wrong::ID, p};
        break;
      }
      const uint8_t* const codes = reinterpret_cast<const uint8_t*>(lookup.codes) + found * lookup.stride;
      codes_[p & RING_MASK] = codes;
      hot_[p & RING_MASK] = -1;
      hot[num_hot] = p;
      num_hot += *codes >= lookup.first_size;
    }
    for (int64_t i = 0; i < num_hot; ++i) {
      const uint8_t* const codes = codes_[hot[i] & RING_MASK];
      int64_t number = codes[0] - lookup.first_size;
      for (int64_t m = 1; m < lookup.num_codes && number < lookup.num_hot; ++m)
        number = number * PLAIN_SIZE + codes[m];
      if (number >= lookup.num_hot) return {Wrong::HOT_ROW, hot[i]};
      hot_[hot[i] & RING_MASK] = number;
      if (bytes) fetch(rows_ + number * stride_, bytes);
    }
    if (ids_) fetch_codes(first + FETCH_AHEAD, last + FETCH_AHEAD < stop_ ? last + FETCH_AHEAD : stop_);
    next_ = last;
    return wrong;
  }

  const Lookup& lookup_;
  const void* ids_;
  int id_bytes_;
  int64_t next_, stop_;
  const char* rows_;
  int64_t stride_, bytes_;
  const uint8_t* codes_[RING];
  int64_t hot_[RING];
};

template <int N, int WIDTH, int CHUNKS, int PARTS, int BITS>
inline void add_hot(typename Lanes<N>::Vector (&sums)[CHUNKS][PARTS], const HotRow<BITS>& row, int64_t column,
                    float weight) {
  UNROLL
  for (int c = 0; c < CHUNKS; ++c)
    UNROLL
    for (int q = 0; q < PARTS; ++q) sums[c][q] += weight * row.template load<N>(column + c * WIDTH + q * N);
}

// As plain_sums.
template <int WIDTH, int CHUNKS>
__attribute__((noinline)) Wrong hot_sums(const Batch& given, const Lookup& lookup, Places& places, int64_t begin,
                                         int64_t end, int64_t m) {
  constexpr int N = WIDTH < SUM_LANES ? WIDTH : SUM_LANES, PARTS = WIDTH / N;
  const Batch batch = given;
  const bool is_mean = lookup.is_mean, is_streamed = lookup.is_streamed;
  const float* const books = lookup.codebooks + m * PLAIN_SIZE * WIDTH;
  char* const saved = lookup.saved ? lookup.saved + m : nullptr;
  const int64_t saved_step = lookup.saved_step, row_step = lookup.row_step;
  const int bits = lookup.hot_bits;
  const char* const hot_rows = lookup.hot_rows;
  const int64_t hot_stride = lookup.hot_stride;
  float* out = lookup.out + (begin - lookup.first_bag) * row_step + m * WIDTH;
  int64_t p = offset(batch, begin), reached = p;
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
      if (p == reached) {
        const Wrong wrong = places.reach(p);
        if (wrong.kind != Wrong::NOTHING) return wrong;
        reached += Places::STEP;
      }
      const uint8_t* codes = places.codes_at(p) + m;
      if (saved) __builtin_memcpy(saved + p * saved_step, codes, CHUNKS);
      const int64_t number = places.hot_at(p);
      if (number < 0) {
        UNROLL
        for (int c = 0; c < CHUNKS; ++c) {
          const float* word = books + (c * PLAIN_SIZE + codes[c]) * WIDTH;
          UNROLL
          for (int q = 0; q < PARTS; ++q) sums[c][q] += *weight * load<N>(word + q * N);
        }
        continue;
      }
      const char* hot = hot_rows + number * hot_stride;
      if (bits == 32) {
        add_hot<N, WIDTH>(sums, HotRow<32>(hot), m * WIDTH, *weight);
      } else if (bits == 8) {
        add_hot<N, WIDTH>(sums, HotRow<8>(hot), m * WIDTH, *weight);
      } else {
        add_hot<N, WIDTH>(sums, HotRow<4>(hot), m * WIDTH, *weight);
      }
    }
    UNROLL
    for (int c = 0; c < CHUNKS; ++c)
      UNROLL
      for (int q = 0; q < PARTS; ++q) sums[c][q] *= factors.scale;
    write_sums<N, WIDTH>(out, sums, is_streamed);
  }
  return {Wrong::NOTHING, 0};
}

// As plain_bags. The places are those of all bags, so that looking ahead never ends; those of a long bag are gone from
// the ring when it is walked over again.
template <int WIDTH, int CHUNKS>
Wrong hot_bags(const Batch& batch, const Lookup& lookup, Places& all, int64_t begin, int64_t end, int64_t m) {
  const int64_t first = offset(batch, begin), stop = offset(batch, end);
  for (; m + CHUNKS <= lookup.num_codes; m += CHUNKS) {
    Wrong wrong;
    if (m == 0 || stop - first <= Places::STEP) {
      wrong = hot_sums<WIDTH, CHUNKS>(batch, lookup, all, begin, end, m);
    } else {
      Places again(batch, lookup, first, stop, nullptr, 0, 0);
      wrong = hot_sums<WIDTH, CHUNKS>(batch, lookup, again, begin, end, m);
    }
    if (wrong.kind != Wrong::NOTHING) return wrong;
  }
  if constexpr (CHUNKS > 1) return hot_bags<WIDTH, CHUNKS / 2>(batch, lookup, all, begin, end, m);
  return {Wrong::NOTHING, 0};
}

template <int WIDTH>
Wrong hot_forward(const Batch& batch, const Lookup& lookup, int64_t begin, int64_t end) {
  constexpr int CHUNKS = SUM_REGISTERS / (WIDTH <= SUM_LANES ? 1 : WIDTH / SUM_LANES);
  Places places(batch, lookup, offset(batch, begin), offset(batch, end), lookup.hot_rows, lookup.hot_stride,
                lookup.hot_stride);
  for (int64_t bag = begin; bag < end;) {
    const int64_t stop = lookup.num_codes > CHUNKS ? bags_at_once(batch, bag, end) : end;
    const Wrong wrong = hot_bags<WIDTH, CHUNKS>(batch, lookup, places, bag, stop, 0);
    if (wrong.kind != Wrong::NOTHING) return wrong;
    bag = stop;
  }
  if (lookup.is_streamed) end_streams();
  return {Wrong::NOTHING, 0};
}

// As plain_scatter; hot rows and codebooks are added to where their gradient is wanted.
template <int WIDTH, int CHUNKS>
__attribute__((noinline)) void hot_scatter(const Batch& given, const Lookup& lookup, int64_t m) {
  constexpr int N = WIDTH < LANES ? WIDTH : LANES, PARTS = WIDTH / N;
  const Batch batch = given;
  const bool is_mean = lookup.is_mean;
  const int64_t first = lookup.first_bag, num_bags = lookup.num_bags, row_step = lookup.row_step, dim = lookup.dim;
  float* const books = lookup.grad_codebooks ? lookup.grad_codebooks + m * PLAIN_SIZE * WIDTH : nullptr;
  float* const hot_rows = lookup.grad_hot_rows ? lookup.grad_hot_rows + m * WIDTH : nullptr;
  const float* from = lookup.grad + m * WIDTH;
  int64_t p = offset(batch, first), reached = p;
  Places places(batch, lookup, p, offset(batch, first + num_bags), hot_rows, dim * int64_t(sizeof(float)),
                hot_rows ? CHUNKS * WIDTH * int64_t(sizeof(float)) : 0);
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
      if (p == reached) {
        if (places.reach(p).kind != Wrong::NOTHING) return;  // the forward saw other codes
        reached += Places::STEP;
      }
      const uint8_t* codes = places.codes_at(p) + m;
      const int64_t number = places.hot_at(p);
      if (number >= 0) {
        if (hot_rows == nullptr) continue;
        float* row = hot_rows + number * dim;
        UNROLL
        for (int c = 0; c < CHUNKS; ++c)
          UNROLL
          for (int q = 0; q < PARTS; ++q) add<N>(row + c * WIDTH + q * N, *weight * grad[c][q]);
      } else if (books != nullptr) {
        UNROLL
        for (int c = 0; c < CHUNKS; ++c)
          UNROLL
          for (int q = 0; q < PARTS; ++q)
            add<N>(books + (c * PLAIN_SIZE + codes[c]) * WIDTH + q * N, *weight * grad[c][q]);
      }
    }
  }
}

template <int WIDTH, int CHUNKS>
void hot_backward(const Batch& batch, const Lookup& lookup, int64_t m, int64_t end) {
  for (; m + CHUNKS <= end; m += CHUNKS) hot_scatter<WIDTH, CHUNKS>(batch, lookup, m);
  if constexpr (CHUNKS > 1) hot_backward<WIDTH, CHUNKS / 2>(batch, lookup, m, end);
}

template <int WIDTH>
void hot_backward(const Batch& batch, const Lookup& lookup, int64_t m, int64_t end) {
  if (!lookup.grad_codebooks && !lookup.grad_hot_rows) return;
  hot_backward<WIDTH, 16 * LANES / (WIDTH < LANES ? LANES : WIDTH)>(batch, lookup, m, end);
}

}  // namespace
}  // namespace torchrec_compress
