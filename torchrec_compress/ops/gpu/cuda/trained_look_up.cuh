// The look-up of trained rows, and the gradient of its weights: a group of lanes sums the rows of a bag in their order.
//
// Rows begin at any byte, so a lane reads one number at a time; those of a group lie side by side. A row of 4 bits is
// read twice, the second time from the cache.

using Id = ID;          // int or long long
using Offset = OFFSET;  // int or long long

// Columns of a block, with a sum each in a register; wider rows are cut, and ids read again for each piece.
constexpr int PASSES = (WIDTH + LANES - 1) / LANES < 8 ? (WIDTH + LANES - 1) / LANES : 8;
// rows that are read before the first is added
constexpr int AHEAD = PASSES > 2 ? 4 : 8;

// Filled by ops/gpu/trained_kernels.py, field by field.
struct Bags {
  const unsigned char* rows;  // [N, ROW_BYTES], row_step bytes apart
  const Id* ids;              // [L]
  const Offset* offsets;      // [B + 1], or null: bag b is id b
  const float* weights;       // [L], or null
  const float* grads;         // [B, WIDTH] of bags, grad_step floats apart
  float* out;                 // [B, WIDTH] bags, or [L] gradients of weights
  int64 row_step, num_rows, num_ids, num_bags, grad_step, is_mean;
};

__device__ inline int64 bag_start(const Bags& t, int64 bag) { return t.offsets ? int64(t.offsets[bag]) : bag; }

struct Range {
  int64 begin, end;
};

__device__ inline Range range_of(const Bags& t, int64 bag) {
  const Range found = {bag_start(t, bag), bag_start(t, bag + 1)};
  check(found.begin >= 0 && found.end >= found.begin && found.end <= t.num_ids && (bag > 0 || found.begin == 0) &&
            (bag < t.num_bags - 1 || found.end == t.num_ids),
        "trained_bag: offsets must not decrease, and must run from 0 to the number of ids");
  return found;
}

__device__ inline float share_of(const Bags& t, Range range) {
  return t.is_mean && range.end - range.begin > 1 ? 1.0f / float(range.end - range.begin) : 1.0f;
}

__device__ inline const unsigned char* row_of(const Bags& t, int64 p) {
  const int64 id = t.ids[p];
  check(id >= 0 && id < t.num_rows, "trained_bag: every id must be a row of the table");
  return t.rows + id * t.row_step;
}

__device__ inline float weight_of(const Bags& t, int64 p) {
  const float weight = t.weights[p];
  check(bits_of(weight) < INFINITE, "trained_bag: weights must be finite");
  return weight;
}

// Adds the rows of N ids to the sums of a lane, whose first column is `first`.
template <int N>
__device__ inline void add_rows(const Bags& t, int64 p, int first, float* sums) {
  const unsigned char* rows[N];
  float factors[N];
  int numbers[N][PASSES];
#pragma unroll
  for (int u = 0; u < N; ++u) rows[u] = row_of(t, p + u);
#pragma unroll
  for (int u = 0; u < N; ++u) {
    factors[u] = t.weights ? scale_of(rows[u]) * weight_of(t, p + u) : scale_of(rows[u]);
#pragma unroll
    for (int q = 0; q < PASSES; ++q) {
      const int column = first + q * LANES;
      numbers[u][q] = column < WIDTH ? number(rows[u], column) : 0;
    }
  }
#pragma unroll
  for (int u = 0; u < N; ++u)
#pragma unroll
    for (int q = 0; q < PASSES; ++q) sums[q] += factors[u] * float(numbers[u][q]);
}

// Pools the rows of bags. Grid: (blocks of GROUPS bags, pieces of PASSES * LANES columns), GROUPS * LANES threads.
extern "C" __global__ void __launch_bounds__(GROUPS * LANES) trained_bag_look_up(const Bags t) {
  const int64 bag = group();
  if (bag >= t.num_bags) return;
  const int first = int(blockIdx.y) * PASSES * LANES + lane();
  const Range range = range_of(t, bag);
  float sums[PASSES];
#pragma unroll
  for (int q = 0; q < PASSES; ++q) sums[q] = 0.0f;
  int64 p = range.begin;
  for (; p + AHEAD <= range.end; p += AHEAD) add_rows<AHEAD>(t, p, first, sums);
  for (; p < range.end; ++p) add_rows<1>(t, p, first, sums);
  const float share = share_of(t, range);
#pragma unroll
  for (int q = 0; q < PASSES; ++q)
    if (first + q * LANES < WIDTH) t.out[bag * WIDTH + first + q * LANES] = sums[q] * share;
}

// Writes the gradient of the weight of every id. Grid: (blocks of GROUPS bags), GROUPS * LANES threads.
extern "C" __global__ void __launch_bounds__(GROUPS * LANES) trained_bag_weight_gradients(const Bags t) {
  const int64 bag = group();
  const Range range = bag < t.num_bags ? range_of(t, bag) : Range{0, 0};
  const float share = share_of(t, range);
  // lanes of a warp add up together, so all its bags take as many turns as the longest
  int64 turns = range.end - range.begin;
#pragma unroll
  for (int half = 16; half >= LANES; half /= 2) {
    const int64 other = __shfl_xor_sync(ALL, turns, half);
    turns = other > turns ? other : turns;
  }
  for (int64 turn = 0; turn < turns; ++turn) {
    const int64 p = range.begin + turn;
    const bool is_id = p < range.end;
    const unsigned char* row = is_id ? row_of(t, p) : nullptr;
    float sum = 0.0f;
#pragma unroll 8
    for (int column = lane(); column < WIDTH; column += LANES)
      if (is_id) sum += float(number(row, column)) * t.grads[bag * t.grad_step + column];
    sum = sum_of_lanes(sum);
    if (is_id && lane() == 0) t.out[p] = sum * scale_of(row) * share;
  }
}
