// The operators: spread the kernels over threads. LibTorch's stable ABI, so that one library serves every torch since
// 2.11 (TORCH_TARGET_VERSION on the command line of the compiler).
#include "call.h"
#include "processor.h"

#include <algorithm>
#include <mutex>
#include <tuple>

namespace torchrec_compress {
namespace {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& chosen = choose(kernels_base, kernels_avx2, kernels_avx512);
  return chosen;
#endif
  return kernels_base;
}

// An output that no cache holds is not fetched into one before it is overwritten. Smaller ones are read from the caches by
// whatever comes next, which streaming would spoil.
constexpr int64_t STREAMED_BYTES = 16 << 20;

// A range of one look-up's bags, or a piece of one table's gradient.
struct Task {
  int64_t number, begin, end;
};

// Cuts the look-ups into ranges of bags worth about 32K codewords, below which a thread costs more than it saves.
std::vector<Task> cut(const Call& call) {
  std::vector<Task> tasks;
  for (size_t l = 0; l < call.lookups.size(); ++l) {
    const Lookup& lookup = call.lookups[l];
    const int64_t first = lookup.first_bag, last = first + lookup.num_bags;
    const int64_t num_ids = call.offset(last) - call.offset(first);
    const int64_t work = num_ids * lookup.num_codes + lookup.num_bags * (1 + lookup.dim / 16);
    const int64_t parts = std::min(lookup.num_bags, work / 32768 + 1);
    for (int64_t i = 0; i < parts; ++i)
      tasks.push_back({int64_t(l), first + lookup.num_bags * i / parts, first + lookup.num_bags * (i + 1) / parts});
  }
  return tasks;
}

// Memory for one thread's windows, aligned to 16 bytes as operator new aligns it.
std::vector<char> scratch(const Call& call) {
  int64_t bytes = 0;
  for (const Lookup& lookup : call.lookups) bytes = std::max(bytes, scratch_bytes(lookup));
  return std::vector<char>(bytes);
}

template <typename Work>
void run(const std::vector<Task>& tasks, const Call& call, const Work& work) {
  torch::stable::parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<char> memory = scratch(call);
    for (int64_t i = begin; i < end; ++i) work(tasks[i], memory.data());
  });
}

[[noreturn]] void report(const Lookup& lookup, const Batch& batch, const Wrong& wrong, size_t number,
                         const std::string& names) {
  std::istringstream lines(names);
  std::string where;
  for (size_t i = 0; i <= number; ++i) std::getline(lines, where);
  require(wrong.kind != Wrong::ID, where, ": every id must be in [0, ", lookup.num_rows, "), got ",
          batch.ids ? read(batch.ids, batch.id_bytes, wrong.position) : -1,
          "; map ids to the table's range, or raise num_embeddings");
  require(false, where, ": every code must be in [0, ", lookup.codebook_size,
          ") and every escape code a hot row in [0, ", lookup.num_hot, "), got another at position ", wrong.position,
          "; load the codes and codebooks of one checkpoint");
  std::abort();
}

std::tuple<Tensor, Tensor> codebook_bags(Tensors codes, Tensors codebooks, Tensors hot_rows, std::optional<Tensor> ids,
                                         std::optional<Tensor> offsets, std::optional<Tensor> weights, Numbers plan,
                                         Numbers bags, int64_t saved_bytes, bool is_flat, std::string names) {
  Call call;
  call.set_batch(ids, offsets, weights);
  call.set_lookups(codes, std::move(plan), bags);
  call.set_tables(codebooks, hot_rows);
  for (const Lookup& lookup : call.lookups)
    require(lookup.is_gathered || ids, "codebook_bag: ids must be given with a code table, got none");
  Tensor out = torch::stable::new_empty(codebooks[0], call.lay_out(is_flat));
  Tensor saved = torch::stable::new_empty(codebooks[0], Numbers{saved_bytes ? call.batch.num_ids : 0, saved_bytes},
                                          ScalarType::Byte);
  if (saved_bytes) call.set_saved(saved, static_cast<char*>(saved.mutable_data_ptr()));
  const Numbers first = call.starts(is_flat);
  for (size_t l = 0; l < call.lookups.size(); ++l) {
    Lookup& lookup = call.lookups[l];
    lookup.out = static_cast<float*>(out.mutable_data_ptr()) + first[l];
    lookup.is_streamed = out.numel() * int64_t(sizeof(float)) >= STREAMED_BYTES &&
                         reinterpret_cast<uintptr_t>(lookup.out) % 64 == 0 && lookup.row_step % 16 == 0;
  }
  std::mutex lock;
  Task where = {int64_t(call.lookups.size()), 0, 0};
  Wrong wrong = {};
  run(cut(call), call, [&](const Task& task, char* memory) {
    const Wrong met = kernels().forward(call.batch, call.lookups[task.number], task.begin, task.end, memory);
    if (met.kind == Wrong::NOTHING) return;
    const std::lock_guard<std::mutex> held(lock);
    if (task.number < where.number || (task.number == where.number && met.position < wrong.position)) {
      where = task;
      wrong = met;
    }
  });
  if (wrong.kind != Wrong::NOTHING) report(call.lookups[where.number], call.batch, wrong, where.number, names);
  return {out, saved};
}

