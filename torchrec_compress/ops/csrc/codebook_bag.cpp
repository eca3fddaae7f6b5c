// The operator: checks its inputs, finds the hot rows and spreads the kernels over threads. LibTorch's stable ABI, so
// that one library serves every torch since 2.11 (TORCH_TARGET_VERSION on the command line of the compiler).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "codebook_bag.h"

namespace torchrec_compress {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    // torch's own variable, so that one setting holds for torch and for us
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    const bool is_default = wanted != nullptr && std::strcmp(wanted, "default") == 0;
    if (!is_default && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2;
#endif
    return kernels_base;
  }();
  return chosen;
}

// Raises ValueError in Python.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << "codebook_bag: ";
  ((message << parts), ...);
  throw std::invalid_argument(message.str());
}

void require_floats(const Tensor& tensor, const char* name, int64_t dim) {
  require(tensor.scalar_type() == ScalarType::Float && tensor.dim() == dim && tensor.is_contiguous(), name,
          " must be contiguous float32 with ", dim, " dimensions; call torchrec_compress.ops.codebook_bag");
}

struct Inputs {
  Job job = {};
  std::vector<int32_t> hot_index;
};

void check_offsets(const Job& job) {
  const int64_t* offsets = job.offsets;
  require(offsets[0] == 0, "offsets must start with 0, got ", offsets[0]);
  for (int64_t b = 0; b < job.num_bags; ++b)
    require(offsets[b] <= offsets[b + 1], "offsets must not decrease, got ", offsets[b], " before ", offsets[b + 1]);
  require(offsets[job.num_bags] == job.num_ids, "offsets must end with the number of ids, ", job.num_ids, ", got ",
          offsets[job.num_bags]);
}

// Checks the codes of ids [begin, end) and finds their hot rows; returns an id that is out of range, or -1.
template <typename Code>
int64_t scan_codes(const Job& job, int64_t first_size, int32_t* hot_index, int64_t begin, int64_t end) {
  const int64_t num_codes = job.num_codes, size = job.codebook_size;
  const Code* codes = static_cast<const Code*>(job.codes) + begin * num_codes;
  if (size <= int64_t(Code(-1))) {
    // one pass that the compiler vectorises; the id is looked for only if there is a wrong code at all
    Code largest = 0;
    for (int64_t j = 0; j < (end - begin) * num_codes; ++j) largest = std::max(largest, codes[j]);
    if (largest >= size)
      for (int64_t j = 0;; ++j)
        if (codes[j] >= size) return begin + j / num_codes;
  }
  if (hot_index == nullptr) return -1;
  for (int64_t i = begin; i < end; ++i, codes += num_codes) {
    hot_index[i] = -1;
    if (codes[0] < first_size) continue;
    int64_t number = codes[0] - first_size;
    for (int64_t m = 1; m < num_codes && number < job.num_hot; ++m) number = number * size + codes[m];
    if (number >= job.num_hot) return i;
    hot_index[i] = static_cast<int32_t>(number);
  }
  return -1;
}

// The first codebook's codes from here on are escapes to hot rows: K - ceil(H / K**(M - 1)).
int64_t first_size(const Job& job) {
  int64_t reach = 1;
  for (int64_t m = 1; m < job.num_codes && reach < job.num_hot; ++m) reach *= job.codebook_size;
  return job.codebook_size - (job.num_hot + reach - 1) / reach;
}

void scan(Inputs& inputs) {
  Job& job = inputs.job;
  if (job.num_hot > 0) inputs.hot_index.resize(job.num_ids);
  int32_t* hot_index = job.num_hot > 0 ? inputs.hot_index.data() : nullptr;
  const int64_t first = first_size(job);
  require(first >= 0, "hot_rows must be at most what the first codebook's escapes reach, got ", job.num_hot);
  std::atomic<int64_t> wrong{-1};
  const bool can_be_wrong = hot_index != nullptr || job.code_bytes == 2 || job.codebook_size < 256;
  if (can_be_wrong)
    torch::stable::parallel_for(0, job.num_ids, 16384, [&](int64_t begin, int64_t end) {
      const int64_t id = job.code_bytes == 1 ? scan_codes<uint8_t>(job, first, hot_index, begin, end)
                                             : scan_codes<uint16_t>(job, first, hot_index, begin, end);
      if (id >= 0) wrong = id;
    });
  require(wrong < 0, "every code must be in [0, ", job.codebook_size, ") and every escape code a hot row in [0, ",
          job.num_hot, "), got another at position ", wrong.load(), "; load the codes and codebooks of one checkpoint");
  job.hot_index = hot_index;
}

