// The operators of trained rows: check what they are given, group equal ids, and spread the kernels over threads.
#include "processor.h"
#include "tensors.h"
#include "trained.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace torchrec_compress {
namespace {

const TrainedKernels& kernels() {
#if defined(__x86_64__)
  static const TrainedKernels& chosen = choose(trained_base, trained_avx2, trained_avx512);
  return chosen;
#endif
  return trained_base;
}

using Words = std::unique_ptr<uint32_t[]>;
using Keys = std::unique_ptr<uint64_t[]>;

// A table, a batch of its ids, and the tensors that hold them.
struct TrainedCall {
  TrainedTable table = {};
  TrainedBatch batch = {};
  std::string where;
  std::vector<Tensor> kept;

  const void* address(const Tensor& tensor) {
    kept.push_back(laid_out(tensor));
    return kept.back().const_data_ptr();
  }

  void set_table(const Tensor& rows, int64_t width, int64_t bits, bool is_written) {
    require(bits == 8 || bits == 4, where, ": bits must be 8 or 4, got ", bits);
    require(width >= 1 && width < (1 << 24) && width * bits % 8 == 0, where, ": width must be at least 1, and even "
            "with 4 bits, got ", width);
    table.width = int(width);
    table.bits = int(bits);
    table.row_bytes = width * bits / 8 + 1;
    check_bytes(rows, "rows", table.row_bytes, is_written);
    table.num_rows = rows.size(0);
    table.rows = static_cast<uint8_t*>(is_written ? rows.mutable_data_ptr() : const_cast<void*>(address(rows)));
  }

  void set_state(const Tensor& state, int64_t optimizer, int64_t state_bits) {
    require(optimizer >= 0 && optimizer <= 4 && (state_bits == 8 || state_bits == 32), where,
            ": there is no such optimizer, ", optimizer, " with ", state_bits, " bits");
    table.optimizer = Optimizer(int(optimizer));
    table.state_bits = int(state_bits);
    const int64_t of_row = state_bits / 8;
    const int64_t of_numbers = bytes_of_numbers(table);
    const int64_t bytes[] = {0, of_row, of_numbers, 2 * of_numbers, of_numbers + of_row};
    table.state_bytes = bytes[optimizer];
    check_bytes(state, "state", table.state_bytes, true);
    require(state.size(0) == table.num_rows, where, ": state must be one per row, ", table.num_rows, ", got ",
            state.size(0));
    table.state = static_cast<uint8_t*>(state.mutable_data_ptr());
  }

  void check_bytes(const Tensor& tensor, const char* name, int64_t bytes, bool is_written) const {
    require(tensor.scalar_type() == ScalarType::Byte && tensor.dim() == 2 && tensor.size(1) == bytes, where, ": ", name,
            " must be uint8 of shape (rows, ", bytes, ")");
    require(!is_written || tensor.is_contiguous(), where, ": ", name, " must be contiguous where they are updated");
  }

  const void* integers(const Tensor& tensor, const char* name, int* bytes) {
    const ScalarType type = tensor.scalar_type();
    require((type == ScalarType::Int || type == ScalarType::Long) && tensor.dim() == 1, where, ": ", name,
            " must be int32 or int64 with 1 dimension");
    *bytes = type == ScalarType::Int ? 4 : 8;
    return address(tensor);
  }

  void set_batch(const Tensor& ids, const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights,
                 bool is_mean) {
    batch.ids = integers(ids, "ids", &batch.id_bytes);
    batch.num_ids = batch.num_bags = ids.numel();
    batch.is_mean = is_mean;
    if (offsets) {
      batch.offsets = integers(*offsets, "offsets", &batch.offset_bytes);
      require(offsets->numel() >= 1, where, ": offsets must start with 0 and must end with the number of ids, ",
              batch.num_ids, ", got none");
      batch.num_bags = offsets->numel() - 1;
      check_offsets(batch.offsets, batch.offset_bytes, batch.num_bags, batch.num_ids, where);
    }
    if (!weights) return;
    require(weights->scalar_type() == ScalarType::Float && weights->dim() == 1 && weights->numel() == batch.num_ids,
            where, ": weights must be one per id, ", batch.num_ids, ", float32, got ", weights->numel());
    batch.weights = static_cast<const float*>(address(*weights));
    uint32_t largest = 0;
    for (int64_t p = 0; p < batch.num_ids; ++p) {
      uint32_t bits;
      __builtin_memcpy(&bits, batch.weights + p, 4);
      largest = std::max(largest, bits & 0x7FFFFFFF);
    }
    require(largest < 0x7F800000, where, ": weights must be finite, got NaN or infinity; clean the batch's weights");
  }