// What the three backward operators are told alike.
void set_backward(Call& call, const Tensors& codes, const Tensor& saved, const std::optional<Tensor>& offsets,
                  const std::optional<Tensor>& weights, Numbers plan, const Numbers& bags) {
  require(saved.scalar_type() == ScalarType::Byte && saved.dim() == 2 && saved.is_contiguous(),
          "codebook_bag: saved must be contiguous uint8 with 2 dimensions");
  call.set_batch(std::nullopt, offsets, weights);
  if (call.num_bags < 0 && saved.size(1) > 0) call.num_bags = saved.size(0);
  call.set_lookups(codes, std::move(plan), bags);
}

std::tuple<Tensors, Tensors> codebook_bags_backward(Tensor grad, Tensors codes, Tensor saved,
                                                    std::optional<Tensor> offsets, std::optional<Tensor> weights,
                                                    Numbers plan, Numbers bags, bool is_flat, Numbers words,
                                                    Numbers hot, Numbers wants) {
  Call call;
  set_backward(call, codes, saved, offsets, weights, std::move(plan), bags);
  const size_t num_tables = words.size() / 2;
  require(words.size() % 2 == 0 && wants.size() == num_tables + hot.size(),
          "codebook_bag: words, hot and wants must have entries for every table");
  for (size_t l = 0; l < call.lookups.size(); ++l) {
    const int64_t table = call.tables[l];
    require(table >= 0 && table < int64_t(num_tables) && call.hot(l) < int64_t(hot.size()),
            "codebook_bag: plan must name one of ", num_tables, " tables, got ", table);
    call.set_sizes(l, words[2 * table], words[2 * table + 1], call.hot(l) < 0 ? 0 : hot[call.hot(l)]);
  }
  call.read_saved(saved);
  const Tensor rows = call.set_grad(grad, is_flat);
  Tensors grad_books, grad_hot;
  Numbers dims(hot.size(), 0);
  for (size_t l = 0; l < call.lookups.size(); ++l)
    if (call.hot(l) >= 0) dims[call.hot(l)] = call.lookups[l].dim;
  for (size_t t = 0; t < num_tables; ++t)
    grad_books.push_back(torch::stable::new_zeros(grad, Numbers{wants[t] ? words[2 * t] : 0, words[2 * t + 1]}));
  for (size_t h = 0; h < hot.size(); ++h)
    grad_hot.push_back(torch::stable::new_zeros(grad, Numbers{wants[num_tables + h] ? hot[h] : 0, dims[h]}));
  std::vector<Task> tasks;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts_wanted = threads == 1 ? 1 : (2 * threads + int64_t(num_tables) - 1) / int64_t(num_tables);
  for (size_t t = 0; t < num_tables; ++t)
    for (size_t l = 0; l < call.lookups.size(); ++l) {
      if (call.tables[l] != int64_t(t)) continue;
      // the fewer parts, the fewer walks over the codes: no more than keep every thread at work
      const int64_t pieces = kernels().num_pieces(call.lookups[l]), parts = std::min(pieces, parts_wanted);
      for (int64_t i = 0; i < parts; ++i) tasks.push_back({int64_t(t), pieces * i / parts, pieces * (i + 1) / parts});
      break;
    }
  for (size_t l = 0; l < call.lookups.size(); ++l) {
    Lookup& lookup = call.lookups[l];
    if (wants[call.tables[l]])
      lookup.grad_codebooks = static_cast<float*>(grad_books[call.tables[l]].mutable_data_ptr());
    if (call.hot(l) >= 0 && wants[num_tables + call.hot(l)])
      lookup.grad_hot_rows = static_cast<float*>(grad_hot[call.hot(l)].mutable_data_ptr());
  }
  run(tasks, call, [&](const Task& task, char* memory) {
    for (size_t l = 0; l < call.lookups.size(); ++l)
      if (call.tables[l] == task.number) kernels().backward(call.batch, call.lookups[l], task.begin, task.end, memory);
  });
  return {grad_books, grad_hot};
}

