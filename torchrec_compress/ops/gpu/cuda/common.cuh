// What the kernels of `codebook_bag` for NVIDIA GPUs share; behind base.cuh, and followed by pool.cuh or gradient.cuh.
//
// Letters: B bags, L ids, N rows of codes, M codes per row, K codewords per codebook, WIDTH columns per codeword,
// D columns of the output (M * WIDTH, or WIDTH for residual codes), H hot rows.

// ---- element types

struct Bfloat {
  unsigned short bits;
};

struct Half {
  unsigned short bits;
};

__device__ inline float to_float(float value) { return value; }

__device__ inline float to_float(Bfloat value) {
  Bits bits;
  bits.bits = (unsigned int)(value.bits) << 16;
  return bits.value;
}

__device__ inline void round_to(float value, float& out) { out = value; }

__device__ inline void round_to(float value, Bfloat& out) {
  Bits bits;
  bits.value = value;
  const bool is_nan = (bits.bits & 0x7fffffffu) > 0x7f800000u;
  // to nearest, ties to even
  out.bits = is_nan ? 0x7fc0 : (unsigned short)((bits.bits + 0x7fffu + (bits.bits >> 16 & 1u)) >> 16);
}

#if defined(__CUDACC_RTC__)
__device__ inline float half_value(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline unsigned short half_bits(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

__device__ inline float to_float(Half value) { return half_value(value.bits); }

__device__ inline void round_to(float value, Half& out) { out.bits = half_bits(value); }

// ---- what the prelude says

using Code = CODE;      // unsigned char, unsigned short or unsigned int
using Id = ID;          // int or long long
using Offset = OFFSET;  // int or long long
using Word = WORD;      // float, Bfloat or Half: codebooks, hot rows, output and gradients
constexpr int M = NUM_CODES, K = CODEBOOK_SIZE, WIDTH = CODEWORD_WIDTH;
constexpr int D = RESIDUAL ? WIDTH : M * WIDTH;
constexpr int MAX_LOOKUPS = 31;  // 31 * 128 bytes: what fits into the 4 KB of a kernel's arguments

__device__ inline Word to_word(float value) {
  Word word;
  round_to(value, word);
  return word;
}

// One look-up of a feature in a table; filled by ops/gpu/task.py, field by field.
struct Lookup {
  const Code* codes;      // [N, M]
  const Id* ids;          // [L] rows of `codes`; without HAS_IDS id i is row i - first_id
  const Offset* offsets;  // [B + 1]; without HAS_OFFSETS bag b is id first_id + b
  const float* weights;   // [L]; without HAS_WEIGHTS ones
  const Word* codebooks;  // [M * K, WIDTH]
  const Word* hot_rows;   // [H, D]
  Word* rows;             // [B, D] output or upstream gradient, rows row_stride apart
  int64 row_stride;
  int64 num_bags, first_id, num_ids, num_rows;
  int num_hot;
  int first_size;  // first codes from here on are escapes to hot rows
  int num_chunks;  // of bags, for each of which there is a gradient of the codebooks
  int unused;
  void* result;  // float [chunks, K, M * WIDTH] partial gradients of codebooks, float [num_ids] gradients of weights, or
                 // int [num_ids] hot row of an id, or H
  void* second;  // Word [M * K, WIDTH] gradient of codebooks, or int [num_ids] bag of an id
};

struct Lookups {
  Lookup lookup[MAX_LOOKUPS];
};

// ---- reading inputs

__device__ inline int64 bag_start(const Lookup& t, int64 bag) {
  return HAS_OFFSETS ? int64(t.offsets[bag]) : t.first_id + bag;
}

// The row of codes of id number i; ids are counted over the whole batch.
__device__ inline int64 code_row(const Lookup& t, int64 i) {
  if (!HAS_IDS) return i - t.first_id;
  const int64 row = t.ids[i];
  check(row >= 0 && row < t.num_rows, "codebook_bag: every id must be a row of the code table");
  return row;
}

// The hot row behind a row of codes, or -1.
__device__ inline int64 hot_row(const Lookup& t, const Code* codes) {
  if (!HAS_HOT || int64(codes[0]) < t.first_size) return -1;
  int64 number = int64(codes[0]) - t.first_size;
  for (int m = 1; m < M && number < t.num_hot; ++m) number = number * K + codes[m];
  check(number < t.num_hot, "codebook_bag: every escape code must be a hot row");
  return number;
}