void fill(Inputs& inputs, const Tensor& codes, const std::optional<Tensor>& offsets,
          const std::optional<Tensor>& weights) {
  Job& job = inputs.job;
  const bool is_byte = codes.scalar_type() == ScalarType::Byte;
  require((is_byte || codes.scalar_type() == ScalarType::Short) && codes.dim() == 2 && codes.is_contiguous(),
          "codes must be contiguous uint8 or int16 of shape (L, M); call torchrec_compress.ops.codebook_bag");
  job.codes = codes.const_data_ptr();
  job.code_bytes = is_byte ? 1 : 2;
  job.num_ids = job.num_bags = codes.size(0);
  job.num_codes = codes.size(1);
  require(job.num_codes >= 1, "codes must have at least one column");
  if (offsets) {
    require(offsets->scalar_type() == ScalarType::Long && offsets->dim() == 1 && offsets->is_contiguous() &&
                offsets->numel() >= 1,
            "offsets must be contiguous int64 of shape (B + 1,)");
    job.offsets = static_cast<const int64_t*>(offsets->const_data_ptr());
    job.num_bags = offsets->numel() - 1;
    check_offsets(job);
  }
  if (weights) {
    require_floats(*weights, "weights", 1);
    require(weights->numel() == job.num_ids, "weights must be one per id, ", job.num_ids, ", got ", weights->numel());
    job.weights = static_cast<const float*>(weights->const_data_ptr());
  }
}

void set_sizes(Job& job, int64_t num_words, int64_t width, int64_t num_hot, bool residual) {
  require(num_words > 0 && num_words % job.num_codes == 0,
          "codebooks must hold the same number of codewords, at least one, for each of ", job.num_codes,
          " codes, got ", num_words, " in all");
  job.codebook_size = num_words / job.num_codes;
  job.width = width;
  job.num_hot = num_hot;
  job.residual = residual;
  job.dim = residual ? width : width * job.num_codes;
}

// Reads a gradient in place where its rows are whole, as in the columns of a concatenation; returns what must be kept.
Tensor set_grad(Job& job, const Tensor& grad) {
  require(grad.scalar_type() == ScalarType::Float && grad.dim() == 2 && grad.size(0) == job.num_bags &&
              grad.size(1) == job.dim,
          "grad must be float32 of shape (", job.num_bags, ", ", job.dim, ")");
  Tensor rows = grad.stride(1) == 1 ? grad : torch::stable::contiguous(grad);
  job.grad = static_cast<const float*>(rows.const_data_ptr());
  job.grad_stride = rows.stride(0);
  return rows;
}

void set_tables(Inputs& inputs, const Tensor& codebooks, const std::optional<Tensor>& hot_rows, bool residual) {
  Job& job = inputs.job;
  require_floats(codebooks, "codebooks", 2);
  job.codebooks = static_cast<const float*>(codebooks.const_data_ptr());
  set_sizes(job, codebooks.size(0), codebooks.size(1), hot_rows ? hot_rows->size(0) : 0, residual);
  if (hot_rows) {
    require_floats(*hot_rows, "hot_rows", 2);
    require(hot_rows->size(1) == job.dim, "hot_rows must be ", job.dim, " wide, got ", hot_rows->size(1));
    job.hot_rows = static_cast<const float*>(hot_rows->const_data_ptr());
  }
}

// Bags per thread below which a thread costs more than it saves: about 32K codewords' worth of work.
int64_t grain(const Job& job) {
  const int64_t work = (job.num_ids * job.num_codes + job.num_bags) / std::max<int64_t>(1, job.num_bags) + 1;
  return std::max<int64_t>(1, 32768 / work);
}

