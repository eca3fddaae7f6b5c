// The gradients of codebooks and hot rows. The prelude also defines BACKWARD, with TILE_ROWS codewords and TILE_COLUMNS
// gradient columns per block, which reads the gradients of STAGE_BAGS bags and the codes of STAGE_IDS ids at once, or
// HOT_ROWS.

#if defined(BACKWARD)

// ---- a thread owns one column of the gradient of codebooks
//
// A block holds TILE_ROWS codewords of TILE_COLUMNS columns in shared memory and adds a range of bags to them. A column
// is touched by one thread alone: no atomics (on floats in shared memory they are loops), no bank conflicts, and the
// sum is always taken in the order of the ids. Columns are counted over all codebooks, v = m * WIDTH + w.

constexpr int NUM_COLUMNS = M * WIDTH;
constexpr int STAGE_CODES = (TILE_COLUMNS + WIDTH - 2) / WIDTH + 1;  // codes that meet a block's columns
constexpr int NO_ROW = TILE_ROWS;  // a row of the tile for codewords of other blocks; it is never written out

struct Stage {
  float tile[(TILE_ROWS + 1) * TILE_COLUMNS];
  float grads[STAGE_BAGS * TILE_COLUMNS];
  float weights[STAGE_IDS];
  int64 ends[STAGE_BAGS + 1];
  unsigned short rows[STAGE_IDS * STAGE_CODES];  // which row of the tile a code means
};

// Reads which rows of the tile the codes of ids [base, base + count) mean.
__device__ inline void read_codes(const Lookup& t, Stage& stage, int64 base, int count, int first_code, int first_row) {
  for (int x = threadIdx.x; x < count * STAGE_CODES; x += TILE_COLUMNS) {
    const int i = x / STAGE_CODES, m = first_code + x % STAGE_CODES;
    int row = NO_ROW;
    if (m < M) {
      const Code* codes = t.codes + code_row(t, base + i) * M;
      const int64 found = int64(codes[m]) - first_row;
      const bool is_hot = HAS_HOT && int64(codes[0]) >= t.first_size;
      if (!is_hot && found >= 0 && found < TILE_ROWS) row = int(found);
    }
    stage.rows[x] = (unsigned short)(row);
  }
  if (HAS_WEIGHTS)
    for (int i = threadIdx.x; i < count; i += TILE_COLUMNS) stage.weights[i] = t.weights[base + i];
}

// Adds one column's gradient to the codewords of ids [j, stop). Four codewords are in flight; where two ids mean the
// same one, the later takes the sum of the earlier, so that the result is that of adding them in order.
__device__ inline void scatter(Stage& stage, int j, int stop, int code, float grad) {
  float* column = stage.tile + threadIdx.x;
  const unsigned short* rows = stage.rows + code;
  for (; j + 4 <= stop; j += 4) {
    int row[4];
    float sum[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) row[u] = rows[(j + u) * STAGE_CODES];
#pragma unroll
    for (int u = 0; u < 4; ++u) sum[u] = column[row[u] * TILE_COLUMNS];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
#pragma unroll
      for (int earlier = 0; earlier < u; ++earlier) sum[u] = row[u] == row[earlier] ? sum[earlier] : sum[u];
      sum[u] += HAS_WEIGHTS ? grad * stage.weights[j + u] : grad;
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) column[row[u] * TILE_COLUMNS] = sum[u];
  }
  for (; j < stop; ++j)
    column[rows[j * STAGE_CODES] * TILE_COLUMNS] += HAS_WEIGHTS ? grad * stage.weights[j] : grad;
}

// Adds the bags [first_bag, first_bag + bags), at most STAGE_BAGS.
__device__ inline void add_bags(const Lookup& t, Stage& stage, int64 first_bag, int bags, int v, int first_code,
                                int first_row) {
  __syncthreads();  // the bags before are done with `ends`
  for (int b = threadIdx.x; b <= bags; b += TILE_COLUMNS) stage.ends[b] = bag_start(t, first_bag + b);
  __syncthreads();
  const int column = RESIDUAL ? v % WIDTH : v, code = v / WIDTH - first_code;
  const bool is_active = v < NUM_COLUMNS;
  for (int b = 0; b < bags; b += 8) {
    float grads[8];  // eight loads in flight
#pragma unroll
    for (int u = 0; u < 8; ++u)
      grads[u] = is_active && b + u < bags ? to_float(t.rows[(first_bag + b + u) * t.row_stride + column]) : 0.0f;
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      if (b + u >= bags) break;
      const int64 count = stage.ends[b + u + 1] - stage.ends[b + u];
      stage.grads[(b + u) * TILE_COLUMNS + threadIdx.x] = MEAN && count > 0 ? grads[u] / float(count) : grads[u];
    }
  }
  const int64 last = stage.ends[bags];
  int bag = 0;
  for (int64 base = stage.ends[0]; base < last; base += STAGE_IDS) {
    const int count = int(smaller(STAGE_IDS, last - base));
    __syncthreads();  // the ids before are done with `rows`
    read_codes(t, stage, base, count, first_code, first_row);
    __syncthreads();
    int j = 0;
    while (j < count) {
      while (base + j >= stage.ends[bag + 1]) ++bag;
      const int stop = int(smaller(count, stage.ends[bag + 1] - base));
      if (is_active) scatter(stage, j, stop, code, stage.grads[bag * TILE_COLUMNS + threadIdx.x]);
      j = stop;
    }
  }
}