  // Reads gradients in place where their rows are whole, as in columns of a concatenation.
  TrainedGrads grads_of(const Tensor& grads) {
    require(grads.scalar_type() == ScalarType::Float && grads.dim() == 2 && grads.size(0) == batch.num_bags &&
                grads.size(1) == table.width,
            where, ": grads must be float32 of shape [", batch.num_bags, ", ", table.width, "]");
    if (grads.stride(1) == 1 && grads.stride(0) >= 0 && is_aligned(grads)) {
      kept.push_back(grads);
      return {static_cast<const float*>(grads.const_data_ptr()), grads.stride(0)};
    }
    return {static_cast<const float*>(address(grads)), table.width};
  }

  int64_t id(int64_t p) const { return read(batch.ids, batch.id_bytes, p); }
  int64_t offset(int64_t bag) const { return batch.offsets ? read(batch.offsets, batch.offset_bytes, bag) : bag; }

  [[noreturn]] void report_id(int64_t position) const {
    require(false, where, ": every id must be in [0, ", table.num_rows, "), got ", id(position),
            "; map ids to the table's range, or raise num_embeddings");
    std::abort();
  }

  // Runs work on ranges of bags worth about 32K numbers, below which a thread costs more than it saves.
  template <typename Work>
  void over_bags(const Work& work) const {
    const int64_t numbers = (batch.num_ids + batch.num_bags) * table.width;
    const int64_t parts = std::min(batch.num_bags, numbers / 32768 + 1);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      work(batch.num_bags * first / parts, batch.num_bags * last / parts);
    });
  }
};

Tensor trained_bag(Tensor rows, Tensor ids, std::optional<Tensor> offsets, std::optional<Tensor> weights,
                   int64_t width, int64_t bits, bool is_mean, std::string where) {
  TrainedCall call;
  call.where = std::move(where);
  call.set_table(rows, width, bits, false);
  call.set_batch(ids, offsets, weights, is_mean);
  Tensor out = torch::stable::new_empty(rows, std::vector<int64_t>{call.batch.num_bags, width}, ScalarType::Float);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  std::mutex lock;
  int64_t wrong = -1;
  call.over_bags([&](int64_t begin, int64_t end) {
    const int64_t met = kernels().forward(call.table, call.batch, begin, end, to);
    if (met < 0) return;
    const std::lock_guard<std::mutex> held(lock);
    if (wrong < 0 || met < wrong) wrong = met;
  });
  if (wrong >= 0) call.report_id(wrong);
  return out;
}

Tensor trained_bag_weight_gradients(Tensor grads, Tensor rows, Tensor ids, std::optional<Tensor> offsets,
                                    int64_t width, int64_t bits, bool is_mean, std::string where) {
  TrainedCall call;
  call.where = std::move(where);
  call.set_table(rows, width, bits, false);
  call.set_batch(ids, offsets, std::nullopt, is_mean);
  const TrainedGrads given = call.grads_of(grads);
  for (int64_t p = 0; p < call.batch.num_ids; ++p)
    if (uint64_t(call.id(p)) >= uint64_t(call.table.num_rows)) call.report_id(p);
  Tensor out = torch::stable::new_empty(grads, std::vector<int64_t>{call.batch.num_ids}, ScalarType::Float);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  call.over_bags([&](int64_t begin, int64_t end) {
    kernels().weight_gradients(call.table, call.batch, given, begin, end, to);
  });
  return out;
}

// The ids of a batch in ascending order, equal ones in the order of the batch.
struct Groups {
  Keys keys;
  Words starts, bags;
  std::unique_ptr<float[]> shares;
  int64_t num_distinct = 0;

