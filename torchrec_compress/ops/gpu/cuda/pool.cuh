// The forward and the gradient of the weights: a warp walks over the ids of a tile of bags.
//
// The prelude also defines
//   VECTOR       columns that a lane reads at once; divides WIDTH
//   CODE_VECTOR  type that a lane reads codes by; its size divides a row of codes
//   WARPS, BLOCKS  warps per block, and blocks that are to fit on a multiprocessor
//   BATCH, BUFFER_BYTES  ids that a warp reads at once, and the bytes of shared memory that it reads their codes into
//   STAGED, BLOCK_COLUMNS, STAGED_ROW  whether codebooks are read from shared memory, columns per block, stride of a
//                staged row
// and FORWARD or BACKWARD_WEIGHTS.
//
// The bags of a tile lie side by side, so their ids are read BATCH at a time across the borders of bags: one lane reads the
// codes of one id into shared memory, which keeps many rows in flight whether bags are short or long. Then all lanes
// visit these ids one after another, each lane with its own columns.

constexpr int COLUMNS = BLOCK_COLUMNS, ROW = STAGED_ROW;
constexpr int CODE_BYTES = M * sizeof(Code);
constexpr int PASSES = (COLUMNS + 32 * VECTOR - 1) / (32 * VECTOR);

// VECTOR neighbouring words, moved by one instruction.
struct alignas(VECTOR * sizeof(Word)) Words {
  Word word[VECTOR];
};

__device__ inline Words load(const Word* from) { return *reinterpret_cast<const Words*>(from); }

__device__ inline void store(Word* to, const float* values) {
  Words words;
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) words.word[v] = to_word(values[v]);
  *reinterpret_cast<Words*>(to) = words;
}

// What one lane knows of the id that it has read.
struct Visited {
  float weight;
  int hot;
};

__device__ inline Visited read_id(const Lookup& t, int64 i, unsigned char* buffer) {
  const Code* codes = t.codes + code_row(t, i) * M;
#pragma unroll
  for (int part = 0; part < CODE_BYTES / int(sizeof(CODE_VECTOR)); ++part)
    reinterpret_cast<CODE_VECTOR*>(buffer)[part] = reinterpret_cast<const CODE_VECTOR*>(codes)[part];
  const Code* own = reinterpret_cast<const Code*>(buffer);
  if (int64(Code(-1)) >= K)
    for (int m = 0; m < M; ++m) check(int64(own[m]) < K, "codebook_bag: every code must be below the codebook size");
  return {HAS_WEIGHTS ? t.weights[i] : 1.0f, int(hot_row(t, own))};
}

// The columns of a lane, and the codewords that it reads.
struct Lane {
  const Lookup& t;
  const Word* staged;  // [K, ROW] codewords of this block's columns, in shared memory
  int first;           // first column of this block
  int column[PASSES];  // first of VECTOR columns
  int chunk[PASSES];   // its code (product)

  __device__ Lane(const Lookup& lookup, const Word* book, int first_column)
      : t(lookup), staged(book), first(first_column) {
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
      column[p] = first + (p * 32 + int(threadIdx.x % 32)) * VECTOR;
      chunk[p] = column[p] / WIDTH;
    }
  }

  __device__ bool is_active(int p) const {
    constexpr bool ALL_ACTIVE = D % COLUMNS == 0 && COLUMNS % (32 * VECTOR) == 0;
    return ALL_ACTIVE || (column[p] < D && column[p] < first + COLUMNS);
  }

  // The VECTOR columns of pass p of one id (product).
  __device__ Words read(int p, const Code* codes, int hot) const {
    if (HAS_HOT && hot >= 0) return load(t.hot_rows + int64(hot) * D + column[p]);
    if (STAGED) return load(staged + int(codes[chunk[p]]) * ROW + column[p] - first);
    const int64 word = int64(chunk[p]) * K + codes[chunk[p]];
    return load(t.codebooks + word * WIDTH + column[p] - chunk[p] * WIDTH);
  }

  // Adds the VECTOR columns of pass p of one id, factor times, to `sums` (residual).
  __device__ void add(int p, const Code* codes, int hot, float factor, float* sums) const {
    if (HAS_HOT && hot >= 0) return add_words(load(t.hot_rows + int64(hot) * D + column[p]), factor, sums);
#pragma unroll 4
    for (int m = 0; m < M; ++m) add_words(load(t.codebooks + (int64(m) * K + codes[m]) * D + column[p]), factor, sums);
  }

  __device__ static void add_words(const Words& words, float factor, float* sums) {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      const float value = to_float(words.word[v]);
      sums[v] = HAS_WEIGHTS ? sums[v] + factor * value : sums[v] + value;
    }
  }

  // Adds N ids, whose codewords are all read before the first is used, id u to sums[u * step].
  template <int N>
  __device__ void add_ids(int p, const Code* const* codes, const int* hot, const float* factor, float* sums,
                          int step) const {
    if (RESIDUAL) {
#pragma unroll
      for (int u = 0; u < N; ++u) add(p, codes[u], hot[u], factor[u], sums + u * step);
      return;
    }
    Words words[N];
#pragma unroll
    for (int u = 0; u < N; ++u) words[u] = read(p, codes[u], hot[u]);
#pragma unroll
    for (int u = 0; u < N; ++u) add_words(words[u], factor[u], sums + u * step);
  }
};

