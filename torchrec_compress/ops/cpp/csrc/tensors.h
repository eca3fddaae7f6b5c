// Tensors as the operators are given them, checked: an error is a ValueError in Python.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

namespace torchrec_compress {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises ValueError in Python.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  ((message << parts), ...);
  throw std::invalid_argument(message.str());
}

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

// Returns a tensor whose numbers lie one behind another, each at a multiple of its size: a copy, where views are given
// or memory that is another program's.
Tensor laid_out(const Tensor& tensor) {
  const Tensor whole = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  return is_aligned(whole) ? whole : torch::stable::clone(whole);
}

int64_t read(const void* numbers, int bytes, int64_t i) {
  return bytes == 8 ? static_cast<const int64_t*>(numbers)[i] : static_cast<const int32_t*>(numbers)[i];
}

template <typename Offset>
void check_offsets(const Offset* offsets, int64_t num_bags, int64_t num_ids, const std::string& where) {
  require(offsets[0] == 0, where, ": offsets must start with 0, got ", offsets[0]);
  bool decreases = false;
  for (int64_t b = 0; b < num_bags; ++b) decreases |= offsets[b] > offsets[b + 1];
  if (decreases)
    for (int64_t b = 0; b < num_bags; ++b)
      require(offsets[b] <= offsets[b + 1], where, ": offsets must not decrease, got ", offsets[b], " before ",
              offsets[b + 1]);
  require(num_ids < 0 || offsets[num_bags] == num_ids, where, ": offsets must end with the number of ids, ",
          num_ids, ", got ", offsets[num_bags]);
}

void check_offsets(const void* offsets, int bytes, int64_t num_bags, int64_t num_ids, const std::string& where) {
  bytes == 8 ? check_offsets(static_cast<const int64_t*>(offsets), num_bags, num_ids, where)
             : check_offsets(static_cast<const int32_t*>(offsets), num_bags, num_ids, where);
}

}  // namespace
}  // namespace torchrec_compress