  explicit Groups(const TrainedCall& call) {
    const int64_t num_ids = call.batch.num_ids;
    require(num_ids < (int64_t(1) << 32) - 1 && call.table.num_rows <= int64_t(1) << 32, call.where,
            ": an update must be of fewer than 2**32 ids and rows, got ", num_ids, " and ", call.table.num_rows,
            "; shard the table");
    make_keys(call);
    sort(num_ids, call.table.num_rows);
    starts = Words(new uint32_t[num_ids + 1]);
    for (int64_t i = 0; i < num_ids; ++i)
      if (i == 0 || keys[i] >> 32 != keys[i - 1] >> 32) starts[num_distinct++] = uint32_t(i);
    starts[num_distinct] = uint32_t(num_ids);
  }

 private:
  void make_keys(const TrainedCall& call) {
    const TrainedBatch& batch = call.batch;
    keys = Keys(new uint64_t[batch.num_ids]);
    // weights are found by position, and bags then by a table of positions; without weights bags are sorted themselves
    const bool by_position = batch.weights && batch.offsets;
    if (by_position) bags = Words(new uint32_t[batch.num_ids]);
    if (batch.is_mean && batch.offsets) shares = std::unique_ptr<float[]>(new float[batch.num_bags]);
    int64_t p = 0;
    for (int64_t bag = 0; bag < batch.num_bags; ++bag) {
      const int64_t last = call.offset(bag + 1);
      if (shares) shares[bag] = 1.0f / float(std::max<int64_t>(last - p, 1));
      for (; p < last; ++p) {
        const int64_t id = call.id(p);
        if (uint64_t(id) >= uint64_t(call.table.num_rows)) call.report_id(p);
        keys[p] = uint64_t(id) << 32 | uint32_t(by_position ? p : bag);
        if (by_position) bags[p] = uint32_t(bag);
      }
    }
  }

  // A radix sort of the ids, from their lowest digit on.
  void sort(int64_t num_ids, int64_t num_rows) {
    constexpr int MOST = 11;  // bits of a digit: its counts stay in the first cache
    int bits = 0;
    while (bits < 32 && num_rows > int64_t(1) << bits) ++bits;
    const int passes = (bits + MOST - 1) / MOST, digit = passes ? (bits + passes - 1) / passes : 0;
    const uint64_t mask = (uint64_t(1) << digit) - 1;
    Keys other(passes ? new uint64_t[num_ids] : nullptr);
    std::vector<uint32_t> places(size_t(1) << digit);
    for (int pass = 0; pass < passes; ++pass) {
      const int shift = 32 + pass * digit;
      std::fill(places.begin(), places.end(), 0);
      for (int64_t i = 0; i < num_ids; ++i) ++places[keys[i] >> shift & mask];
      uint32_t place = 0;
      for (uint32_t& count : places) {
        const uint32_t size = count;
        count = place;
        place += size;
      }
      for (int64_t i = 0; i < num_ids; ++i) other[places[keys[i] >> shift & mask]++] = keys[i];
      keys.swap(other);
    }
  }
};

// The number of the first distinct id of part `part` of `parts`, which have about equal numbers of positions.
int64_t first_of_part(const Groups& groups, int64_t part, int64_t parts) {
  const uint32_t* starts = groups.starts.get();
  const int64_t position = int64_t(starts[groups.num_distinct]) * part / parts;
  return std::lower_bound(starts, starts + groups.num_distinct, uint32_t(position)) - starts;
}

// Writes rows and states back as they were.
void undo(const TrainedTable& table, const TrainedUpdate& update) {
  const uint8_t* from = update.undo;
  for (int64_t i = 0; i < update.num_distinct; ++i, from += table.row_bytes + table.state_bytes) {
    const int64_t id = int64_t(update.keys[update.starts[i]] >> 32);
    std::copy_n(from, table.row_bytes, table.rows + id * table.row_bytes);
    std::copy_n(from + table.row_bytes, table.state_bytes, table.state + id * table.state_bytes);
  }
}

// Raises what an id is at fault for, as ops/trained_reference.py says it.
void report(const TrainedCall& call, const TrainedUpdate& update, const TrainedFault& fault, int64_t step) {
  if (fault.kind == TrainedFault::NOTHING) return;
  const int64_t id = int64_t(update.first_id) + int64_t(update.keys[update.starts[fault.number]] >> 32);
  require(fault.kind != TrainedFault::GRADIENT, call.where, ": the gradient of id ", id, " must be finite at step ",
          step, ", got NaN or infinity; nothing has been updated");
  require(fault.kind != TrainedFault::STATE, call.where, ": the optimizer state of id ", id, " must be at most what ",
          call.table.state_bits, " bits hold at step ", step, ", got more; nothing has been updated");
  require(false, call.where, ": the values of id ", id, " must be finite and at most ",
          120 * ((1 << (call.table.bits - 1)) - 1), " at step ", step, ", got larger ones or NaN; nothing has been written");
}

