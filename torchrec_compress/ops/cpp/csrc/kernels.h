// The kernels, compiled once per instruction set. The includer defines KERNELS and KERNELS_NAME.
//
// A row of the output stays in registers while the ids of a bag are summed: product bags in groups of CHUNKS codes,
// residual bags in tiles of columns. The codebooks (128 KB for D = 128, K = 256) live in L2.
#include "gather.h"
#include "hot.h"
#include "lanes.h"
#include "plain_hot.h"

namespace torchrec_compress {
namespace {

constexpr int64_t SCATTER = 4;  // codes per piece of the backward

// The ids of one bag that lie in a window.
template <typename Code>
struct Part {
  const char* row;  // of the first id
  int64_t stride;
  const float* weights;  // step 0 repeats a one
  const int32_t* hot;
  const char* const* ahead;
  int64_t first, count, weight_step;
  float scale;  // of the bag's sum
  bool is_first, is_last;

  Part(const Batch& batch, const Lookup& lookup, const Window& window, int64_t begin, int64_t end) {
    first = begin > window.first ? begin : window.first;
    const int64_t last = end < window.last ? end : window.last;
    count = last - first;
    is_first = begin >= window.first;
    is_last = end <= window.last;
    const int64_t skipped = first - window.first;
    stride = window.stride;
    row = window.codes + skipped * stride;
    weights = batch.weights ? batch.weights + first : &ONE;
    weight_step = batch.weights ? 1 : 0;
    hot = window.hot ? window.hot + skipped : nullptr;
    ahead = window.ahead + skipped;
    scale = lookup.is_mean && end - begin > 1 ? 1.0f / float(end - begin) : 1.0f;
  }

