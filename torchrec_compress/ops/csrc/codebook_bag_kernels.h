// The kernels, compiled once per instruction set. The includer defines KERNELS and KERNELS_NAME.
//
// A row of the output stays in registers while the ids of a bag are summed: product bags in groups of CHUNKS codes,
// residual bags in tiles of columns. Codes are read in order; the codebooks (128 KB for D = 128, K = 256) live in L2.
#include "codebook_bag.h"

namespace torchrec_compress {
namespace {

#if defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // wider vectors than the machine's go through the stack in GCC
#endif
const float ONE = 1.0f;

template <int N>
struct Lanes {
  typedef float Vector __attribute__((vector_size(N * 4)));
  typedef float Memory __attribute__((vector_size(N * 4), aligned(4), may_alias));  // unaligned
};

template <int N>
inline typename Lanes<N>::Vector load(const float* from) {
  return *reinterpret_cast<const typename Lanes<N>::Memory*>(from);
}

template <int N>
inline void store(float* to, typename Lanes<N>::Vector value) {
  *reinterpret_cast<typename Lanes<N>::Memory*>(to) = value;
}

// The ids of one bag.
template <typename Code>
struct Bag {
  const Code* codes;
  const float* weights;  // step 0 repeats a one
  const int32_t* hot;
  int64_t first, count, weight_step;

