// The update of trained rows, in two launches: a group of lanes takes a distinct id, sums its gradients in the order of
// the batch, steps, and rounds into memory beside the table; only where no id was at fault are rows and states written.

enum Optimizer { SGD, ROW_WISE_ADAGRAD, ADAGRAD, ADAM, PARTIAL_ROW_WISE_ADAM };

// Why an id cannot be updated. The first of a kind, and of all kinds the first, is told: kind << FAULT_SHIFT | number.
enum Fault { GRADIENT, STATE, VALUES, NOTHING };
constexpr int FAULT_SHIFT = 60;

constexpr int PASSES = (WIDTH + LANES - 1) / LANES;
// columns of a lane that are kept in registers; wider rows go through memory, and their program stays small
constexpr int UNROLLED = PASSES > 16 ? 4 : PASSES;
constexpr bool IS_ADAM = OPTIMIZER == ADAM || OPTIMIZER == PARTIAL_ROW_WISE_ADAM;
// of one value of state a row, and of one a number, which with 8 bits follow two bytes of their largest
constexpr int BYTES_OF_ROW = STATE_BITS / 8, BYTES_OF_NUMBERS = STATE_BITS == 8 ? WIDTH + 2 : 4 * WIDTH;
constexpr int STATE_BYTES = OPTIMIZER == SGD                ? 0
                            : OPTIMIZER == ROW_WISE_ADAGRAD ? BYTES_OF_ROW
                            : OPTIMIZER == ADAGRAD          ? BYTES_OF_NUMBERS
                            : OPTIMIZER == ADAM             ? 2 * BYTES_OF_NUMBERS
                                                            : BYTES_OF_NUMBERS + BYTES_OF_ROW;
// gradients that are read before the first is added
constexpr int AHEAD = PASSES > 4 ? 4 : 8;

// Filled by ops/gpu/trained_kernels.py, field by field.
struct Update {
  unsigned char* rows;       // [N, ROW_BYTES]
  unsigned char* state;      // [N, STATE_BYTES]
  const int64* ids;          // [U] distinct, ascending
  const int64* starts;       // [U + 1] where the gradients of an id begin
  const int64* bags;         // [L] bag of a gradient
  const float* factors;      // [L] of gradients, or null
  const float* grads;        // [B, WIDTH] of bags, grad_step floats apart
  unsigned char* new_rows;   // [U, ROW_BYTES]
  unsigned char* new_state;  // [U, STATE_BYTES]
  uint64* fault;             // [1]
  int64 grad_step, num_rows, num_distinct, first_id;
  uint64 seed, step;
  // Adam's: of the moment before, and of the gradient; and what the second moment is multiplied by
  float rate, eps, beta1, rest1, beta2, rest2, correction, unused;
};