  inline const Code* codes(int64_t i) const { return reinterpret_cast<const Code*>(row + i * stride); }
};

// Calls `work` for every part of bags [begin, end); returns what was wrong with their codes.
template <typename Code, typename Work>
__attribute__((always_inline)) inline Wrong for_parts(const Batch& batch, const Lookup& lookup, int64_t begin,
                                                      int64_t end, bool is_new, char* scratch, const Work& work) {
  if (begin == end) return {Wrong::NOTHING, 0};
  int64_t bag = begin, from = offset(batch, bag), to = offset(batch, bag + 1);
  Windows<Code> windows(batch, lookup, from, offset(batch, end), scratch);
  while (bag < end) {
    const Wrong wrong = windows.next(is_new);
    if (wrong.kind != Wrong::NOTHING) return wrong;
    for (;;) {
      work(Part<Code>(batch, lookup, windows.window, from, to), bag - lookup.first_bag);
      if (to > windows.window.last) break;  // goes on in the next window
      if (++bag == end) break;
      from = to;
      to = offset(batch, bag + 1);
    }
  }
  return {Wrong::NOTHING, 0};
}

template <int N>
struct Constant {
  static constexpr int VALUE = N;
};

// ---- product, WIDTH columns per code known to the compiler

template <typename Code, int WIDTH, int CHUNKS, bool HOT, bool AHEAD>
inline void product_sum(const Lookup& lookup, const Part<Code>& part, int64_t m, float* out) {
  constexpr int N = WIDTH < LANES ? WIDTH : LANES, PARTS = WIDTH / N;
  static_assert(CHUNKS * WIDTH <= HOT_COLUMNS, "a buffer for hot rows");
  typename Lanes<N>::Vector sums[CHUNKS][PARTS] = {};
  const int64_t size = lookup.codebook_size;
  const float* books = lookup.codebooks + m * size * WIDTH;
  out += m * WIDTH;
  if (!part.is_first)
    for (int c = 0; c < CHUNKS; ++c)
      for (int p = 0; p < PARTS; ++p) sums[c][p] = load<N>(out + c * WIDTH + p * N);
  for (int64_t i = 0; i < part.count; ++i) {
    if (AHEAD) __builtin_prefetch(part.ahead[i]);
    const Code* codes = part.codes(i) + m;
    const float weight = part.weights[i * part.weight_step];
    if (HOT && part.hot[i] >= 0) {
      float columns[HOT_COLUMNS];
      const float* row = hot_columns(lookup, part.hot[i], m * WIDTH, CHUNKS * WIDTH, columns);
      for (int c = 0; c < CHUNKS; ++c)
        for (int p = 0; p < PARTS; ++p) sums[c][p] += weight * load<N>(row + c * WIDTH + p * N);
      continue;
    }
    for (int c = 0; c < CHUNKS; ++c) {
      const float* word = books + (c * size + codes[c]) * WIDTH;
      for (int p = 0; p < PARTS; ++p) sums[c][p] += weight * load<N>(word + p * N);
    }
  }
  const float scale = part.is_last ? part.scale : 1.0f;
  for (int c = 0; c < CHUNKS; ++c)
    for (int p = 0; p < PARTS; ++p) store<N>(out + c * WIDTH + p * N, scale * sums[c][p]);
}

template <typename Code, int WIDTH, bool HOT>
__attribute__((always_inline)) inline Wrong product_forward(const Batch& batch, const Lookup& lookup, int64_t begin,
                                                            int64_t end, char* scratch) {
  constexpr int CHUNKS = WIDTH <= LANES ? 8 : WIDTH <= 2 * LANES ? 4 : 2;  // eight vector registers of sums
  return for_parts<Code>(batch, lookup, begin, end, true, scratch, [&](const Part<Code>& part, int64_t bag) {
    float* out = lookup.out + bag * lookup.row_step;
    int64_t m = 0;
    if (m + CHUNKS <= lookup.num_codes) {
      product_sum<Code, WIDTH, CHUNKS, HOT, true>(lookup, part, m, out);
      m += CHUNKS;
    }
    for (; m + CHUNKS <= lookup.num_codes; m += CHUNKS)
      product_sum<Code, WIDTH, CHUNKS, HOT, false>(lookup, part, m, out);
    for (; m < lookup.num_codes; ++m) product_sum<Code, WIDTH, 1, HOT, false>(lookup, part, m, out);
  });
}

template <typename Code, int WIDTH, int CHUNKS, bool HOT>
void product_scatter(const Batch& batch, const Lookup& lookup, int64_t m, char* scratch) {
  constexpr int N = WIDTH < LANES ? WIDTH : LANES, PARTS = WIDTH / N;
  const int64_t size = lookup.codebook_size, begin = lookup.first_bag, end = begin + lookup.num_bags;
  float* books = lookup.grad_codebooks ? lookup.grad_codebooks + m * size * WIDTH : nullptr;
  for_parts<Code>(batch, lookup, begin, end, false, scratch, [&](const Part<Code>& part, int64_t bag) {
    typename Lanes<N>::Vector grad[CHUNKS][PARTS];
    const float* from = lookup.grad + bag * lookup.row_step + m * WIDTH;
    for (int line = 0; line < CHUNKS * WIDTH; line += 16) __builtin_prefetch(from + BAGS_AHEAD * lookup.row_step + line);
    for (int c = 0; c < CHUNKS; ++c)
      for (int p = 0; p < PARTS; ++p) grad[c][p] = part.scale * load<N>(from + c * WIDTH + p * N);
    for (int64_t i = 0; i < part.count; ++i) {
      const Code* codes = part.codes(i) + m;
      const float weight = part.weights[i * part.weight_step];
      const bool is_hot = HOT && part.hot[i] >= 0;
      if (!(is_hot ? lookup.grad_hot_rows : books)) continue;
      for (int c = 0; c < CHUNKS; ++c) {
        float* slot = is_hot ? lookup.grad_hot_rows + part.hot[i] * lookup.dim + (m + c) * WIDTH
                             : books + (c * size + codes[c]) * WIDTH;
        for (int p = 0; p < PARTS; ++p) store<N>(slot + p * N, load<N>(slot + p * N) + weight * grad[c][p]);
      }
    }
  });
}

template <typename Code, int WIDTH, bool HOT>
void product_backward(const Batch& batch, const Lookup& lookup, int64_t m, int64_t end, char* scratch) {
  for (; m + SCATTER <= end; m += SCATTER) product_scatter<Code, WIDTH, SCATTER, HOT>(batch, lookup, m, scratch);
  for (; m < end; ++m) product_scatter<Code, WIDTH, 1, HOT>(batch, lookup, m, scratch);
}

// ---- product, any width

template <typename Code>
Wrong product_forward_any(const Batch& batch, const Lookup& lookup, int64_t begin, int64_t end, char* scratch) {
  const int64_t width = lookup.width;
  return for_parts<Code>(batch, lookup, begin, end, true, scratch, [&](const Part<Code>& part, int64_t bag) {
    float* __restrict out = lookup.out + bag * lookup.row_step;
    if (part.is_first)
      for (int64_t j = 0; j < lookup.dim; ++j) out[j] = 0.0f;
    for (int64_t i = 0; i < part.count; ++i) {
      __builtin_prefetch(part.ahead[i]);
      const float weight = part.weights[i * part.weight_step];
      if (part.hot && part.hot[i] >= 0) {
        for_hot_columns(lookup, part.hot[i], [&](const float* columns, int64_t first, int64_t count) {
          for (int64_t j = 0; j < count; ++j) out[first + j] += weight * columns[j];
        });
        continue;
      }
      for (int64_t m = 0; m < lookup.num_codes; ++m) {
        const float* word = lookup.codebooks + (m * lookup.codebook_size + part.codes(i)[m]) * width;
        for (int64_t j = 0; j < width; ++j) out[m * width + j] += weight * word[j];
      }
    }
    if (part.is_last && part.scale != 1.0f)
      for (int64_t j = 0; j < lookup.dim; ++j) out[j] *= part.scale;
  });
}

template <typename Code>
void product_backward_any(const Batch& batch, const Lookup& lookup, int64_t first, int64_t last, char* scratch) {
  const int64_t width = lookup.width, begin = lookup.first_bag, end = begin + lookup.num_bags;
  for_parts<Code>(batch, lookup, begin, end, false, scratch, [&](const Part<Code>& part, int64_t bag) {
    for (int64_t i = 0; i < part.count; ++i) {
      const float weight = part.weights[i * part.weight_step] * part.scale;
      const bool is_hot = part.hot && part.hot[i] >= 0;
      if (!(is_hot ? lookup.grad_hot_rows : lookup.grad_codebooks)) continue;
      for (int64_t m = first; m < last; ++m) {
        const float* __restrict grad = lookup.grad + bag * lookup.row_step + m * width;
        float* __restrict slot = is_hot
            ? lookup.grad_hot_rows + part.hot[i] * lookup.dim + m * width
            : lookup.grad_codebooks + (m * lookup.codebook_size + part.codes(i)[m]) * width;
        for (int64_t j = 0; j < width; ++j) slot[j] += weight * grad[j];
      }
    }
  });
}

// ---- residual, in tiles of PARTS vectors of N columns

template <typename Code, int N, int PARTS>
inline void residual_sum(const Lookup& lookup, const Part<Code>& part, int64_t column, float* out) {
  static_assert(PARTS * N <= HOT_COLUMNS, "a buffer for hot rows");
  typename Lanes<N>::Vector sums[PARTS] = {};
  float columns[HOT_COLUMNS];
  if (!part.is_first)
    for (int p = 0; p < PARTS; ++p) sums[p] = load<N>(out + column + p * N);
  for (int64_t i = 0; i < part.count; ++i) {
    const Code* codes = part.codes(i);
    const float weight = part.weights[i * part.weight_step];
    const bool is_hot = part.hot && part.hot[i] >= 0;
    const int64_t words = is_hot ? 1 : lookup.num_codes;
    for (int64_t m = 0; m < words; ++m) {
      const float* word = is_hot ? hot_columns(lookup, part.hot[i], column, PARTS * N, columns)
                                 : lookup.codebooks + (m * lookup.codebook_size + codes[m]) * lookup.dim + column;
      for (int p = 0; p < PARTS; ++p) sums[p] += weight * load<N>(word + p * N);
    }
  }
  const float scale = part.is_last ? part.scale : 1.0f;
  for (int p = 0; p < PARTS; ++p) store<N>(out + column + p * N, scale * sums[p]);
}

template <typename Code>
Wrong residual_forward(const Batch& batch, const Lookup& lookup, int64_t begin, int64_t end, char* scratch) {
  return for_parts<Code>(batch, lookup, begin, end, true, scratch, [&](const Part<Code>& part, int64_t bag) {
    for (int64_t i = 0; i < part.count; ++i) __builtin_prefetch(part.ahead[i]);
    float* out = lookup.out + bag * lookup.row_step;
    int64_t column = 0;
    for (; column + 8 * LANES <= lookup.dim; column += 8 * LANES)
      residual_sum<Code, LANES, 8>(lookup, part, column, out);
    // what remains, of rows of few numbers all, in as few walks over the ids as there are sizes
    const auto rest = [&](auto parts) {
      constexpr int PARTS = decltype(parts)::VALUE;
      if (column + PARTS * LANES > lookup.dim) return;
      residual_sum<Code, LANES, PARTS>(lookup, part, column, out);
      column += PARTS * LANES;
    };
    rest(Constant<4>());
    rest(Constant<2>());
    rest(Constant<1>());
    for (; column < lookup.dim; ++column) residual_sum<Code, 1, 1>(lookup, part, column, out);
  });
}

template <typename Code, int N, int PARTS>
void residual_scatter(const Batch& batch, const Lookup& lookup, int64_t column, char* scratch) {
  const int64_t begin = lookup.first_bag, end = begin + lookup.num_bags;
  for_parts<Code>(batch, lookup, begin, end, false, scratch, [&](const Part<Code>& part, int64_t bag) {
    typename Lanes<N>::Vector grad[PARTS];
    for (int p = 0; p < PARTS; ++p)
      grad[p] = part.scale * load<N>(lookup.grad + bag * lookup.row_step + column + p * N);
    for (int64_t i = 0; i < part.count; ++i) {
      const Code* codes = part.codes(i);
      const float weight = part.weights[i * part.weight_step];
      const bool is_hot = part.hot && part.hot[i] >= 0;
      if (!(is_hot ? lookup.grad_hot_rows : lookup.grad_codebooks)) continue;
      const int64_t words = is_hot ? 1 : lookup.num_codes;
      for (int64_t m = 0; m < words; ++m) {
        float* slot = (is_hot ? lookup.grad_hot_rows + part.hot[i] * lookup.dim
                              : lookup.grad_codebooks + (m * lookup.codebook_size + codes[m]) * lookup.dim) + column;
        for (int p = 0; p < PARTS; ++p) store<N>(slot + p * N, load<N>(slot + p * N) + weight * grad[p]);
      }
    }
  });
}

constexpr int64_t TILE = 4 * LANES;  // columns per piece of the backward

template <typename Code>
void residual_backward(const Batch& batch, const Lookup& lookup, int64_t column, int64_t end, char* scratch) {
  for (; column + TILE <= end; column += TILE) residual_scatter<Code, LANES, 4>(batch, lookup, column, scratch);
  if (column + 2 * LANES <= end) {
    residual_scatter<Code, LANES, 2>(batch, lookup, column, scratch);
    column += 2 * LANES;
  }
  for (; column + LANES <= end; column += LANES) residual_scatter<Code, LANES, 1>(batch, lookup, column, scratch);
  for (; column < end; ++column) residual_scatter<Code, 1, 1>(batch, lookup, column, scratch);
}

// ---- weights

// A dot product that is fed piece by piece.
struct Dot {
  Lanes<LANES>::Vector wide = {};
  Lanes<4>::Vector narrow = {};
  float single = 0.0f;