  Bag(const Job& job, int64_t b) {
    first = job.offsets ? job.offsets[b] : b;
    count = job.offsets ? job.offsets[b + 1] - first : 1;
    codes = static_cast<const Code*>(job.codes) + first * job.num_codes;
    weights = job.weights ? job.weights + first : &ONE;
    weight_step = job.weights ? 1 : 0;
    hot = job.hot_index ? job.hot_index + first : nullptr;
  }
};

// ---- product, WIDTH columns per code known to the compiler

template <typename Code, int WIDTH, int CHUNKS, bool HOT>
inline void product_sum(const Job& job, const Bag<Code>& bag, int64_t m, float* out) {
  constexpr int N = WIDTH < LANES ? WIDTH : LANES, PARTS = WIDTH / N;
  typename Lanes<N>::Vector sums[CHUNKS][PARTS] = {};
  const int64_t size = job.codebook_size;
  const float* books = job.codebooks + m * size * WIDTH;
  const Code* codes = bag.codes + m;
  for (int64_t i = 0; i < bag.count; ++i, codes += job.num_codes) {
    const float weight = bag.weights[i * bag.weight_step];
    if (HOT && bag.hot[i] >= 0) {
      const float* row = job.hot_rows + bag.hot[i] * job.dim + m * WIDTH;
      for (int c = 0; c < CHUNKS; ++c)
        for (int p = 0; p < PARTS; ++p) sums[c][p] += weight * load<N>(row + c * WIDTH + p * N);
      continue;
    }
    for (int c = 0; c < CHUNKS; ++c) {
      const float* word = books + (c * size + codes[c]) * WIDTH;
      for (int p = 0; p < PARTS; ++p) sums[c][p] += weight * load<N>(word + p * N);
    }
  }
  for (int c = 0; c < CHUNKS; ++c)
    for (int p = 0; p < PARTS; ++p) store<N>(out + (m + c) * WIDTH + p * N, sums[c][p]);
}

template <typename Code, int WIDTH, bool HOT>
void product_forward(const Job& job, int64_t begin, int64_t end) {
  constexpr int CHUNKS = WIDTH <= LANES ? 8 : WIDTH <= 2 * LANES ? 4 : 2;  // eight vector registers of sums
  for (int64_t b = begin; b < end; ++b) {
    const Bag<Code> bag(job, b);
    float* out = job.out + b * job.dim;
    int64_t m = 0;
    for (; m + CHUNKS <= job.num_codes; m += CHUNKS) product_sum<Code, WIDTH, CHUNKS, HOT>(job, bag, m, out);
    for (; m < job.num_codes; ++m) product_sum<Code, WIDTH, 1, HOT>(job, bag, m, out);
  }
}

template <typename Code, int WIDTH, int CHUNKS, bool HOT>
void product_scatter(const Job& job, int64_t m) {
  constexpr int N = WIDTH < LANES ? WIDTH : LANES, PARTS = WIDTH / N;
  const int64_t size = job.codebook_size;
  float* books = job.grad_codebooks + m * size * WIDTH;
  for (int64_t b = 0; b < job.num_bags; ++b) {
    const Bag<Code> bag(job, b);
    typename Lanes<N>::Vector grad[CHUNKS][PARTS];
    for (int c = 0; c < CHUNKS; ++c)
      for (int p = 0; p < PARTS; ++p) grad[c][p] = load<N>(job.grad + b * job.grad_stride + (m + c) * WIDTH + p * N);
    const Code* codes = bag.codes + m;
    for (int64_t i = 0; i < bag.count; ++i, codes += job.num_codes) {
      const float weight = bag.weights[i * bag.weight_step];
      const bool is_hot = HOT && bag.hot[i] >= 0;
      if (is_hot && !job.grad_hot_rows) continue;
      for (int c = 0; c < CHUNKS; ++c) {
        float* slot = is_hot ? job.grad_hot_rows + bag.hot[i] * job.dim + (m + c) * WIDTH
                             : books + (c * size + codes[c]) * WIDTH;
        for (int p = 0; p < PARTS; ++p) store<N>(slot + p * N, load<N>(slot + p * N) + weight * grad[c][p]);
      }
    }
  }
}

constexpr int64_t SCATTER = 4;  // codes per piece of the backward

template <typename Code, int WIDTH, bool HOT>
void product_backward(const Job& job, int64_t begin, int64_t end) {
  for (int64_t piece = begin; piece < end; ++piece) {
    int64_t m = piece * SCATTER;
    if (m + SCATTER <= job.num_codes) {
      product_scatter<Code, WIDTH, SCATTER, HOT>(job, m);
      continue;
    }
    for (; m < job.num_codes; ++m) product_scatter<Code, WIDTH, 1, HOT>(job, m);
  }
}

// ---- product, any width

template <typename Code>
void product_forward_any(const Job& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  for (int64_t b = begin; b < end; ++b) {
    const Bag<Code> bag(job, b);
    float* __restrict out = job.out + b * job.dim;
    for (int64_t j = 0; j < job.dim; ++j) out[j] = 0.0f;
    for (int64_t i = 0; i < bag.count; ++i) {
      const float weight = bag.weights[i * bag.weight_step];
      const bool is_hot = bag.hot && bag.hot[i] >= 0;
      for (int64_t m = 0; m < job.num_codes; ++m) {
        const float* word = is_hot ? job.hot_rows + bag.hot[i] * job.dim + m * width
                                   : job.codebooks + (m * job.codebook_size + bag.codes[i * job.num_codes + m]) * width;
        for (int64_t j = 0; j < width; ++j) out[m * width + j] += weight * word[j];
      }
    }
  }
}

template <typename Code>
void product_backward_any(const Job& job, int64_t begin, int64_t end) {
  const int64_t width = job.width, first = begin * SCATTER;
  const int64_t last = end * SCATTER < job.num_codes ? end * SCATTER : job.num_codes;
  for (int64_t b = 0; b < job.num_bags; ++b) {
    const Bag<Code> bag(job, b);
    for (int64_t i = 0; i < bag.count; ++i) {
      const float weight = bag.weights[i * bag.weight_step];
      const bool is_hot = bag.hot && bag.hot[i] >= 0;
      if (is_hot && !job.grad_hot_rows) continue;
      for (int64_t m = first; m < last; ++m) {
        const float* __restrict grad = job.grad + b * job.grad_stride + m * width;
        float* __restrict slot =
            is_hot ? job.grad_hot_rows + bag.hot[i] * job.dim + m * width
                   : job.grad_codebooks + (m * job.codebook_size + bag.codes[i * job.num_codes + m]) * width;
        for (int64_t j = 0; j < width; ++j) slot[j] += weight * grad[j];
      }
    }
  }
}

// ---- residual, in tiles of PARTS vectors of N columns

template <typename Code, int N, int PARTS>
inline void residual_sum(const Job& job, const Bag<Code>& bag, int64_t column, float* out) {
  typename Lanes<N>::Vector sums[PARTS] = {};
  const Code* codes = bag.codes;
  for (int64_t i = 0; i < bag.count; ++i, codes += job.num_codes) {
    const float weight = bag.weights[i * bag.weight_step];
    const bool is_hot = bag.hot && bag.hot[i] >= 0;
    const int64_t words = is_hot ? 1 : job.num_codes;
    for (int64_t m = 0; m < words; ++m) {
      const float* word = (is_hot ? job.hot_rows + bag.hot[i] * job.dim
                                  : job.codebooks + (m * job.codebook_size + codes[m]) * job.dim) + column;
      for (int p = 0; p < PARTS; ++p) sums[p] += weight * load<N>(word + p * N);
    }
  }
  for (int p = 0; p < PARTS; ++p) store<N>(out + column + p * N, sums[p]);
}

template <typename Code>
void residual_forward(const Job& job, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const Bag<Code> bag(job, b);
    float* out = job.out + b * job.dim;
    int64_t column = 0;
    for (; column + 8 * LANES <= job.dim; column += 8 * LANES) residual_sum<Code, LANES, 8>(job, bag, column, out);
    for (; column + LANES <= job.dim; column += LANES) residual_sum<Code, LANES, 1>(job, bag, column, out);
    for (; column < job.dim; ++column) residual_sum<Code, 1, 1>(job, bag, column, out);
  }
}

template <typename Code, int N, int PARTS>
void residual_scatter(const Job& job, int64_t column) {
  for (int64_t b = 0; b < job.num_bags; ++b) {
    const Bag<Code> bag(job, b);
    typename Lanes<N>::Vector grad[PARTS];
    for (int p = 0; p < PARTS; ++p) grad[p] = load<N>(job.grad + b * job.grad_stride + column + p * N);
    const Code* codes = bag.codes;
    for (int64_t i = 0; i < bag.count; ++i, codes += job.num_codes) {
      const float weight = bag.weights[i * bag.weight_step];
      const bool is_hot = bag.hot && bag.hot[i] >= 0;
      if (is_hot && !job.grad_hot_rows) continue;
      const int64_t words = is_hot ? 1 : job.num_codes;
      for (int64_t m = 0; m < words; ++m) {
        float* slot = (is_hot ? job.grad_hot_rows + bag.hot[i] * job.dim
                              : job.grad_codebooks + (m * job.codebook_size + codes[m]) * job.dim) + column;
        for (int p = 0; p < PARTS; ++p) store<N>(slot + p * N, load<N>(slot + p * N) + weight * grad[p]);
      }
    }
  }
}

constexpr int64_t TILE = 4 * LANES;  // columns per piece of the backward

template <typename Code>
void residual_backward(const Job& job, int64_t begin, int64_t end) {
  for (int64_t piece = begin; piece < end; ++piece) {
    int64_t column = piece * TILE;
    if (column + TILE <= job.dim) {
      residual_scatter<Code, LANES, 4>(job, column);
      continue;
    }
    for (; column + LANES <= job.dim; column += LANES) residual_scatter<Code, LANES, 1>(job, column);
    for (; column < job.dim; ++column) residual_scatter<Code, 1, 1>(job, column);
  }
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
void weights_backward(const Job& job, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const Bag<Code> bag(job, b);
    const float* grad = job.grad + b * job.grad_stride;
    const int64_t step = job.residual ? 0 : job.width;  // a codeword meets its own columns, or all of them
    for (int64_t i = 0; i < bag.count; ++i) {
      Dot dot;
      if (bag.hot && bag.hot[i] >= 0) {
        dot.add(job.hot_rows + bag.hot[i] * job.dim, grad, job.dim);
      } else {
        const Code* codes = bag.codes + i * job.num_codes;
        for (int64_t m = 0; m < job.num_codes; ++m)
          dot.add(job.codebooks + (m * job.codebook_size + codes[m]) * job.width, grad + m * step, job.width);
      }
      job.grad_weights[bag.first + i] = dot.total();
    }
  }
}

// ---- the choice of a kernel

template <typename Code, int WIDTH>
void product(const Job& job, int64_t begin, int64_t end, bool is_forward) {
  if (is_forward)
    job.hot_index ? product_forward<Code, WIDTH, true>(job, begin, end)
                  : product_forward<Code, WIDTH, false>(job, begin, end);
  else
    job.hot_index ? product_backward<Code, WIDTH, true>(job, begin, end)
                  : product_backward<Code, WIDTH, false>(job, begin, end);
}

template <typename Code>
void choose(const Job& job, int64_t begin, int64_t end, bool is_forward) {
  if (job.residual) return is_forward ? residual_forward<Code>(job, begin, end) : residual_backward<Code>(job, begin, end);
  switch (job.width) {
    case 4: return product<Code, 4>(job, begin, end, is_forward);
    case 8: return product<Code, 8>(job, begin, end, is_forward);
    case 16: return product<Code, 16>(job, begin, end, is_forward);
    case 32: return product<Code, 32>(job, begin, end, is_forward);
  }
  return is_forward ? product_forward_any<Code>(job, begin, end) : product_backward_any<Code>(job, begin, end);
}

void forward(const Job& job, int64_t begin, int64_t end) {
  job.code_bytes == 1 ? choose<uint8_t>(job, begin, end, true) : choose<uint16_t>(job, begin, end, true);
}

void backward(const Job& job, int64_t begin, int64_t end) {
  job.code_bytes == 1 ? choose<uint8_t>(job, begin, end, false) : choose<uint16_t>(job, begin, end, false);
}

int64_t num_pieces(const Job& job) {
  const int64_t total = job.residual ? job.dim : job.num_codes, size = job.residual ? TILE : SCATTER;
  return (total + size - 1) / size;
}

void backward_weights(const Job& job, int64_t begin, int64_t end) {
  job.code_bytes == 1 ? weights_backward<uint8_t>(job, begin, end) : weights_backward<uint16_t>(job, begin, end);
}

}  // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {KERNELS_NAME, forward, backward, num_pieces, backward_weights};

}  // namespace torchrec_compress
