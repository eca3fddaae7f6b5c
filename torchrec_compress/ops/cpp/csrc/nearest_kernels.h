// Nearest centroids, compiled once per instruction set.
#pragma once
#include "lanes.h"
#include "nearest.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace torchrec_compress {
namespace {

// A tile: ROWS points times VECTORS * SUM_LANES centroids, whose scores are all kept in registers.
#if defined(__AVX512F__)
constexpr int ROWS = 6, VECTORS = 4;
#else
constexpr int ROWS = 4, VECTORS = 2;
#endif
constexpr int N = SUM_LANES, TILE = N * VECTORS;
static_assert(NEAREST_ROWS % ROWS == 0 && N <= 16, "the scratch holds whole tiles");

typedef int32_t Numbers __attribute__((vector_size(N * 4)));
typedef int32_t NumbersInMemory __attribute__((vector_size(N * 4), aligned(4), may_alias));

int64_t num_tiles(int64_t num_centroids) { return (num_centroids + TILE - 1) / TILE; }

int64_t packed_floats(int64_t num_centroids, int64_t width) { return num_tiles(num_centroids) * TILE * (width + 1); }

// A tile's norms, and then, one number of the centroids after another, TILE floats each.
void pack(const NearestCall& call, float* packed) {
  const int64_t size = TILE * (call.width + 1);
  for (int64_t k = 0; k < num_tiles(call.num_centroids) * TILE; ++k) {
    float* to = packed + k / TILE * size + k % TILE;
    float norm = 0;
    for (int64_t j = 0; j < call.width; ++j) {
      const float value =
          k < call.num_centroids ? call.centroids[k * call.width + j] - call.middle[j] : 0.0f;
      norm += value * value;
      to[(j + 1) * TILE] = -2.0f * value;
    }
    to[0] = k < call.num_centroids ? norm : __builtin_inff();  // what fills the last tile is never nearest
  }
}

// Compares ROWS points [width, ROWS] with the centroids of a tile; `best` and `numbers`: N for each point, of the
// lanes' best centroids up to now.
inline void compare(const float* points, const float* tile, int64_t width, int32_t first, float* best,
                    float* numbers) {
  typedef typename Lanes<N>::Vector Vector;
  Vector scores[ROWS][VECTORS];
  UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    const Vector norms = load<N>(tile + v * N);
    UNROLL
    for (int r = 0; r < ROWS; ++r) scores[r][v] = norms;
  }
  for (int64_t j = 0; j < width; ++j) {
    tile += TILE;
    UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const Vector values = load<N>(tile + v * N);
      UNROLL
      for (int r = 0; r < ROWS; ++r) scores[r][v] += points[j * ROWS + r] * values;
    }
  }
  UNROLL
  for (int r = 0; r < ROWS; ++r) {
    Vector least = load<N>(best + r * N);
    NumbersInMemory* found = reinterpret_cast<NumbersInMemory*>(numbers + r * N);
    Numbers number = *found;
    UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const auto is_less = scores[r][v] < least;  // of equals the first stays
      least = is_less ? scores[r][v] : least;
      number = is_less ? Numbers{} + (first + v * N) : number;
    }
    store<N>(best + r * N, least);
    *found = number;
  }
}

void find_some(const NearestCall& call, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = call.width, groups = (end - begin + ROWS - 1) / ROWS;
  float *best = scratch, *numbers = best + NEAREST_ROWS * N, *points = numbers + NEAREST_ROWS * N;
  for (int64_t i = 0; i < groups * ROWS; ++i) {
    const float* from = call.points + (begin + i < end ? begin + i : end - 1) * call.step;
    float* to = points + i / ROWS * ROWS * width + i % ROWS;
    for (int64_t j = 0; j < width; ++j) to[j * ROWS] = from[j] - call.middle[j];
    store<N>(best + i * N, typename Lanes<N>::Vector{} + __builtin_inff());
    *reinterpret_cast<NumbersInMemory*>(numbers + i * N) = Numbers{};
  }
  for (int64_t t = 0; t < num_tiles(call.num_centroids); ++t)
    for (int64_t g = 0; g < groups; ++g)
      compare(points + g * ROWS * width, call.packed + t * TILE * (width + 1), width, int32_t(t * TILE),
              best + g * ROWS * N, numbers + g * ROWS * N);
  for (int64_t i = 0; i < end - begin; ++i) {
    float least = __builtin_inff();
    int64_t nearest = 0;
    for (int lane = 0; lane < N; ++lane) {
      int32_t number;
      __builtin_memcpy(&number, numbers + i * N + lane, 4);
      const float score = best[i * N + lane];
      if (score < least || (score == least && score < __builtin_inff() && number + lane < nearest)) {
        least = score;
        nearest = number + lane;
      }
    }
    const float *point = call.points + (begin + i) * call.step, *centroid = call.centroids + nearest * width;
    float lanes[16] = {}, sum = 0;
    int64_t j = 0;
    for (; j + 16 <= width; j += 16)
      for (int k = 0; k < 16; ++k) lanes[k] += (point[j + k] - centroid[j + k]) * (point[j + k] - centroid[j + k]);
    for (int k = 0; k < 16; ++k) sum += lanes[k];
    for (; j < width; ++j) sum += (point[j] - centroid[j]) * (point[j] - centroid[j]);
    call.index[begin + i] = nearest;
    call.distance[begin + i] = sum;
  }
}

void find(const NearestCall& call, int64_t begin, int64_t end, float* scratch) {
  for (int64_t first = begin; first < end; first += NEAREST_ROWS)
    find_some(call, first, first + NEAREST_ROWS < end ? first + NEAREST_ROWS : end, scratch);
}

}  // namespace

extern const NearestKernels NEAREST;
const NearestKernels NEAREST = {packed_floats, pack, find};

}  // namespace torchrec_compress