  inline void add(const float* a, const float* b, int64_t count) {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) wide += load<LANES>(a + j) * load<LANES>(b + j);
    for (; j + 4 <= count; j += 4) narrow += load<4>(a + j) * load<4>(b + j);
    for (; j < count; ++j) single += a[j] * b[j];
  }

  inline float total() const {
    float sum = single;
    for (int lane = 0; lane < LANES; ++lane) sum += wide[lane];
    for (int lane = 0; lane < 4; ++lane) sum += narrow[lane];
    return sum;
  }
};

template <typename Code>
void weights_backward(const Batch& batch, const Lookup& lookup, int64_t begin, int64_t end, char* scratch) {
  const int64_t step = lookup.is_residual ? 0 : lookup.width;  // a codeword meets its own columns, or all of them
  for_parts<Code>(batch, lookup, begin, end, false, scratch, [&](const Part<Code>& part, int64_t bag) {
    const float* grad = lookup.grad + bag * lookup.row_step;
    for (int64_t i = 0; i < part.count; ++i) {
      Dot dot;
      if (part.hot && part.hot[i] >= 0) {
        for_hot_columns(lookup, part.hot[i], [&](const float* columns, int64_t first, int64_t count) {
          dot.add(columns, grad + first, count);
        });
      } else {
        const Code* codes = part.codes(i);
        for (int64_t m = 0; m < lookup.num_codes; ++m)
          dot.add(lookup.codebooks + (m * lookup.codebook_size + codes[m]) * lookup.width, grad + m * step,
                  lookup.width);
      }
      lookup.grad_weights[part.first + i] += part.scale * dot.total();
    }
  });
}

// ---- the choice of a kernel

// Calls `work` with the width of a codeword where the compiler is to know it, or with 0.
template <typename Work>
auto with_width(const Lookup& lookup, const Work& work) {
  switch (lookup.width) {
    case 2: return work(Constant<2>());
    case 4: return work(Constant<4>());
    case 8: return work(Constant<8>());
    case 16: return work(Constant<16>());
    case 32: return work(Constant<32>());
  }
  return work(Constant<0>());
}

// Calls `work` with a zero of the type that the codes are read as.
template <typename Work>
auto with_code(const Lookup& lookup, const Work& work) {
  switch (lookup.code_bytes) {
    case 1: return work(uint8_t());
    case 2: return work(uint16_t());
  }
  return work(uint32_t());
}

Wrong forward(const Batch& batch, const Lookup& lookup, int64_t begin, int64_t end, char* scratch) {
  return with_width(lookup, [&](auto width) {
    constexpr int WIDTH = decltype(width)::VALUE;
    if constexpr (WIDTH > 0)
      if (is_plain(lookup))
        return lookup.num_hot ? hot_forward<WIDTH>(batch, lookup, begin, end)
                              : plain_forward<WIDTH>(batch, lookup, begin, end);
    return with_code(lookup, [&](auto zero) {
      using Code = decltype(zero);
      if (lookup.is_residual) return residual_forward<Code>(batch, lookup, begin, end, scratch);
      if constexpr (WIDTH == 0) return product_forward_any<Code>(batch, lookup, begin, end, scratch);
      else return lookup.num_hot ? product_forward<Code, WIDTH, true>(batch, lookup, begin, end, scratch)
                                 : product_forward<Code, WIDTH, false>(batch, lookup, begin, end, scratch);
    });
  });
}

// The pieces of a gradient: SCATTER codes (product) or TILE columns (residual), the last one what remains.
int64_t piece_size(const Lookup& lookup) { return lookup.is_residual ? TILE : SCATTER; }

int64_t num_pieces(const Lookup& lookup) {
  const int64_t total = lookup.is_residual ? lookup.dim : lookup.num_codes, size = piece_size(lookup);
  return (total + size - 1) / size;
}

void backward(const Batch& batch, const Lookup& lookup, int64_t first, int64_t last, char* scratch) {
  const int64_t total = lookup.is_residual ? lookup.dim : lookup.num_codes, size = piece_size(lookup);
  const int64_t begin = first * size, end = last * size < total ? last * size : total;
  with_width(lookup, [&](auto width) {
    constexpr int WIDTH = decltype(width)::VALUE;
    if constexpr (WIDTH > 0)
      if (is_plain(lookup))
        return lookup.num_hot ? hot_backward<WIDTH>(batch, lookup, begin, end)
                              : plain_backward<WIDTH>(batch, lookup, begin, end);
    with_code(lookup, [&](auto zero) {
      using Code = decltype(zero);
      if (lookup.is_residual) return residual_backward<Code>(batch, lookup, begin, end, scratch);
      if constexpr (WIDTH == 0) product_backward_any<Code>(batch, lookup, begin, end, scratch);
      else lookup.num_hot ? product_backward<Code, WIDTH, true>(batch, lookup, begin, end, scratch)
                          : product_backward<Code, WIDTH, false>(batch, lookup, begin, end, scratch);
    });
  });
}

void backward_weights(const Batch& batch, const Lookup& lookup, int64_t begin, int64_t end, char* scratch) {
  with_code(lookup, [&](auto zero) { weights_backward<decltype(zero)>(batch, lookup, begin, end, scratch); });
}

Wrong gather(const Batch& batch, const Lookup& lookup, int64_t begin, int64_t end, char* to, int64_t row_bytes) {
  return gather_rows(batch, lookup, begin, end, to, row_bytes);
}

}  // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {KERNELS_NAME, forward, backward, num_pieces, backward_weights, gather};

}  // namespace torchrec_compress
