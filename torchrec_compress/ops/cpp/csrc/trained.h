// Trained rows (ops/trained.py): what their kernels are told. Free of torch and of the standard library.
#pragma once
#include <cstdint>

namespace torchrec_compress {

enum class Optimizer : int { SGD, ROW_WISE_ADAGRAD, ADAGRAD, ADAM, PARTIAL_ROW_WISE_ADAM };

// A table of trained rows; see ops/trained.py.
struct TrainedTable {
  uint8_t* rows;   // [num_rows, row_bytes]
  uint8_t* state;  // [num_rows, state_bytes]; null where rows are only looked up
  int64_t num_rows, row_bytes, state_bytes;
  int width, bits;
  Optimizer optimizer;
  int state_bits;
};

// The ids of a batch and their bags.
struct TrainedBatch {
  const void* ids;  // [num_ids] of id_bytes
  int id_bytes;
  int64_t num_ids;
  const void* offsets;  // [num_bags + 1] of offset_bytes, or null: every id is a bag
  int offset_bytes;
  int64_t num_bags;
  const float* weights;  // [num_ids] or null
  bool is_mean;
};

// The gradients of bags.
struct TrainedGrads {
  const float* grads;  // [num_bags, width], `step` floats from row to row
  int64_t step;
};

// An update of the distinct ids of a batch, ascending.
struct TrainedUpdate {
  const uint64_t* keys;    // [num_ids] ascending: an id, and below it 32 bits of its position, or of its bag
  const uint32_t* starts;  // [number of distinct ids + 1] where their keys begin
  int64_t num_distinct;
  const float* weights;  // of positions, or null
  const uint32_t* bags;  // of positions, or null: keys hold bags, or every position is a bag
  const float* shares;   // of bags: one over their ids; or null
  TrainedGrads grads;
  float learning_rate, eps;
  // Adam's: of the moment before, and of the gradient; and what the second moment is multiplied by. Its learning rate
  // makes up for a first moment that began at zero.
  float beta1, rest1, beta2, rest2, correction;
  uint64_t seed;  // mixed with the step's number
  int64_t first_id;
  uint8_t* undo;  // [number of distinct ids, row_bytes + state_bytes] rows and states as they were
};

// Why an id was not updated: the first of a kind, and of all kinds the first.
struct TrainedFault {
  enum Kind { GRADIENT, STATE, VALUES, NOTHING } kind;
  int64_t number;  // of the distinct id
};

// 64 well-mixed bits of a start and a number: the finaliser of splitmix64 (Steele, Lea, Flood 2014).
static inline uint64_t draw(uint64_t start, uint64_t number) {
  uint64_t x = start + (number + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Bytes of one value of state per number of a row; with 8 bits two of them are of their largest.
static inline int64_t bytes_of_numbers(const TrainedTable& table) {
  return table.state_bits == 8 ? table.width + 2 : int64_t(4) * table.width;
}

// Floats that a kernel works in for one row, each part of them aligned to 64 bytes.
static inline int64_t trained_floats(const TrainedTable& table) { return (table.width + 31) / 16 * 16; }
constexpr int TRAINED_PARTS = 8;

// Nothing here throws, allocates or writes outside its range of work; sums are made in one order and without fused
// multiply-adds, so every instruction set and every split over threads gives the same bits, and PyTorch too.
struct TrainedKernels {
  // Sums bags [begin, end) into `out`, [num_bags, width]; returns the first position with an id out of range, or -1.
  int64_t (*forward)(const TrainedTable&, const TrainedBatch&, int64_t begin, int64_t end, float* out);
  // Writes the gradient of the weights of bags [begin, end); ids are in range.
  void (*weight_gradients)(const TrainedTable&, const TrainedBatch&, const TrainedGrads&, int64_t begin, int64_t end,
                           float* out);
  // Updates distinct ids [begin, end), but not those at fault; `scratch` has TRAINED_PARTS * trained_floats().
  TrainedFault (*update)(const TrainedTable&, const TrainedUpdate&, int64_t begin, int64_t end, float* scratch);
};

extern const TrainedKernels trained_base;
extern const TrainedKernels trained_avx2;
extern const TrainedKernels trained_avx512;

}  // namespace torchrec_compress