// N ids of one bag; lane first + u has read id u, into the buffer of its warp.
template <int N, typename Visitor>
__device__ inline void visit(Visitor& visitor, int64 i, const Visited& mine, int first, const unsigned char* buffer) {
  const Code* codes[N];
  int hot[N];
  float weight[N];
#pragma unroll
  for (int u = 0; u < N; ++u) {
    codes[u] = reinterpret_cast<const Code*>(buffer + (first + u) * CODE_BYTES);
    weight[u] = HAS_WEIGHTS ? __shfl_sync(ALL, mine.weight, first + u) : 1.0f;
    hot[u] = HAS_HOT ? __shfl_sync(ALL, mine.hot, first + u) : -1;
  }
  visitor.template visit<N>(i, codes, hot, weight);
}

// Calls visitor.start(bag, count), .visit for the ids of the bag, and .finish(bag, count), for every bag of a tile.
template <typename Visitor>
__device__ void walk(const Lookup& t, int64 bag0, int bags, int lane, unsigned char* buffer, Visitor& visitor) {
  // lane j holds where bag j of the tile ends
  const int64 begin = bag_start(t, bag0);
  const int64 end = lane < bags ? bag_start(t, bag0 + lane + 1) : 0;
  const int64 before = __shfl_up_sync(ALL, end, 1);
  check(lane >= bags || (end >= (lane ? before : begin) && begin >= t.first_id && end <= t.first_id + t.num_ids),
        "codebook_bag: offsets must not decrease and must lie among the ids of their feature");
  const int64 last = __shfl_sync(ALL, end, bags - 1);
  int bag = 0;
  int64 bag_begin = begin, bag_end = __shfl_sync(ALL, end, 0);
  visitor.start(bag0, bag_end - bag_begin);
  for (int64 base = begin; base < last; base += BATCH) {
    const int count = int(smaller(BATCH, last - base));
    Visited mine = {0.0f, -1};
    if (lane < count) mine = read_id(t, base + lane, buffer + lane * CODE_BYTES);
    __syncwarp();
    int j = 0;
    while (j < count) {
      for (; base + j >= bag_end; visitor.start(bag0 + bag, bag_end - bag_begin)) {
        visitor.finish(bag0 + bag, bag_end - bag_begin);
        ++bag;
        bag_begin = bag_end;
        bag_end = __shfl_sync(ALL, end, bag);
      }
      const int stop = int(smaller(count, bag_end - base));
      for (; j + 4 <= stop; j += 4) visit<4>(visitor, base + j, mine, j, buffer);
      for (; j < stop; ++j) visit<1>(visitor, base + j, mine, j, buffer);
    }
    __syncwarp();  // the next batch overwrites the codes
  }
  while (true) {
    visitor.finish(bag0 + bag, bag_end - bag_begin);
    if (++bag == bags) return;
    bag_begin = bag_end;
    bag_end = __shfl_sync(ALL, end, bag);
    visitor.start(bag0 + bag, bag_end - bag_begin);
  }
}

// Every warp of the grid takes every so many'th tile of a look-up's bags.
template <typename Visitor>
__device__ void walk_tiles(const Lookup& t, int tile_bags, unsigned char* buffers, Visitor& visitor) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64 stride = int64(gridDim.x) * WARPS * tile_bags;
  if (blockIdx.x == 0 && threadIdx.x == 0)
    check(bag_start(t, 0) == t.first_id && bag_start(t, t.num_bags) == t.first_id + t.num_ids,
          "codebook_bag: offsets must start with the first id of their feature and end with its last");
  for (int64 bag = (int64(blockIdx.x) * WARPS + warp) * tile_bags; bag < t.num_bags; bag += stride)
    walk(t, bag, int(smaller(tile_bags, t.num_bags - bag)), lane, buffers + warp * BUFFER_BYTES, visitor);
}

