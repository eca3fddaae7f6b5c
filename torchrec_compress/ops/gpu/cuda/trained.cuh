// What the kernels of trained rows share: the codes that rows and states are made of, as ops/trained.py says; behind
// base.cuh. All sums are made in the order of the CPU's kernels, and the compiler fuses no product into a sum
// (ops/gpu/program.py), so the bits are theirs.
//
// The prelude defines
//   ROW_WIDTH, BITS  numbers of a row, and bits of a number
//   LANES        threads that share a row, a power of 2 up to 16; lane j has the columns j, j + LANES, ...
//   GROUPS       rows, or bags, of a block
// and the types ID and OFFSET for a look-up, OPTIMIZER and STATE_BITS for an update.

constexpr int WIDTH = ROW_WIDTH, ROW_BYTES = WIDTH * BITS / 8 + 1, LARGEST = (1 << (BITS - 1)) - 1;
constexpr unsigned INFINITE = 0x7f800000u;

__device__ inline unsigned bits_of(float value) {
  Bits bits;
  bits.value = value;
  return bits.bits & 0x7fffffffu;
}

__device__ inline float float_of(unsigned bits) {
  Bits found;
  found.bits = bits;
  return found.value;
}

// A float in a byte: code 0 is 0, code c is the float of bits (c + BASE) << SHIFT.
template <int SHIFT, int BASE>
struct SmallFloat {
  static constexpr unsigned CUT = (1u << SHIFT) - 1;

  __device__ static float decode(unsigned code) { return float_of(code ? (code + BASE) << SHIFT : 0u); }

  __device__ static int round_up(float value) {
    const int code = int((bits_of(value) + CUT) >> SHIFT) - BASE;
    return code < 1 ? 1 : code;
  }

  // To one of the two next floats, by 32 bits of chance.
  __device__ static int round_by(unsigned random, float value) {
    const float smallest = float_of(unsigned(1 + BASE) << SHIFT);
    const int wide = int((bits_of(value) + (random & CUT)) >> SHIFT) - BASE;
    const int narrow = float(int(random >> 8)) * (smallest * 5.9604644775390625e-8f) < value;  // 2^-24
    return value >= smallest ? wide : narrow;
  }
};

using Scale = SmallFloat<20, (127 - 25) * 8>;
using RowState = SmallFloat<21, (127 - 40) * 4>;
using Share = SmallFloat<20, 127 * 8 - 255>;
using SignedShare = SmallFloat<20, 127 * 8 - 127>;
using RowMoment = SmallFloat<21, (127 - 52) * 4>;

__device__ inline int lane() { return int(threadIdx.x % LANES); }
__device__ inline int64 group() { return int64(blockIdx.x) * GROUPS + threadIdx.x / LANES; }

// Number `column` of a row; of 4 bits two lie in a byte.
__device__ inline int number(const unsigned char* row, int column) {
  if (BITS == 8) return (signed char)(row[column]);
  return ((row[column >> 1] >> (column & 1) * 4 & 15) ^ 8) - 8;
}

__device__ inline float scale_of(const unsigned char* row) { return Scale::decode(row[ROW_BYTES - 1]); }

// The sum over the lanes of a group, in halves; all lanes of a warp must ask.
__device__ inline float sum_of_lanes(float value) {
#pragma unroll
  for (int half = LANES / 2; half; half /= 2) value += __shfl_xor_sync(ALL, value, half);
  return value;
}

__device__ inline unsigned largest_of_lanes(unsigned value) {
#pragma unroll
  for (int half = LANES / 2; half; half /= 2) {
    const unsigned other = __shfl_xor_sync(ALL, value, half);
    value = other > value ? other : value;
  }
  return value;
}