void trained_bag_update(Tensor rows, Tensor state, Tensor ids, std::optional<Tensor> offsets,
                        std::optional<Tensor> weights, Tensor grads, int64_t width, int64_t bits, int64_t optimizer,
                        int64_t state_bits, bool is_mean, double learning_rate, double eps,
                        std::vector<double> adam, int64_t seed, int64_t step, int64_t first_id, std::string where) {
  TrainedCall call;
  call.where = std::move(where);
  call.set_table(rows, width, bits, true);
  call.set_state(state, optimizer, state_bits);
  call.set_batch(ids, offsets, weights, is_mean);
  TrainedUpdate update = {};
  update.grads = call.grads_of(grads);
  const Groups groups(call);
  update.keys = groups.keys.get();
  update.starts = groups.starts.get();
  update.num_distinct = groups.num_distinct;
  update.weights = call.batch.weights;
  update.bags = groups.bags.get();
  update.shares = groups.shares.get();
  update.learning_rate = float(learning_rate);
  update.eps = float(eps);
  require(adam.size() == 3, call.where, ": adam must be beta1, beta2 and a correction, got ", adam.size(), " numbers");
  update.beta1 = float(adam[0]);
  update.rest1 = float(1.0 - adam[0]);
  update.beta2 = float(adam[1]);
  update.rest2 = float(1.0 - adam[1]);
  update.correction = float(adam[2]);
  update.seed = draw(draw(0, uint64_t(seed)), uint64_t(step));
  update.first_id = first_id;
  const std::unique_ptr<uint8_t[]> old(
      new uint8_t[groups.num_distinct * (call.table.row_bytes + call.table.state_bytes)]);
  update.undo = old.get();
  const int64_t parts = std::min(groups.num_distinct, call.batch.num_ids * width / 8192 + 1);
  std::mutex lock;
  TrainedFault first = {TrainedFault::NOTHING, 0};
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(TRAINED_PARTS * trained_floats(call.table) + 16);
    float* aligned = scratch.data() + (-(reinterpret_cast<uintptr_t>(scratch.data()) / 4) & 15);
    const TrainedFault met = kernels().update(call.table, update, first_of_part(groups, begin, parts),
                                              first_of_part(groups, end, parts), aligned);
    const std::lock_guard<std::mutex> held(lock);
    if (met.kind < first.kind || (met.kind == first.kind && met.number < first.number)) first = met;
  });
  if (first.kind != TrainedFault::NOTHING) undo(call.table, update);
  report(call, update, first, step);
}

}  // namespace
}  // namespace torchrec_compress

// Python adds shapes without data, see ops/cpp/trained.py.
STABLE_TORCH_LIBRARY_FRAGMENT(torchrec_compress, library) {
  const std::string batch = "Tensor ids, Tensor? offsets, Tensor? weights, ";
  library.def(("trained_bag(Tensor rows, " + batch + "int width, int bits, bool is_mean, str where) -> Tensor").c_str());
  library.def(
      "trained_bag_weight_gradients(Tensor grads, Tensor rows, Tensor ids, Tensor? offsets, int width, int bits, "
      "bool is_mean, str where) -> Tensor");
  library.def(("trained_bag_update(Tensor(a!) rows, Tensor(b!) state, " + batch +
               "Tensor grads, int width, int bits, int optimizer, int state_bits, bool is_mean, float learning_rate, "
               "float eps, float[] adam, int seed, int step, int first_id, str where) -> ()")
                  .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(torchrec_compress, CPU, library) {
  library.impl("trained_bag", TORCH_BOX(&torchrec_compress::trained_bag));
  library.impl("trained_bag_weight_gradients", TORCH_BOX(&torchrec_compress::trained_bag_weight_gradients));
  library.impl("trained_bag_update", TORCH_BOX(&torchrec_compress::trained_bag_update));
}
