// What the operators are given, checked: an error is a ValueError in Python. Included by codebook_bags.cpp alone.
#pragma once
#include "codebook_bags.h"
#include "tensors.h"

#include <algorithm>
#include <optional>
#include <vector>

namespace torchrec_compress {
namespace {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<int64_t>;

// What kernels read through an address, kept for as long as this lives.
class Operands {
 public:
  const void* address(const Tensor& tensor) {
    kept_.push_back(laid_out(tensor));
    return kept_.back().const_data_ptr();
  }

  const float* floats(const Tensor& tensor, const char* name, int64_t dim) {
    require(tensor.scalar_type() == ScalarType::Float && tensor.dim() == dim, "codebook_bag: ", name,
            " must be float32 with ", dim, " dimensions; call torchrec_compress.ops.codebook_bags");
    return static_cast<const float*>(address(tensor));
  }

  // Whole numbers, and their width in bytes.
  const void* integers(const Tensor& tensor, const char* name, int* bytes) {
    const ScalarType type = tensor.scalar_type();
    require((type == ScalarType::Int || type == ScalarType::Long) && tensor.dim() == 1, "codebook_bag: ", name,
            " must be int32 or int64 with 1 dimension");
    *bytes = type == ScalarType::Int ? 4 : 8;
    return address(tensor);
  }

 private:
  Tensors kept_;
};

// The flags of a look-up, as ops/cpu.py writes them.
enum Flags : int64_t { RESIDUAL = 1, MEAN = 2, GATHERED = 4, PACKED = 8, ODD = 16 };
constexpr size_t PLAN = 4;  // numbers per look-up: table, its hot rows or -1, flags, its place in a saved row

// All that the operators are given.
struct Call {
  Operands operands;
  Batch batch = {};
  int64_t num_bags = 0;  // of all features
  bool is_weighted = false;
  std::vector<Lookup> lookups;
  std::vector<int64_t> tables;
  Numbers plan;

  int64_t hot(size_t l) const { return plan[l * PLAN + 1]; }

  void set_batch(const std::optional<Tensor>& ids, const std::optional<Tensor>& offsets,
                 const std::optional<Tensor>& weights) {
    batch.num_ids = -1;
    if (ids) {
      batch.ids = operands.integers(*ids, "ids", &batch.id_bytes);
      batch.num_ids = ids->numel();
    }
    is_weighted = weights.has_value();
    if (weights) {
      batch.weights = operands.floats(*weights, "weights", 1);
      require(!ids || weights->numel() == batch.num_ids, "codebook_bag: weights must be one per id, ", batch.num_ids,
              ", got ", weights->numel());
      batch.num_ids = weights->numel();
    }
    if (!offsets) {
      num_bags = batch.num_ids;
      return;
    }
    batch.offsets = operands.integers(*offsets, "offsets", &batch.offset_bytes);
    require(offsets->numel() >= 1, "codebook_bag: offsets must be of shape (B + 1,), got none");
    num_bags = offsets->numel() - 1;
    check_offsets(batch.offsets, batch.offset_bytes, num_bags, batch.num_ids, "codebook_bag");
  }

  int64_t offset(int64_t bag) const { return batch.offsets ? read(batch.offsets, batch.offset_bytes, bag) : bag; }

  // Reads codes, the plan and the ranges of bags.
  void set_lookups(const Tensors& codes, Numbers given_plan, const Numbers& bags) {
    plan = std::move(given_plan);
    require(!codes.empty() && plan.size() == codes.size() * PLAN && bags.size() == codes.size() * 2,
            "codebook_bag: plan and bags must have entries for each of ", codes.size(), " look-ups");
    if (!batch.offsets) count_positions(codes, bags);
    lookups.resize(codes.size());
    for (size_t l = 0; l < codes.size(); ++l) {
      Lookup& lookup = lookups[l];
      const ScalarType type = codes[l].scalar_type();
      require((type == ScalarType::Byte || type == ScalarType::Short || type == ScalarType::Int) &&
                  codes[l].dim() == 2 && codes[l].size(1) >= 1,
              "codebook_bag: codes must be uint8, int16 or int32 of shape (rows, M), M at least 1");
      const int64_t flags = plan[l * PLAN + 2];
      // a backward reads a table's codes where the forward has kept them
      const bool is_read = flags & GATHERED || batch.ids;
      lookup.codes = is_read ? static_cast<const char*>(operands.address(codes[l])) : nullptr;
      lookup.code_bytes = int(codes[l].element_size());
      lookup.num_rows = codes[l].size(0);
      lookup.is_packed = flags & PACKED;
      require(!lookup.is_packed || type == ScalarType::Byte, "codebook_bag: packed codes must be uint8");
      lookup.num_codes = lookup.is_packed ? 2 * codes[l].size(1) - bool(flags & ODD) : codes[l].size(1);
      lookup.stride = codes[l].size(1) * lookup.code_bytes;
      lookup.is_residual = flags & RESIDUAL;
      lookup.is_mean = flags & MEAN;
      lookup.is_gathered = flags & GATHERED;
      lookup.first_bag = bags[2 * l];
      lookup.num_bags = bags[2 * l + 1];
      set_rows(lookup);
      tables.push_back(plan[l * PLAN]);
    }
  }