// Adds up the gradient of codebooks, chunk of bags by chunk of bags. Grid: (chunks, look-ups, blocks of columns * blocks
// of codewords), TILE_COLUMNS threads.
extern "C" __global__ void __launch_bounds__(TILE_COLUMNS) codebook_bag_backward(const Lookups lookups,
                                                                                int64 chunk_bags) {
  extern __shared__ __align__(16) unsigned char arena[];
  Stage& stage = *reinterpret_cast<Stage*>(arena);
  constexpr int BLOCKS = (NUM_COLUMNS + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const Lookup& t = lookups.lookup[blockIdx.y];
  const int first_v = blockIdx.z % BLOCKS * TILE_COLUMNS, first_row = blockIdx.z / BLOCKS * TILE_ROWS;
  const int v = first_v + threadIdx.x;
  for (int row = 0; row <= TILE_ROWS; ++row) stage.tile[row * TILE_COLUMNS + threadIdx.x] = 0.0f;
  const int64 begin = smaller(t.num_bags, blockIdx.x * chunk_bags), end = smaller(t.num_bags, begin + chunk_bags);
  for (int64 bag = begin; bag < end; bag += STAGE_BAGS)
    add_bags(t, stage, bag, int(smaller(STAGE_BAGS, end - bag)), v, first_v / WIDTH, first_row);
  if (v >= NUM_COLUMNS) return;
  float* out = static_cast<float*>(t.result) + int64(blockIdx.x) * K * NUM_COLUMNS + v;
  for (int row = 0; row < TILE_ROWS && first_row + row < K; ++row)
    out[int64(first_row + row) * NUM_COLUMNS] = stage.tile[row * TILE_COLUMNS + threadIdx.x];
}

// Adds the chunks in order and writes codebooks as they are stored. Grid: (blocks, look-ups), 256 threads.
extern "C" __global__ void codebook_bag_reduce(const Lookups lookups) {
  const Lookup& t = lookups.lookup[blockIdx.y];
  const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x, size = int64(K) * NUM_COLUMNS;
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int chunk = 0; chunk < t.num_chunks; ++chunk) sum += static_cast<const float*>(t.result)[chunk * size + i];
  const int k = int(i / NUM_COLUMNS), v = int(i % NUM_COLUMNS), m = v / WIDTH;
  static_cast<Word*>(t.second)[(int64(m) * K + k) * WIDTH + v - m * WIDTH] = to_word(sum);
}

#endif

#if defined(HOT_ROWS)

// Writes the hot row (or H) and the bag of every id. Grid: (blocks, look-ups), a warp per bag.
extern "C" __global__ void codebook_bag_hot_index(const Lookups lookups) {
  const Lookup& t = lookups.lookup[blockIdx.y];
  const int64 bag = (int64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (bag >= t.num_bags) return;
  const int64 end = bag_start(t, bag + 1);
  for (int64 i = bag_start(t, bag) + threadIdx.x % 32; i < end; i += 32) {
    const int64 hot = hot_row(t, t.codes + code_row(t, i) * M);
    static_cast<int*>(t.result)[i - t.first_id] = int(hot < 0 ? t.num_hot : hot);
    static_cast<int*>(t.second)[i - t.first_id] = int(bag);
  }
}

// Sums the gradient rows of ids order[bounds[s]] .. order[bounds[s + 1]] into segment s. Grid: (segments, 1), 32 threads
// per 32 columns, at most 1024.
extern "C" __global__ void codebook_bag_sum_segments(const Lookups lookups, const int64* order, const int64* bounds,
                                                     float* out) {
  const Lookup& t = lookups.lookup[0];
  const int64 segment = blockIdx.x;
  for (int column = threadIdx.x; column < D; column += blockDim.x) {
    float sum = 0.0f;
    for (int64 p = bounds[segment]; p < bounds[segment + 1]; ++p) {
      const int64 i = order[p], bag = static_cast<const int*>(t.second)[i];
      const int64 count = bag_start(t, bag + 1) - bag_start(t, bag);
      const float scale = (HAS_WEIGHTS ? t.weights[t.first_id + i] : 1.0f) / (MEAN ? float(count) : 1.0f);
      sum += scale * to_float(t.rows[bag * t.row_stride + column]);
    }
    out[segment * D + column] = sum;
  }
}

// Adds the segments of each hot row in order: those in [firsts[h], firsts[h + 1]). Grid: (H, 1).
extern "C" __global__ void codebook_bag_sum_hot_rows(const float* segments, const int64* firsts, Word* out) {
  const int64 row = blockIdx.x;
  for (int column = threadIdx.x; column < D; column += blockDim.x) {
    float sum = 0.0f;
    for (int64 s = firsts[row]; s < firsts[row + 1]; ++s) sum += segments[s * D + column];
    out[row * D + column] = to_word(sum);
  }
}

#endif
