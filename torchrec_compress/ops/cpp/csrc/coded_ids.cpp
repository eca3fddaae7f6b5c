// Which row of codes an id has, counted in an index of bits: see ops/coded_ids.py.
#include "tensors.h"

#include <atomic>
#include <cstring>
#include <vector>

namespace torchrec_compress {
namespace {

constexpr int64_t BLOCK = 128, BLOCK_BYTES = 20;

int64_t row_of(const uint8_t* index, int64_t id) {
  const uint8_t* block = index + (id / BLOCK) * BLOCK_BYTES;
  const int64_t place = id % BLOCK;
  uint64_t bits[2];
  int32_t before;  // of ids of earlier blocks
  std::memcpy(bits, block, sizeof bits);
  std::memcpy(&before, block + sizeof bits, sizeof before);
  const uint64_t mine = bits[place / 64];
  if (!(mine >> (place % 64) & 1)) return 0;
  const int inside = __builtin_popcountll(mine & ((uint64_t(1) << (place % 64)) - 1));
  return 1 + before + inside + (place < 64 ? 0 : __builtin_popcountll(bits[0]));
}

Tensor coded_rows(Tensor index, Tensor ids) {
  require(index.scalar_type() == ScalarType::Byte && index.dim() == 2 && index.size(1) == BLOCK_BYTES,
          "coded_rows: index must be uint8, (N / 128, 20)");
  const bool is_long = ids.scalar_type() == ScalarType::Long;
  require((is_long || ids.scalar_type() == ScalarType::Int) && ids.dim() == 1,
          "coded_rows: ids must be int32 or int64, of one dimension");
  const Tensor blocks = laid_out(index), numbers = laid_out(ids);
  const uint8_t* bits = static_cast<const uint8_t*>(blocks.const_data_ptr());
  const void* from = numbers.const_data_ptr();
  const int64_t num_ids = ids.numel(), limit = index.size(0) * BLOCK;
  Tensor rows = torch::stable::new_empty(ids, std::vector<int64_t>{num_ids}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(rows.mutable_data_ptr());
  std::atomic<int64_t> wrong{-1};
  torch::stable::parallel_for(0, num_ids, 8192, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = read(from, is_long ? 8 : 4, i);
      if (id < 0 || id >= limit) {
        wrong = i;
        return;
      }
      to[i] = row_of(bits, id);
    }
  });
  require(wrong < 0, "coded_rows: every id must be in [0, ", limit, "), got ",
          wrong < 0 ? 0 : read(from, is_long ? 8 : 4, wrong));
  return rows;
}

}  // namespace
}  // namespace torchrec_compress

// Python adds shapes without data, see ops/cpp/coded_ids.py.
STABLE_TORCH_LIBRARY_FRAGMENT(torchrec_compress, library) {
  library.def("coded_rows(Tensor index, Tensor ids) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchrec_compress, CPU, library) {
  library.impl("coded_rows", TORCH_BOX(&torchrec_compress::coded_rows));
}