  // Without offsets, gathered codes say how many positions there are at least, and where no ids do, how many.
  void count_positions(const Tensors& codes, const Numbers& bags) {
    int64_t end = 0;
    bool are_gathered = true;
    for (size_t l = 0; l < codes.size(); ++l) {
      const bool is_gathered = plan[l * PLAN + 2] & GATHERED;
      if (is_gathered) end = std::max(end, bags[2 * l] + codes[l].size(0));
      are_gathered &= is_gathered;
    }
    require(!is_weighted || (are_gathered ? batch.num_ids == end : batch.num_ids >= end),
            "codebook_bag: weights must be one per id, ", end, ", got ", batch.num_ids);
    if (num_bags < 0) num_bags = end;
  }

  void set_rows(Lookup& lookup) {
    require(lookup.first_bag >= 0 && lookup.num_bags >= 0 && lookup.first_bag + lookup.num_bags <= num_bags,
            "codebook_bag: the bags of a look-up must be among the ", num_bags, " of the batch, got ",
            lookup.num_bags, " from ", lookup.first_bag, " on");
    if (!lookup.is_gathered) return;
    lookup.first_row = offset(lookup.first_bag);
    const int64_t num_ids = offset(lookup.first_bag + lookup.num_bags) - lookup.first_row;
    require(num_ids == lookup.num_rows, "codebook_bag: offsets must end with the number of ids, ", lookup.num_rows,
            ", got ", num_ids);
  }

  // Says how many codewords a look-up's table has, of what width, and how many hot rows.
  void set_sizes(size_t l, int64_t num_words, int64_t width, int64_t num_hot) {
    Lookup& lookup = lookups[l];
    require(num_words > 0 && num_words % lookup.num_codes == 0,
            "codebook_bag: codebooks must hold the same number of codewords, at least one, for each of ",
            lookup.num_codes, " codes, got ", num_words, " in all");
    lookup.codebook_size = num_words / lookup.num_codes;
    require(!lookup.is_packed || lookup.codebook_size <= 16,
            "codebook_bag: packed codes must be of at most 16 codewords, got ", lookup.codebook_size);
    lookup.width = width;
    lookup.dim = lookup.is_residual ? width : width * lookup.num_codes;
    lookup.num_hot = num_hot;
    int64_t reach = 1;  // K**(M - 1) hot rows per escape code
    for (int64_t m = 1; m < lookup.num_codes && reach < num_hot; ++m) reach *= lookup.codebook_size;
    lookup.first_size = lookup.codebook_size - (num_hot + reach - 1) / reach;
    require(lookup.first_size >= 0 && num_hot < (int64_t(1) << 31),
            "codebook_bag: hot_rows must be at most what the first codebook's escapes reach, got ", num_hot);
  }

  void set_tables(const Tensors& codebooks, const Tensors& hot_rows) {
    for (size_t l = 0; l < lookups.size(); ++l) {
      Lookup& lookup = lookups[l];
      const Tensor& books = at(codebooks, tables[l], "codebooks");
      lookup.codebooks = operands.floats(books, "codebooks", 2);
      const Tensor* rows = hot(l) < 0 ? nullptr : &at(hot_rows, hot(l), "hot_rows");
      set_sizes(l, books.size(0), books.size(1), rows ? rows->size(0) : 0);
      if (!rows) continue;
      set_hot_rows(lookup, *rows);
    }
  }