Tensor codebook_bags_backward_weights(Tensor grad, Tensors codes, Tensor saved, Tensors codebooks, Tensors hot_rows,
                                      std::optional<Tensor> offsets, Tensor weights, Numbers plan, Numbers bags,
                                      bool is_flat) {
  Call call;
  set_backward(call, codes, saved, offsets, weights, std::move(plan), bags);
  call.set_tables(codebooks, hot_rows);
  call.read_saved(saved);
  const Tensor rows = call.set_grad(grad, is_flat);
  Tensor grad_weights = torch::stable::new_zeros(grad, Numbers{weights.numel()});
  for (Lookup& lookup : call.lookups) lookup.grad_weights = static_cast<float*>(grad_weights.mutable_data_ptr());
  // look-ups of one feature add to the same weights: one look-up after another
  std::vector<Task> all = cut(call);
  for (size_t l = 0, first = 0; l < call.lookups.size(); ++l) {
    std::vector<Task> tasks;
    for (; first < all.size() && all[first].number == int64_t(l); ++first) tasks.push_back(all[first]);
    run(tasks, call, [&](const Task& task, char* memory) {
      kernels().backward_weights(call.batch, call.lookups[l], task.begin, task.end, memory);
    });
  }
  return grad_weights;
}

Tensor code_gather(Tensor codes, Tensor ids, int64_t row_bytes, std::string where) {
  Operands operands;
  Batch batch = {};
  batch.ids = operands.integers(ids, "ids", &batch.id_bytes);
  batch.num_ids = ids.numel();
  require(codes.dim() == 2, where, ": codes must have 2 dimensions, got ", codes.dim());
  Lookup lookup = {};
  lookup.codes = static_cast<const char*>(operands.address(codes));
  lookup.num_rows = codes.size(0);
  lookup.stride = codes.size(1) * int64_t(codes.element_size());
  require(row_bytes >= lookup.stride, where, ": rows must have at least the ", lookup.stride,
          " bytes of the code table's, got ", row_bytes);
  Tensor rows = torch::stable::new_empty(codes, Numbers{batch.num_ids, row_bytes}, ScalarType::Byte);
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  std::mutex lock;
  Wrong wrong = {};
  torch::stable::parallel_for(0, batch.num_ids, 4096, [&](int64_t begin, int64_t end) {
    const Wrong met = kernels().gather(batch, lookup, begin, end, to, row_bytes);
    if (met.kind == Wrong::NOTHING) return;
    const std::lock_guard<std::mutex> held(lock);
    if (wrong.kind == Wrong::NOTHING || met.position < wrong.position) wrong = met;
  });
  if (wrong.kind != Wrong::NOTHING) report(lookup, batch, wrong, 0, where);
  return rows;
}

}  // namespace
}  // namespace torchrec_compress

// Python adds shapes without data and gradients, see ops/cpu.py.
STABLE_TORCH_LIBRARY(torchrec_compress, library) {
  const std::string forward =
      "(Tensor[] codes, Tensor[] codebooks, Tensor[] hot_rows, Tensor? ids, Tensor? offsets, Tensor? weights, "
      "int[] plan, SymInt[] bags, int saved_bytes, bool is_flat, str names) -> (Tensor, Tensor)";
  library.def(("codebook_bags" + forward).c_str());
  library.def(("codebook_bags_forward" + forward).c_str());  // the same, which is given no gradients
  library.def(
      "codebook_bags_backward(Tensor grad, Tensor[] codes, Tensor saved, Tensor? offsets, Tensor? weights, "
      "int[] plan, SymInt[] bags, bool is_flat, SymInt[] words, SymInt[] hot, int[] wants) -> (Tensor[], Tensor[])");
  library.def(
      "codebook_bags_backward_weights(Tensor grad, Tensor[] codes, Tensor saved, Tensor[] codebooks, "
      "Tensor[] hot_rows, Tensor? offsets, Tensor weights, int[] plan, SymInt[] bags, bool is_flat) -> Tensor");
  library.def("code_gather(Tensor codes, Tensor ids, int row_bytes, str where) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchrec_compress, CPU, library) {
  library.impl("codebook_bags", TORCH_BOX(&torchrec_compress::codebook_bags));
  library.impl("codebook_bags_forward", TORCH_BOX(&torchrec_compress::codebook_bags));
  library.impl("codebook_bags_backward", TORCH_BOX(&torchrec_compress::codebook_bags_backward));
  library.impl("codebook_bags_backward_weights", TORCH_BOX(&torchrec_compress::codebook_bags_backward_weights));
  library.impl("code_gather", TORCH_BOX(&torchrec_compress::code_gather));
}

// For `torchrec-compress info`: which instruction set serves.
extern "C" const char* torchrec_compress_instruction_set() { return torchrec_compress::kernels().name; }