Tensor codebook_bag(Tensor codes, Tensor codebooks, std::optional<Tensor> offsets, std::optional<Tensor> weights,
                    std::optional<Tensor> hot_rows, bool residual) {
  Inputs inputs;
  fill(inputs, codes, offsets, weights);
  set_tables(inputs, codebooks, hot_rows, residual);
  scan(inputs);
  Job& job = inputs.job;
  Tensor out = torch::stable::new_empty(codebooks, {job.num_bags, job.dim});
  job.out = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, job.num_bags, grain(job),
                              [&](int64_t begin, int64_t end) { kernels().forward(job, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> codebook_bag_backward(Tensor grad, Tensor codes, std::optional<Tensor> offsets,
                                                 std::optional<Tensor> weights, int64_t num_words, int64_t width,
                                                 int64_t num_hot, bool wants_hot_rows, bool residual) {
  Inputs inputs;
  Job& job = inputs.job;
  fill(inputs, codes, offsets, weights);
  set_sizes(job, num_words, width, num_hot, residual);
  const Tensor rows = set_grad(job, grad);
  scan(inputs);
  Tensor codebooks = torch::stable::new_zeros(grad, {num_words, width});
  Tensor hot_rows = torch::stable::new_zeros(grad, {wants_hot_rows ? num_hot : 0, job.dim});
  job.grad_codebooks = static_cast<float*>(codebooks.mutable_data_ptr());
  if (wants_hot_rows) job.grad_hot_rows = static_cast<float*>(hot_rows.mutable_data_ptr());
  torch::stable::parallel_for(0, kernels().num_pieces(job), 1,
                              [&](int64_t begin, int64_t end) { kernels().backward(job, begin, end); });
  return {codebooks, hot_rows};
}

Tensor codebook_bag_backward_weights(Tensor grad, Tensor codes, Tensor codebooks, std::optional<Tensor> offsets,
                                     std::optional<Tensor> hot_rows, bool residual) {
  Inputs inputs;
  Job& job = inputs.job;
  fill(inputs, codes, offsets, std::nullopt);
  set_tables(inputs, codebooks, hot_rows, residual);
  const Tensor rows = set_grad(job, grad);
  scan(inputs);
  Tensor weights = torch::stable::new_empty(grad, {job.num_ids});
  job.grad_weights = static_cast<float*>(weights.mutable_data_ptr());
  torch::stable::parallel_for(0, job.num_bags, grain(job),
                              [&](int64_t begin, int64_t end) { kernels().backward_weights(job, begin, end); });
  return weights;
}

}  // namespace
}  // namespace torchrec_compress

// Python adds shapes without data and gradients, see ops/native.py.
STABLE_TORCH_LIBRARY(torchrec_compress, library) {
  library.def(
      "codebook_bag(Tensor codes, Tensor codebooks, Tensor? offsets, Tensor? weights, Tensor? hot_rows, "
      "bool residual) -> Tensor");
  library.def(
      "codebook_bag_backward(Tensor grad, Tensor codes, Tensor? offsets, Tensor? weights, int num_words, int width, "
      "int num_hot, bool wants_hot_rows, bool residual) -> (Tensor, Tensor)");
  library.def(
      "codebook_bag_backward_weights(Tensor grad, Tensor codes, Tensor codebooks, Tensor? offsets, Tensor? hot_rows, "
      "bool residual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchrec_compress, CPU, library) {
  library.impl("codebook_bag", TORCH_BOX(&torchrec_compress::codebook_bag));
  library.impl("codebook_bag_backward", TORCH_BOX(&torchrec_compress::codebook_bag_backward));
  library.impl("codebook_bag_backward_weights", TORCH_BOX(&torchrec_compress::codebook_bag_backward_weights));
}

// For `torchrec-compress info`: which instruction set serves.
extern "C" const char* torchrec_compress_instruction_set() { return torchrec_compress::kernels().name; }