  // Rows of floats, or of bytes, whose number says how many bits a value has (ops/lowbit.py).
  void set_hot_rows(Lookup& lookup, const Tensor& rows) {
    const bool is_low = rows.scalar_type() == ScalarType::Byte;
    require((is_low || rows.scalar_type() == ScalarType::Float) && rows.dim() == 2,
            "codebook_bag: hot_rows must be float32 or uint8 with 2 dimensions");
    const int64_t width = rows.size(1), dim = lookup.dim;
    lookup.hot_bits = !is_low ? 32 : width == dim + 4 ? 8 : 4;
    require(width == (is_low ? dim * lookup.hot_bits / 8 + 4 : dim) && (lookup.hot_bits > 4 || dim % 4 == 0),
            "codebook_bag: hot_rows must be ", dim, " wide, or ", dim, " + 4 or ", dim, " / 2 + 4 bytes, got ", width);
    lookup.hot_rows = static_cast<const char*>(operands.address(rows));
    lookup.hot_stride = width * int64_t(rows.element_size());
  }

  static const Tensor& at(const Tensors& tensors, int64_t i, const char* name) {
    require(i >= 0 && i < int64_t(tensors.size()), "codebook_bag: plan must name one of ", tensors.size(), " ", name,
            ", got ", i);
    return tensors[i];
  }

  // Lays the outputs side by side, or flat one after another; returns the shape of all.
  Numbers lay_out(bool is_flat) {
    int64_t columns = 0, floats = 0;
    for (const Lookup& lookup : lookups) {
      columns += lookup.dim;
      floats += lookup.dim * lookup.num_bags;
      require(is_flat || lookup.num_bags == lookups[0].num_bags, "codebook_bag: look-ups side by side must have ",
              lookups[0].num_bags, " bags each, got ", lookup.num_bags);
    }
    for (Lookup& lookup : lookups) lookup.row_step = is_flat ? lookup.dim : columns;
    return is_flat ? Numbers{floats} : Numbers{lookups[0].num_bags, columns};
  }

  // Where each look-up's part of the output begins.
  Numbers starts(bool is_flat) const {
    Numbers found;
    int64_t start = 0;
    for (const Lookup& lookup : lookups) {
      found.push_back(start);
      start += lookup.dim * (is_flat ? lookup.num_bags : 1);
    }
    return found;
  }

  // Places for the codes of positions, [L, row bytes].
  void set_saved(const Tensor& saved, char* data) {
    for (size_t l = 0; l < lookups.size(); ++l) {
      Lookup& lookup = lookups[l];
      if (lookup.is_gathered) continue;
      const int64_t place = plan[l * PLAN + 3], row_bytes = saved.size(1);
      require(saved.size(0) == batch.num_ids && place >= 0 && place % lookup.code_bytes == 0 &&
                  place + window_stride(lookup) <= row_bytes && row_bytes % lookup.code_bytes == 0,
              "codebook_bag: a look-up's codes must have their place in a saved row of ", row_bytes, " bytes, got ",
              window_stride(lookup), " at ", place);
      lookup.saved = data + place;
      lookup.saved_step = row_bytes;
    }
  }

  // In the backward, codes are those of positions: given, or kept by the forward.
  void read_saved(const Tensor& saved) {
    batch.num_ids = saved.size(0);
    set_saved(saved, static_cast<char*>(const_cast<void*>(saved.const_data_ptr())));
    for (Lookup& lookup : lookups) {
      if (lookup.is_gathered) continue;
      const int64_t last = offset(lookup.first_bag + lookup.num_bags);
      require(last <= batch.num_ids, "codebook_bag: saved must have a row for each of ", last, " ids");
      lookup.codes = lookup.saved;
      lookup.stride = lookup.saved_step;
      lookup.is_packed = false;
      lookup.first_row = 0;
      lookup.is_gathered = true;
    }
  }

  // Reads a gradient in place where its rows are whole, as in columns of a concatenation; returns what must be kept.
  Tensor set_grad(const Tensor& grad, bool is_flat) {
    const Numbers shape = lay_out(is_flat);
    bool fits = grad.scalar_type() == ScalarType::Float && grad.dim() == int64_t(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = grad.size(i) == shape[i];
    require(fits, "codebook_bag: grad must be float32 of the output's shape");
    const bool is_in_place = grad.stride(grad.dim() - 1) == 1 && is_aligned(grad);
    const Tensor rows = is_in_place ? grad : laid_out(grad);
    const Numbers first = starts(is_flat);
    for (size_t l = 0; l < lookups.size(); ++l) {
      lookups[l].grad = static_cast<const float*>(rows.const_data_ptr()) + first[l];
      if (!is_flat) lookups[l].row_step = rows.stride(0);
    }
    return rows;
  }
};

}  // namespace
}  // namespace torchrec_compress
