// The operators of nearest centroids: check what they are given, and spread the points over threads.
#include "nearest.h"

#include "processor.h"
#include "tensors.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace torchrec_compress {
namespace {

const NearestKernels& kernels() {
#if defined(__x86_64__)
  static const NearestKernels& chosen = choose(nearest_base, nearest_avx2, nearest_avx512);
  return chosen;
#endif
  return nearest_base;
}

constexpr int64_t PART_WORK = int64_t(1) << 24;  // multiplications below which a second thread costs more than it saves

void check_points(const Tensor& tensor, const char* name) {
  require(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 && tensor.size(1) >= 1 && is_aligned(tensor),
          "nearest: ", name, " must be float32 with 2 dimensions");
}

std::tuple<Tensor, Tensor> nearest(Tensor points, Tensor centroids, Tensor middle) {
  check_points(points, "points");
  check_points(centroids, "centroids");
  require(centroids.size(0) >= 1 && centroids.size(0) < (int64_t(1) << 30), "nearest: centroids must be 1 at least, ",
          "and fewer than 2**30, got ", centroids.size(0));
  require(centroids.size(1) == points.size(1), "nearest: centroids must be as wide as points, ", points.size(1),
          ", got ", centroids.size(1));
  require(middle.scalar_type() == ScalarType::Float && middle.dim() == 1 && middle.size(0) == points.size(1),
          "nearest: middle must be float32, one number a column");
  const Tensor rows = points.stride(1) == 1 || points.size(1) == 1 ? points : laid_out(points);
  const Tensor books = laid_out(centroids), centre = laid_out(middle);
  const int64_t num_points = points.size(0);
  Tensor index = torch::stable::new_empty(points, {num_points}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(points, {num_points}, ScalarType::Float);
  NearestCall call = {};
  call.points = static_cast<const float*>(rows.const_data_ptr());
  call.step = rows.stride(0);
  call.centroids = static_cast<const float*>(books.const_data_ptr());
  call.middle = static_cast<const float*>(centre.const_data_ptr());
  call.num_centroids = books.size(0);
  call.width = books.size(1);
  call.index = static_cast<int64_t*>(index.mutable_data_ptr());
  call.distance = static_cast<float*>(distance.mutable_data_ptr());
  std::vector<float> packed(kernels().packed_floats(call.num_centroids, call.width));
  kernels().pack(call, packed.data());
  call.packed = packed.data();
  const int64_t work = std::max<int64_t>(call.num_centroids * call.width, 1);
  const int64_t grain = (PART_WORK / work / NEAREST_ROWS + 1) * NEAREST_ROWS;
  torch::stable::parallel_for(0, num_points, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(NEAREST_ROWS * (call.width + 2 * 16));
    kernels().find(call, begin, end, scratch.data());
  });
  return {index, distance};
}

// One thread: the sums are few, and one order of adding is one result.
std::tuple<Tensor, Tensor> centroid_sums(Tensor index, Tensor values, Tensor weights, int64_t size) {
  check_points(values, "values");
  require(size >= 0, "centroid_sums: size must be >= 0, got ", size);
  const int64_t num_values = values.size(0), width = values.size(1);
  require(index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.size(0) == num_values,
          "centroid_sums: index must be int64, one number a value");
  require(weights.scalar_type() == ScalarType::Float && weights.dim() == 1 && weights.size(0) == num_values,
          "centroid_sums: weights must be float32, one number a value");
  const Tensor rows = values.stride(1) == 1 || width == 1 ? values : laid_out(values);
  const Tensor numbers = laid_out(index), shares = laid_out(weights);
  using Shape = std::vector<int64_t>;
  Tensor sums = torch::stable::new_zeros(values, Shape{size, width}, ScalarType::Double);
  Tensor mass = torch::stable::new_zeros(values, Shape{size}, ScalarType::Double);
  const float* row = static_cast<const float*>(rows.const_data_ptr());
  const int64_t* number = static_cast<const int64_t*>(numbers.const_data_ptr());
  const float* share = static_cast<const float*>(shares.const_data_ptr());
  double* to_sums = static_cast<double*>(sums.mutable_data_ptr());
  double* to_mass = static_cast<double*>(mass.mutable_data_ptr());
  const int64_t step = rows.stride(0);
  for (int64_t i = 0; i < num_values; ++i, row += step) {
    require(number[i] >= 0 && number[i] < size, "centroid_sums: index must be in [0, ", size, "), got ", number[i]);
    const double weight = share[i];
    double* to = to_sums + number[i] * width;
    to_mass[number[i]] += weight;
    for (int64_t j = 0; j < width; ++j) to[j] += weight * double(row[j]);
  }
  return {sums, mass};
}

}  // namespace
}  // namespace torchrec_compress

// Python adds shapes without data, see ops/cpp/nearest.py.
STABLE_TORCH_LIBRARY_FRAGMENT(torchrec_compress, library) {
  library.def("nearest(Tensor points, Tensor centroids, Tensor middle) -> (Tensor, Tensor)");
  library.def("centroid_sums(Tensor index, Tensor values, Tensor weights, int size) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(torchrec_compress, CPU, library) {
  library.impl("nearest", TORCH_BOX(&torchrec_compress::nearest));
  library.impl("centroid_sums", TORCH_BOX(&torchrec_compress::centroid_sums));
}
