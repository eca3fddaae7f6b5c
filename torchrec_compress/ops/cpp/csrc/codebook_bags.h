// What the operators (codebook_bags.cpp) and their kernels (kernels_{base,avx2,avx512}.cpp) share. No torch types here,
// so that the kernels compile in seconds and know nothing of a torch version.
//
// Letters: B bags, L ids of all features, M codes per id, K codewords per codebook, D columns of an output, H hot rows.
#pragma once
#include <cstdint>

namespace torchrec_compress {

// The ids of all features, one after another: bag b is the positions [offsets[b], offsets[b + 1]).
struct Batch {
  const void* ids;      // [L], int32 or int64; null if no look-up reads them
  int id_bytes;
  const void* offsets;  // [bags + 1], int32 or int64; null: every position is a bag of its own
  int offset_bytes;
  const float* weights;  // [L], or null: ones
  int64_t num_ids;       // L
};

// One feature in one table.
struct Lookup {
  const char* codes;   // rows of `stride` bytes: of ids in a code table, or of the positions from `first_row` on
  int64_t stride;
  int64_t first_row;
  int64_t num_rows;    // of the code table
  bool is_gathered;    // whether `codes` are those of positions
  int code_bytes;      // 1, 2 or 4
  bool is_packed;      // whether a byte holds two codes, the first in its low half
  int64_t num_codes, codebook_size, num_hot;
  int64_t first_size;  // the first codebook's codes from here on are escapes to hot rows
  int64_t width;       // D / M (product) or D (residual)
  int64_t dim;         // D
  bool is_residual, is_mean;
  const float* codebooks;  // [M * K, width]
  const char* hot_rows;    // [H, bytes of a row], or null
  int64_t hot_stride;      // bytes of a hot row
  int hot_bits;            // of a hot row's values: 32 (floats), 8 or 4
  int64_t first_bag, num_bags;
  float* out;          // row i is bag first_bag + i, `row_step` floats apart
  bool is_streamed;    // whether `out` may be written past the caches: it is large, and all its rows are aligned to 64
  const float* grad;   // the same, in the backward
  int64_t row_step;
  char* saved;         // where the codes of position p are kept, at p * saved_step; null: nowhere
  int64_t saved_step;
  float* grad_codebooks;  // [M * K, width], added to; null: not wanted
  float* grad_hot_rows;   // [H, D], added to; null: not wanted
  float* grad_weights;    // [L], added to
};

// What a kernel met at a position: an id, a code or an escape code out of range.
struct Wrong {
  enum Kind { NOTHING, ID, CODE, HOT_ROW } kind;
  int64_t position;
};

constexpr int64_t WINDOW = 128;  // positions whose codes are gathered at a time

// Bytes of a row of codes in a window, where packed ones are unpacked.
inline int64_t window_stride(const Lookup& lookup) { return lookup.is_packed ? lookup.num_codes : lookup.stride; }

// Bytes that a kernel works in, aligned to 16; one more for what unpacking writes behind an odd number of codes.
inline int64_t scratch_bytes(const Lookup& lookup) {
  return WINDOW * (window_stride(lookup) + 2 * int64_t(sizeof(char*)) + int64_t(sizeof(int32_t))) + 1;
}

// Nothing here throws, allocates or writes outside its range of work, so any split over threads gives the same bits:
// an element is always summed by one thread, in the order of the ids.
struct Kernels {
  const char* name;
  // Sums bags [begin, end) of a look-up.
  Wrong (*forward)(const Batch&, const Lookup&, int64_t begin, int64_t end, char* scratch);
  // Adds one look-up's share to pieces [first, last) of the gradient of codebooks and hot rows. A piece is a range of
  // output columns, which no other piece touches. The codes are those of positions and were checked by the forward.
  void (*backward)(const Batch&, const Lookup&, int64_t first, int64_t last, char* scratch);
  int64_t (*num_pieces)(const Lookup&);
  // Adds to the gradient of the weights of bags [begin, end); codes as above.
  void (*backward_weights)(const Batch&, const Lookup&, int64_t begin, int64_t end, char* scratch);
  // Copies rows [begin, end) of a code table, `stride` bytes each, to rows of `row_bytes`, padded with zeros.
  Wrong (*gather)(const Batch&, const Lookup&, int64_t begin, int64_t end, char* to, int64_t row_bytes);
};

extern const Kernels kernels_base;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace torchrec_compress