#if defined(FORWARD)

struct Sum {
  const Lane& lane;
  float sums[PASSES][VECTOR];

  __device__ void start(int64, int64) {
#pragma unroll
    for (int p = 0; p < PASSES; ++p)
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sums[p][v] = 0.0f;
  }

  template <int N>
  __device__ void visit(int64, const Code* const* codes, const int* hot, const float* weight) {
#pragma unroll
    for (int p = 0; p < PASSES; ++p)
      if (lane.is_active(p)) lane.add_ids<N>(p, codes, hot, weight, sums[p], 0);
  }

  __device__ void finish(int64 bag, int64 count) {
    const float scale = MEAN && count > 0 ? 1.0f / float(count) : 1.0f;
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
      if (!lane.is_active(p)) continue;
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sums[p][v] *= scale;
      store(lane.t.rows + bag * lane.t.row_stride + lane.column[p], sums[p]);
    }
  }
};

// Pools the bags of all look-ups. Grid: (blocks per look-up, look-ups, groups of COLUMNS columns), WARPS * 32 threads.
//
// Codewords are staged codeword by codeword, [K, columns]: a lane's bank then depends on its columns alone, whatever
// the codes are, so that no two lanes of a warp meet in a bank.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) codebook_bag_forward(const Lookups lookups, int tile_bags) {
  extern __shared__ __align__(16) unsigned char arena[];
  const Lookup& t = lookups.lookup[blockIdx.y];
  const int first = blockIdx.z * COLUMNS;
  Word* book = reinterpret_cast<Word*>(arena);
  if (STAGED) {
    constexpr int PER_ROW = COLUMNS / VECTOR;
    for (int i = threadIdx.x; i < K * PER_ROW; i += WARPS * 32) {
      const int k = i / PER_ROW, offset = i % PER_ROW * VECTOR, column = first + offset, m = column / WIDTH;
      if (column < D)
        *reinterpret_cast<Words*>(book + k * ROW + offset) =
            load(t.codebooks + (int64(m) * K + k) * WIDTH + column - m * WIDTH);
    }
    __syncthreads();
  }
  const Lane lane(t, book, first);
  Sum sum{lane, {}};
  walk_tiles(t, tile_bags, arena + (STAGED ? K * ROW * sizeof(Word) : 0), sum);
}

#endif

#if defined(BACKWARD_WEIGHTS)

struct Dot {
  const Lane& lane;
  float grads[PASSES][VECTOR];

  __device__ void start(int64 bag, int64 count) {
    const float scale = MEAN && count > 0 ? 1.0f / float(count) : 1.0f;
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
      if (!lane.is_active(p)) continue;
      const Words words = load(lane.t.rows + bag * lane.t.row_stride + lane.column[p]);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) grads[p][v] = scale * to_float(words.word[v]);
    }
  }

  template <int N>
  __device__ void visit(int64 i, const Code* const* codes, const int* hot, const float* weight) {
    float dots[N] = {};
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
      if (!lane.is_active(p)) continue;
      float sums[N][VECTOR] = {};
      lane.add_ids<N>(p, codes, hot, weight, sums[0], VECTOR);
#pragma unroll
      for (int u = 0; u < N; ++u)
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) dots[u] += sums[u][v] * grads[p][v];
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) dots[u] += __shfl_xor_sync(ALL, dots[u], step);
      if (threadIdx.x % 32 == 0) static_cast<float*>(lane.t.result)[i + u - lane.t.first_id] = dots[u];
    }
  }

  __device__ void finish(int64, int64) {}
};

// Writes the gradient of the weights; compiled without HAS_WEIGHTS, which it does not read. Grid: (blocks per look-up, look-ups), WARPS * 32 threads.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) codebook_bag_backward_weights(const Lookups lookups,
                                                                                      int tile_bags) {
  extern __shared__ __align__(16) unsigned char arena[];
  const Lookup& t = lookups.lookup[blockIdx.y];
  const Lane lane(t, nullptr, 0);
  Dot dot{lane, {}};
  walk_tiles(t, tile_bags, arena, dot);
}

#endif