// 64 well-mixed bits of a start and a number: the finaliser of splitmix64 (Steele, Lea, Flood 2014).
__device__ inline uint64 draw(uint64 start, uint64 number) {
  uint64 x = start + (number + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// 32 bits for the number `index` of a row (Wellons, "lowbias32").
__device__ inline unsigned spread(unsigned start, int index) {
  unsigned x = start + unsigned(index + 1) * 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Lanes of a warp take the steps below together, also those of an id that is not updated; they write nothing then.
struct Row {
  const Update& t;
  const unsigned char* state;
  unsigned char* new_row;
  unsigned char* new_state;
  bool writes;
  float grads[PASSES], values[PASSES], sums[PASSES], moments[PASSES];

  __device__ static int column(int q) { return q * LANES + lane(); }
  __device__ static bool is_column(int q) { return WIDTH % LANES == 0 || column(q) < WIDTH; }
  __device__ bool writes_row() const { return writes && lane() == 0; }

  __device__ static unsigned largest(const float* values) {
    unsigned found = 0;
#pragma unroll UNROLLED
    for (int q = 0; q < PASSES; ++q) found = bits_of(values[q]) > found ? bits_of(values[q]) : found;
    return largest_of_lanes(found);
  }

  // ---- gradients

  template <int N>
  __device__ void add_grads(int64 p) {
    float factors[N], found[N][PASSES];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const float* grad = t.grads + t.bags[p + u] * t.grad_step;
      factors[u] = t.factors ? t.factors[p + u] : 1.0f;
#pragma unroll UNROLLED
      for (int q = 0; q < PASSES; ++q) found[u][q] = is_column(q) ? grad[column(q)] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < N; ++u)
#pragma unroll UNROLLED
      for (int q = 0; q < PASSES; ++q) grads[q] += factors[u] * found[u][q];
  }

  __device__ void sum_grads(int64 p, int64 last) {
#pragma unroll UNROLLED
    for (int q = 0; q < PASSES; ++q) grads[q] = 0.0f;
    for (; p + AHEAD <= last; p += AHEAD) add_grads<AHEAD>(p);
    for (; p < last; ++p) add_grads<1>(p);
  }

  __device__ float mean_of_squares() const {
    float sum = 0.0f;
#pragma unroll UNROLLED
    for (int q = 0; q < PASSES; ++q) sum += grads[q] * grads[q];
    return sum_of_lanes(sum) / float(WIDTH);
  }

  // ---- states; what writes them returns whether their bits hold them

  template <typename Small>
  __device__ static float read_of_row(const unsigned char* state) {
    return STATE_BITS == 8 ? Small::decode(*state) : *reinterpret_cast<const float*>(state);
  }

  // Of a code of at least `least`.
  template <typename Small>
  __device__ bool write_of_row(unsigned char* state, float sum, unsigned random, int least) const {
    if (STATE_BITS == 32) {
      if (writes_row()) *reinterpret_cast<float*>(state) = sum;
      return bits_of(sum) < INFINITE;
    }
    const int code = Small::round_by(random, sum);
    if (writes_row()) *state = (unsigned char)(code < least ? least : code);
    return code <= 255;
  }

  // The largest value of a row is stored as the upper half of its bits, rounded up.
  __device__ static float read_largest(const unsigned char* state) {
    return float_of(unsigned(state[0] | state[1] << 8) << 16);
  }

  __device__ static float decode_number(const unsigned char* state, int column, float largest, bool is_signed) {
    const unsigned code = state[2 + column];
    if (!is_signed) return Share::decode(code) * largest;
    const float size = SignedShare::decode(code & 127) * largest;
    return code > 127 ? -size : size;
  }

  // `is_signed`: of either sign, the first moment.
  __device__ static void read_of_numbers(const unsigned char* state, float* values, bool is_signed) {
    const float largest = STATE_BITS == 8 ? read_largest(state) : 0.0f;
#pragma unroll UNROLLED
    for (int q = 0; q < PASSES; ++q) {
      values[q] = 0.0f;
      if (!is_column(q)) continue;
      values[q] = STATE_BITS == 8 ? decode_number(state, column(q), largest, is_signed)
                                  : reinterpret_cast<const float*>(state)[column(q)];
    }
  }

  __device__ static int code_of(float value, float largest, unsigned random, bool is_signed, int least) {
    if (is_signed) {
      const int code = SignedShare::round_by(random, (value < 0 ? -value : value) / largest);
      return value < 0 ? code + 128 : code;
    }
    const int code = Share::round_by(random, value / largest);
    return code < least ? least : code;
  }

  // `first` is the number that the first of them has among the state's.
  __device__ bool write_of_numbers(unsigned char* state, const float* values, unsigned random, int first,
                                   bool is_signed, int least) const {
    const unsigned bits = largest(values), upper = (bits + 0xffffu) >> 16;
    const float scale = upper ? float_of(upper << 16) : 1.0f;
#pragma unroll UNROLLED
    for (int q = 0; q < PASSES; ++q) {
      if (!writes || !is_column(q)) continue;
      if (STATE_BITS == 32)
        reinterpret_cast<float*>(state)[column(q)] = values[q];
      else
        state[2 + column(q)] =
            (unsigned char)(code_of(values[q], scale, spread(random, first + column(q)), is_signed, least));
    }
    if (STATE_BITS == 32) return bits < INFINITE;
    if (writes_row()) {
      state[0] = (unsigned char)(upper);
      state[1] = (unsigned char)(upper >> 8);
    }
    return upper < INFINITE >> 16;
  }

  // ---- optimizers

  __device__ float factor(float sum) const { return t.rate / (sqrtf(sum) + t.eps); }

  __device__ void step(const float* moved, float factor) {
#pragma unroll UNROLLED
    for (int q = 0; q < PASSES; ++q) values[q] -= factor * moved[q];
  }

  __device__ bool step_row_wise(unsigned random) {
    const float sum = read_of_row<RowState>(state) + mean_of_squares();
    step(grads, factor(sum));
    return write_of_row<RowState>(new_state, sum, spread(random, 0), 0);
  }

  __device__ bool step_each(unsigned random) {
    read_of_numbers(state, sums, false);
#pragma unroll UNROLLED
    for (int q = 0; q < PASSES; ++q) {
      sums[q] += grads[q] * grads[q];
      values[q] -= factor(sums[q]) * grads[q];
    }
    return write_of_numbers(new_state, sums, random, 0, false, 0);
  }

  __device__ bool step_adam(unsigned random) {
    const unsigned char* second = state + BYTES_OF_NUMBERS;
    unsigned char* new_second = new_state + BYTES_OF_NUMBERS;
    read_of_numbers(state, moments, true);
#pragma unroll UNROLLED
    for (int q = 0; q < PASSES; ++q) moments[q] = t.beta1 * moments[q] + t.rest1 * grads[q];
    const bool holds = write_of_numbers(new_state, moments, random, 0, true, 0);
    // a second moment that was rounded to zero below a first one that was not would be a step without bounds
    if (OPTIMIZER == PARTIAL_ROW_WISE_ADAM) {
      const float sum = t.beta2 * read_of_row<RowMoment>(second) + t.rest2 * mean_of_squares();
      step(moments, factor(sum * t.correction));
      return write_of_row<RowMoment>(new_second, sum, spread(random, WIDTH), 1) && holds;
    }
    read_of_numbers(second, sums, false);
#pragma unroll UNROLLED
    for (int q = 0; q < PASSES; ++q) {
      sums[q] = t.beta2 * sums[q] + t.rest2 * (grads[q] * grads[q]);
      values[q] -= factor(sums[q] * t.correction) * moments[q];
    }
    return write_of_numbers(new_second, sums, random, WIDTH, false, 1) && holds;
  }

  __device__ bool step_state(unsigned random) {
    if (OPTIMIZER == ROW_WISE_ADAGRAD) return step_row_wise(random);
    if (OPTIMIZER == ADAGRAD) return step_each(random);
    if (IS_ADAM) return step_adam(random);
    step(grads, t.rate);
    return true;
  }

  // ---- numbers

  __device__ void read_row(const unsigned char* row) {
    const float scale = scale_of(row);
#pragma unroll UNROLLED
    for (int q = 0; q < PASSES; ++q) values[q] = is_column(q) ? float(number(row, column(q))) * scale : 0.0f;
  }

  __device__ static int round(float value, float inverse, unsigned random) {
    const float dither = float(int((random >> 16) * 2 + 1)) * 7.62939453125e-6f;  // 2^-17
    const float moved = value * inverse + dither;
    int number = int(moved);
    number -= float(number) > moved;
    return number > LARGEST ? LARGEST : number < -LARGEST ? -LARGEST : number;
  }

  // Rounds the values; false where no scale is large enough.
  __device__ bool round_row(unsigned random) {
    const int code = Scale::round_up(float_of(largest(values)) / float(LARGEST));
    const bool holds = code <= 255;
    const float inverse = 1.0f / Scale::decode(unsigned(code));
#pragma unroll UNROLLED
    for (int q = 0; q < PASSES; ++q) {
      const int mine = holds ? round(values[q], inverse, spread(random, column(q))) : 0;
      const int next = BITS == 4 ? __shfl_xor_sync(ALL, mine, 1) : 0;  // the other number of the byte
      if (!writes || !is_column(q)) continue;
      if (BITS == 8)
        new_row[column(q)] = (unsigned char)(mine);
      else if (column(q) % 2 == 0)
        new_row[column(q) / 2] = (unsigned char)((mine & 15) | next << 4);
    }
    if (writes_row()) new_row[ROW_BYTES - 1] = (unsigned char)(code);
    return holds;
  }
};

#if STATE_BITS == 32
using StateWord = unsigned;
#else
using StateWord = unsigned char;
#endif

template <typename Word>
__device__ inline void copy_lanes(unsigned char* to, const unsigned char* from, int bytes) {
#pragma unroll 4
  for (int i = lane(); i < bytes / int(sizeof(Word)); i += LANES)
    reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(from)[i];
}

__device__ inline void copy_row(unsigned char* to, const unsigned char* from) {
  copy_lanes<unsigned char>(to, from, ROW_BYTES);
}

__device__ inline void copy_state(unsigned char* to, const unsigned char* from) {
  copy_lanes<StateWord>(to, from, STATE_BYTES);
}

// Writes what rows and states become beside the table, and the fault. Grid: (blocks of GROUPS distinct ids),
// GROUPS * LANES threads.
extern "C" __global__ void __launch_bounds__(GROUPS * LANES) trained_bag_step(const Update t) {
  const int64 number = group();
  const bool is_row = number < t.num_distinct;
  const int64 id = is_row ? t.ids[number] : 0;
  check(id >= 0 && id < t.num_rows, "trained_bag: every id must be a row of the table");
  const unsigned char* old_row = t.rows + id * ROW_BYTES;
  Row row{t, t.state + id * STATE_BYTES, t.new_rows + number * ROW_BYTES, t.new_state + number * STATE_BYTES};
  row.sum_grads(is_row ? t.starts[number] : 0, is_row ? t.starts[number + 1] : 0);
  const unsigned largest = Row::largest(row.grads);
  const bool is_finite = largest < INFINITE, moves = largest > 0 && is_finite;
#pragma unroll UNROLLED
  for (int q = 0; q < PASSES; ++q) row.grads[q] = is_finite ? row.grads[q] : 0.0f;
  row.writes = moves;  // threads without an id have no gradients
  row.read_row(old_row);
  const uint64 random = draw(draw(draw(0, t.seed), t.step), uint64(t.first_id + id));
  const bool holds_state = row.step_state(unsigned(random >> 32)), holds_row = row.round_row(unsigned(random));
  const Fault fault = !is_finite ? GRADIENT : !moves ? NOTHING : !holds_state ? STATE : !holds_row ? VALUES : NOTHING;
  if (fault != NOTHING && lane() == 0) atomicMin(t.fault, uint64(fault) << FAULT_SHIFT | uint64(number));
  if (!is_row || moves) return;
  // rounded anew, it would move all the same
  copy_row(row.new_row, old_row);
  copy_state(row.new_state, row.state);
}

// Writes them into the table. Grid: as above.
extern "C" __global__ void __launch_bounds__(GROUPS * LANES) trained_bag_write(const Update t) {
  const int64 number = group();
  if (number >= t.num_distinct) return;
  const int64 id = t.ids[number];
  copy_row(t.rows + id * ROW_BYTES, t.new_rows + number * ROW_BYTES);
  copy_state(t.state + id * STATE_BYTES, t.new_state + number * STATE_BYTES);
}
