// Nearest centroids (ops/nearest.py): what their kernels are told. Free of torch and of the standard library.
#pragma once
#include <cstdint>

namespace torchrec_compress {

constexpr int NEAREST_ROWS = 96;  // points that pass over all centroids together, while they stay in a near cache

// Points and centroids, squared distances between which are compared.
struct NearestCall {
  const float* points;  // [num_points, width], `step` floats from point to point
  int64_t step;
  const float* centroids;  // [num_centroids, width]
  const float* middle;     // [width] that both are moved by, so that float32 loses less to cancellation
  const float* packed;     // what `pack` has made of the centroids
  int64_t num_centroids;
  int64_t width;
  int64_t* index;   // [num_points], written
  float* distance;  // [num_points], written
};

struct NearestKernels {
  // Returns the floats of `packed`.
  int64_t (*packed_floats)(int64_t num_centroids, int64_t width);
  // Writes the centroids, moved, -2 times each, side by side in vectors, and their squared norms.
  void (*pack)(const NearestCall&, float* packed);
  // Finds the nearest centroids of points [begin, end); scratch: NEAREST_ROWS * (width + 2 * 16) floats.
  void (*find)(const NearestCall&, int64_t begin, int64_t end, float* scratch);
};

extern const NearestKernels nearest_base;
#if defined(__x86_64__)
extern const NearestKernels nearest_avx2, nearest_avx512;
#endif

}  // namespace torchrec_compress
