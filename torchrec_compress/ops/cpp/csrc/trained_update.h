// The update of trained rows, compiled once per instruction set: gradients of a row summed, its state and its numbers
// read, stepped, rounded and written, all while they are in the cache.
#pragma once
#include "trained_loops.h"

namespace torchrec_compress {
namespace {

constexpr int64_t UPDATES_AHEAD = 8, GRADS_AHEAD = 4;  // rows, and gradients, that are on their way from memory

inline int64_t read_number(const void* numbers, int bytes, int64_t i) {
  return bytes == 8 ? static_cast<const int64_t*>(numbers)[i] : static_cast<const int32_t*>(numbers)[i];
}

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
    moments_ = scratch + 3 * floats;
    new_row_ = reinterpret_cast<uint8_t*>(scratch + 4 * floats);
    numbers_ = reinterpret_cast<uint8_t*>(scratch + 5 * floats);
    new_state_ = reinterpret_cast<uint8_t*>(scratch + 6 * floats);  // two values a number
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
  float *grads_, *values_, *sums_, *moments_;
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
      case Optimizer::SGD: return Loop::step(values_, grads_, update_.learning_rate, width()), true;
      case Optimizer::ROW_WISE_ADAGRAD: return step_row_wise(state, random);
      case Optimizer::ADAGRAD: return step_each(state, random);
      default: return step_adam(state, random);
    }
  }

  inline float factor(float sum) const { return update_.learning_rate / (__builtin_sqrtf(sum) + update_.eps); }
  inline float mean_of_squares() const { return Loop::sum_of_squares(grads_, width()) / float(width()); }

  inline bool step_row_wise(const uint8_t* state, uint32_t random) {
    const float sum = read_of_row<RowState>(state) + mean_of_squares();
    Loop::step(values_, grads_, factor(sum), width());
    return write_of_row<RowState>(new_state_, sum, spread(random, 0), 0);
  }

  inline bool step_each(const uint8_t* state, uint32_t random) {
    read_of_numbers(state);
    Loop::step_each(values_, sums_, grads_, update_.learning_rate, update_.eps, width());
    return write_of_numbers<0>(new_state_, random, 0);
  }

  inline bool step_adam(const uint8_t* state, uint32_t random) {
    const int64_t cut = bytes_of_numbers(table_);
    const uint8_t* second = state + cut;
    uint8_t* new_second = new_state_ + cut;
    read_moments(state);
    Loop::step_moments(moments_, grads_, update_.beta1, update_.rest1, width());
    const bool holds = write_moments(new_state_, random);
    // a second moment that was rounded to zero below a first one that was not would be a step without bounds
    if (table_.optimizer == Optimizer::PARTIAL_ROW_WISE_ADAM) {
      const float sum = update_.beta2 * read_of_row<RowMoment>(second) + update_.rest2 * mean_of_squares();
      Loop::step(values_, moments_, factor(sum * update_.correction), width());
      return write_of_row<RowMoment>(new_second, sum, spread(random, width()), 1) && holds;
    }
    read_of_numbers(second);
    Loop::step_squares(sums_, grads_, update_.beta2, update_.rest2, width());
    Loop::step_by_moments(values_, moments_, sums_, update_.learning_rate, update_.correction, update_.eps, width());
    return write_of_numbers<1>(new_second, random, width()) && holds;
  }

  template <typename Small>
  inline float read_of_row(const uint8_t* state) const {
    if (table_.state_bits == 8) return Small::decode(*state);
    float sum;
    __builtin_memcpy(&sum, state, 4);
    return sum;
  }

  // A value of the row, of a code of at least `least`; false where its bits do not hold it. So all that write.
  template <typename Small>
  inline bool write_of_row(uint8_t* state, float sum, uint32_t random, int least) const {
    if (table_.state_bits == 32) {
      __builtin_memcpy(state, &sum, 4);
      return bits_of(sum) < INFINITE;
    }
    const int code = Small::round_by(random, sum);
    *state = uint8_t(code < least ? least : code);
    return code <= 255;
  }

  inline void read_of_numbers(const uint8_t* state) {
    if (table_.state_bits == 32)
      __builtin_memcpy(sums_, state, 4 * width());
    else
      Loop::decode_shares(sums_, state + 2, read_largest(state), width());
  }

  template <int LEAST>
  inline bool write_of_numbers(uint8_t* state, uint32_t random, int first) const {
    const uint32_t largest = largest_bits(sums_, width());
    if (table_.state_bits == 32) {
      __builtin_memcpy(state, sums_, 4 * width());
      return largest < INFINITE;
    }
    const uint32_t upper = write_largest(state, largest);
    Loop::template round_shares<LEAST>(state + 2, sums_, scale_of(upper), random, first, width());
    return upper < INFINITE >> 16;
  }

  inline void read_moments(const uint8_t* state) {
    if (table_.state_bits == 32)
      __builtin_memcpy(moments_, state, 4 * width());
    else
      Loop::decode_signed(moments_, state + 2, read_largest(state), width());
  }

  inline bool write_moments(uint8_t* state, uint32_t random) const {
    const uint32_t largest = largest_bits(moments_, width());
    if (table_.state_bits == 32) {
      __builtin_memcpy(state, moments_, 4 * width());
      return largest < INFINITE;
    }
    const uint32_t upper = write_largest(state, largest);
    Loop::round_signed(state + 2, moments_, scale_of(upper), random, width());
    return upper < INFINITE >> 16;
  }

  // The largest value of a row is stored as the upper half of its bits, rounded up.
  static inline float read_largest(const uint8_t* state) { return float_of(uint32_t(state[0] | state[1] << 8) << 16); }

  static inline uint32_t write_largest(uint8_t* state, uint32_t largest) {
    const uint32_t upper = (largest + 0xFFFF) >> 16;
    state[0] = uint8_t(upper);
    state[1] = uint8_t(upper >> 8);
    return upper;
  }

  static inline float scale_of(uint32_t upper) { return upper ? float_of(upper << 16) : 1.0f; }

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
