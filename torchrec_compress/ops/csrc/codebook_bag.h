// What the operator (codebook_bag.cpp) and its kernels (codebook_bag_{base,avx2}.cpp) share. No torch types here, so
// that the kernels compile in seconds and know nothing of a torch version.
//
// Letters: B bags, L ids, M codes per id, K codewords per codebook, D columns of the output, H hot rows.
#pragma once
#include <cstdint>

namespace torchrec_compress {

struct Job {
  const void* codes;         // [L, M], uint8 or 16 bit
  int code_bytes;            // 1 or 2
  const float* codebooks;    // [M * K, width]
  const int64_t* offsets;    // [B + 1], or null: bag b is id b
  const float* weights;      // [L], or null: ones
  const float* hot_rows;     // [H, D], or null
  const int32_t* hot_index;  // [L], the hot row of an id or -1; null without hot rows
  int64_t num_bags, num_ids, num_codes, codebook_size, num_hot;
  int64_t width;             // D / M (product) or D (residual)
  int64_t dim;               // D
  bool residual;
  float* out;                // [B, D], forward
  const float* grad;         // [B, D], backward, rows grad_stride apart
  int64_t grad_stride;
  float* grad_codebooks;     // [M * K, width], zeroed
  float* grad_hot_rows;      // [H, D], zeroed, or null: not wanted
  float* grad_weights;       // [L]
};

// Nothing here throws, allocates or writes outside its range of work, so any split over threads gives the same bits:
// an element is always summed by one thread, in the order of the ids.
struct Kernels {
  const char* name;
  // Sums bags [begin, end).
  void (*forward)(const Job&, int64_t begin, int64_t end);
  // Adds up the gradient of codebooks and hot rows in pieces [begin, end): a piece is a range of output columns, which
  // no other piece touches.
  void (*backward)(const Job&, int64_t begin, int64_t end);
  int64_t (*num_pieces)(const Job&);
  // Writes the gradient of the weights of bags [begin, end).
  void (*backward_weights)(const Job&, int64_t begin, int64_t end);
};

extern const Kernels kernels_base;
extern const Kernels kernels_avx2;

}  // namespace torchrec_compress
