// The update of trained rows, compiled once per instruction set: gradients of a row summed, its state and its numbers
// read, stepped, rounded and written, all while they are in the cache.
#pragma once
#include "trained_codes.h"

namespace torchrec_compress {
namespace {

constexpr int64_t UPDATES_AHEAD = 8, GRADS_AHEAD = 4;  // rows, and gradients, that are on their way from memory

inline int64_t read_number(const void* numbers, int bytes, int64_t i) {
  return bytes == 8 ? static_cast<const int64_t*>(numbers)[i] : static_cast<const int32_t*>(numbers)[i];
}

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

// Loops over the numbers of a row. WIDTH 0 is any width. What is written is told apart from what is read, or the
// compiler would not vectorise them.
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

  static inline void decode_shares(float* __restrict sums, const uint8_t* __restrict codes, float largest, int any) {
    for (int j = 0; j < of(any); ++j) sums[j] = Share::decode(codes[j]) * largest;
  }

  static inline void round_shares(uint8_t* __restrict codes, const float* __restrict sums, float largest,
                                  uint32_t random, int any) {
    for (int j = 0; j < of(any); ++j) codes[j] = uint8_t(Share::round_by(spread(random, j), sums[j] / largest));
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

// Copies of a few bytes, without a call.
inline void copy_bytes(uint8_t* to, const uint8_t* from, int64_t bytes) {
  switch (bytes) {
    case 0: return;
    case 1: *to = *from; return;
    case 4: __builtin_memcpy(to, from, 4); return;
  }
  __builtin_memcpy(to, from, bytes);
}

inline void fetch_all(const void* from, int64_t bytes) {
  const char* at = static_cast<const char*>(from);
  if (bytes <= 0) return;
  for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(at + j);
  __builtin_prefetch(at + bytes - 1);
}

// One row while it is updated. WIDTH 0 is any width.
template <int WIDTH, int BITS>
class Row {
 public:
  Row(const TrainedTable& table, const TrainedUpdate& update, float* scratch)
      : table_(table), update_(update), any_width_(table.width) {
    const int64_t floats = trained_floats(table);
    grads_ = scratch;
    values_ = scratch + floats;
    sums_ = scratch + 2 * floats;
    new_row_ = reinterpret_cast<uint8_t*>(scratch + 3 * floats);
    new_state_ = reinterpret_cast<uint8_t*>(scratch + 4 * floats);
    numbers_ = reinterpret_cast<uint8_t*>(scratch + 5 * floats);
  }

  inline TrainedFault::Kind step(int64_t number) {
    const uint32_t first = update_.starts[number], last = update_.starts[number + 1];
    const int64_t id = int64_t(update_.keys[first] >> 32);
    uint8_t* row = table_.rows + id * table_.row_bytes;
    uint8_t* state = table_.state + id * table_.state_bytes;
    uint8_t* undo = update_.undo + number * (table_.row_bytes + table_.state_bytes);
    __builtin_memcpy(undo, row, row_bytes());
    copy_bytes(undo + row_bytes(), state, table_.state_bytes);
    sum_grads(first, last);
    const uint32_t largest = largest_bits(grads_, width());
    if (largest >= INFINITE) return TrainedFault::GRADIENT;
    if (largest == 0) return TrainedFault::NOTHING;  // rounded anew, it would move all the same
    const uint64_t random = draw(update_.seed, uint64_t(update_.first_id + id));
    const float scale = Scale::decode(row[row_bytes() - 1]);
    Loop::template decode<BITS>(values_, row, scale, width());
    if (!step_state(state, uint32_t(random >> 32))) return TrainedFault::STATE;
    if (!round_row(uint32_t(random))) return TrainedFault::VALUES;
    __builtin_memcpy(row, new_row_, row_bytes());
    copy_bytes(state, new_state_, table_.state_bytes);
    return TrainedFault::NOTHING;
  }

 private:
  using Loop = Loops<WIDTH>;
  static constexpr int LARGEST = (1 << (BITS - 1)) - 1;
  const TrainedTable table_;
  const TrainedUpdate update_;
  const int any_width_;
  float *grads_, *values_, *sums_;
  uint8_t *new_row_, *new_state_, *numbers_;

  inline int width() const { return WIDTH ? WIDTH : any_width_; }
  inline int64_t row_bytes() const { return width() * BITS / 8 + 1; }

  inline int64_t bag_of(uint32_t payload) const { return update_.bags ? update_.bags[payload] : payload; }

  inline const float* grad_of(uint32_t key, float* factor) const {
    const uint32_t payload = uint32_t(update_.keys[key]);
    const int64_t bag = bag_of(payload);
    const float weight = update_.weights ? update_.weights[payload] : 1.0f;
    *factor = update_.shares ? weight * update_.shares[bag] : weight;
    return update_.grads.grads + bag * update_.grads.step;
  }

  inline void fetch_grad(uint32_t key) const {
    fetch_all(update_.grads.grads + bag_of(uint32_t(update_.keys[key])) * update_.grads.step, width() * 4);
  }

  inline void sum_grads(uint32_t first, uint32_t last) {
    const uint32_t end = update_.starts[update_.num_distinct] - 1;
    if constexpr (WIDTH != 0) {
      constexpr int N = Loop::N, PARTS = Loop::PARTS;
      typename Lanes<N>::Vector sums[PARTS];
#pragma GCC unroll 16
      for (int q = 0; q < PARTS; ++q) sums[q] = typename Lanes<N>::Vector{};
      for (uint32_t key = first; key < last; ++key) {
        fetch_grad(key + GRADS_AHEAD < end ? key + GRADS_AHEAD : end);
        float factor;
        const float* grad = grad_of(key, &factor);
#pragma GCC unroll 16
        for (int q = 0; q < PARTS; ++q) sums[q] += factor * load<N>(grad + q * N);
      }
#pragma GCC unroll 16
      for (int q = 0; q < PARTS; ++q) store<N>(grads_ + q * N, sums[q]);
    } else {
      for (int j = 0; j < width(); ++j) grads_[j] = 0;
      for (uint32_t key = first; key < last; ++key) {
        fetch_grad(key + GRADS_AHEAD < end ? key + GRADS_AHEAD : end);
        float factor;
        const float* grad = grad_of(key, &factor);
        for (int j = 0; j < width(); ++j) grads_[j] += factor * grad[j];
      }
    }
  }

  // Steps values, and writes the new state; false where its bits do not hold it.
  inline bool step_state(const uint8_t* state, uint32_t random) {
    switch (table_.optimizer) {
      case Optimizer::SGD: return step_values(update_.learning_rate), true;
      case Optimizer::ROW_WISE_ADAGRAD: return step_row_wise(state, random);
      case Optimizer::ADAGRAD: break;
    }
    return table_.state_bits == 32 ? step_each(state) : step_each_share(state, random);
  }

  inline void step_values(float factor) { Loop::step(values_, grads_, factor, width()); }

  inline float factor(float sum) const { return update_.learning_rate / (__builtin_sqrtf(sum) + update_.eps); }

  inline bool step_row_wise(const uint8_t* state, uint32_t random) {
    float sum;
    if (table_.state_bits == 32)
      __builtin_memcpy(&sum, state, 4);
    else
      sum = RowState::decode(*state);
    sum += Loop::sum_of_squares(grads_, width()) / float(width());
    step_values(factor(sum));
    if (table_.state_bits == 32) {
      __builtin_memcpy(new_state_, &sum, 4);
      return bits_of(sum) < INFINITE;
    }
    const int code = RowState::round_by(spread(random, 0), sum);
    *new_state_ = uint8_t(code);
    return code <= 255;
  }

  inline uint32_t step_sums() {
    Loop::step_each(values_, sums_, grads_, update_.learning_rate, update_.eps, width());
    return largest_bits(sums_, width());
  }

  inline bool step_each(const uint8_t* state) {
    __builtin_memcpy(sums_, state, 4 * width());
    const uint32_t largest = step_sums();
    __builtin_memcpy(new_state_, sums_, 4 * width());
    return largest < INFINITE;
  }

  inline bool step_each_share(const uint8_t* state, uint32_t random) {
    const float before = float_of(uint32_t(state[0] | state[1] << 8) << 16);
    Loop::decode_shares(sums_, state + 2, before, width());
    const uint32_t upper = (step_sums() + 0xFFFF) >> 16;
    const float scale = upper ? float_of(upper << 16) : 1.0f;
    new_state_[0] = uint8_t(upper);
    new_state_[1] = uint8_t(upper >> 8);
    Loop::round_shares(new_state_ + 2, sums_, scale, random, width());
    return upper < INFINITE >> 16;
  }

  // Rounds the values; false where no scale is large enough.
  inline bool round_row(uint32_t random) {
    const int code = Scale::round_up(float_of(largest_bits(values_, width())) / float(LARGEST));
    if (code > 255) return false;
    const float inverse = 1.0f / Scale::decode(uint32_t(code));
    Loop::template round<LARGEST>(BITS == 8 ? new_row_ : numbers_, values_, inverse, random, width());
    if (BITS == 4) Loop::pack(new_row_, numbers_, width());
    new_row_[row_bytes() - 1] = uint8_t(code);
    return true;
  }
};

template <int WIDTH, int BITS>
TrainedFault update_rows(const TrainedTable& table, const TrainedUpdate& update, int64_t begin, int64_t end,
                         float* scratch) {
  Row<WIDTH, BITS> row(table, update, scratch);
  TrainedFault first = {TrainedFault::NOTHING, 0};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t ahead = i + UPDATES_AHEAD < end ? i + UPDATES_AHEAD : end - 1;
    const int64_t id = int64_t(update.keys[update.starts[ahead]] >> 32);
    fetch_all(table.rows + id * table.row_bytes, table.row_bytes);
    fetch_all(table.state + id * table.state_bytes, table.state_bytes);
    const TrainedFault::Kind kind = row.step(i);
    if (__builtin_expect(kind < first.kind, false)) first = {kind, i};
  }
  return first;
}

template <int BITS>
TrainedFault update_bits(const TrainedTable& table, const TrainedUpdate& update, int64_t begin, int64_t end,
                         float* scratch) {
  switch (table.width) {
    case 8: return update_rows<8, BITS>(table, update, begin, end, scratch);
    case 16: return update_rows<16, BITS>(table, update, begin, end, scratch);
    case 32: return update_rows<32, BITS>(table, update, begin, end, scratch);
    case 64: return update_rows<64, BITS>(table, update, begin, end, scratch);
    case 128: return update_rows<128, BITS>(table, update, begin, end, scratch);
  }
  return update_rows<0, BITS>(table, update, begin, end, scratch);
}

TrainedFault update(const TrainedTable& table, const TrainedUpdate& update, int64_t begin, int64_t end,
                    float* scratch) {
  return table.bits == 8 ? update_bits<8>(table, update, begin, end, scratch)
                         : update_bits<4>(table, update, begin, end, scratch);
}

}  // namespace
}  // namespace torchrec_compress
