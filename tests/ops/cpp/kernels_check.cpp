// The kernels of one instruction set, KERNELS, against plain loops in double precision, without torch: for those that
// the suite does not choose on this processor.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "codebook_bags.h"

using namespace torchrec_compress;

namespace {

std::mt19937 generator(0);

int64_t draw(int64_t end) { return int64_t(generator() % uint64_t(end)); }

std::vector<float> floats(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = float(draw(2001) - 1000) / 1000;
  return values;
}

// Returns 1 and prints where, if a number is wrong.
int compare(const char* what, const Lookup& lookup, const std::vector<float>& got,
            const std::vector<double>& expected) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::fabs(got[i] - expected[i]) <= 1e-4 * (1 + std::fabs(expected[i]))) continue;
    std::printf("%s %s, width %d, %d code bytes, %d hot rows of %d bits: at %zu expected %g, got %g\n", what,
                lookup.is_residual ? "residual" : "product", int(lookup.width), lookup.code_bytes, int(lookup.num_hot),
                lookup.hot_bits, i, expected[i], double(got[i]));
    return 1;
  }
  return 0;
}

// Rows of codes; with hot rows every third is the escape code of one of them, K - 1 and then its number in base K.
template <typename Code>
std::vector<Code> codes_of(int64_t N, int64_t M, int64_t K, int64_t num_hot) {
  std::vector<Code> table(N * M);
  for (int64_t row = 0; row < N; ++row) {
    const bool is_hot = num_hot && row % 3 == 0;
    for (int64_t m = 0; m < M; ++m) table[row * M + m] = Code(is_hot ? 0 : draw(num_hot && m == 0 ? K - 1 : K));
    if (!is_hot) continue;
    table[row * M] = Code(K - 1);
    table[row * M + M - 1] = Code(draw(num_hot));
  }
  return table;
}

// Hot rows as they are stored, and their values.
struct Hot {
  std::vector<char> bytes;
  std::vector<float> values;
};

// A float16; normal and subnormal ones, of both signs.
float read_half(unsigned bits) {
  const int exponent = int(bits >> 10 & 31), mantissa = int(bits & 1023);
  const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return float(bits >> 15 ? -size : size);
}

Hot hot_of(int64_t num_hot, int64_t D, int bits) {
  Hot hot;
  if (bits == 32) {
    hot.values = floats(num_hot * D);
    const char* from = reinterpret_cast<const char*>(hot.values.data());
    hot.bytes.assign(from, from + num_hot * D * 4);
    return hot;
  }
  for (int64_t row = 0; row < num_hot; ++row) {
    // a scale below 2^-14 every third time, where float16 has less than its 11 bits
    const unsigned halves[2] = {unsigned(draw(row % 3 ? 0x2400 : 0x400)), unsigned(draw(2) << 15 | draw(0x3C00))};
    for (const unsigned half : halves)
      for (const unsigned byte : {half & 255, half >> 8}) hot.bytes.push_back(char(byte));
    for (int64_t j = 0; j < D; ++j) {
      const unsigned value = unsigned(draw(1 << bits));
      hot.values.push_back(float(value) * read_half(halves[0]) + read_half(halves[1]));
      if (bits == 8 || j % 2 == 0) hot.bytes.push_back(char(value));
      else hot.bytes.back() = char((hot.bytes.back() & 15) | value << 4);
    }
  }
  return hot;
}

struct Expected {
  std::vector<double> out, books, hot, weights;
};

// Values and gradients: one codeword's or hot row's part of a position after another.
template <typename Code, typename Index>
Expected expect(const Lookup& lookup, const std::vector<Code>& table, const std::vector<Index>& offsets,
                const std::vector<Index>& ids, const std::vector<float>& weights, const std::vector<float>& grad,
                const std::vector<float>& hot) {
  const int64_t M = lookup.num_codes, K = lookup.codebook_size, D = lookup.dim, width = lookup.width;
  Expected sums;
  sums.out.resize(lookup.num_bags * D);
  sums.books.resize(M * K * width);
  sums.hot.resize(lookup.num_hot * D);
  sums.weights.resize(weights.size());
  for (int64_t b = 0; b < lookup.num_bags; ++b) {
    const int64_t begin = int64_t(offsets[b]), end = int64_t(offsets[b + 1]);
    const double scale = lookup.is_mean && end > begin ? 1.0 / double(end - begin) : 1.0;
    for (int64_t i = begin; i < end; ++i) {
      const Code* codes = &table[int64_t(ids[i]) * M];
      const bool is_hot = codes[0] >= lookup.first_size;
      for (int64_t m = 0; m < (is_hot ? 1 : M); ++m) {
        const int64_t columns = is_hot ? D : width, to = b * D + (is_hot || lookup.is_residual ? 0 : m * width);
        const int64_t from = is_hot ? int64_t(codes[M - 1]) * D : (m * K + codes[m]) * width;
        for (int64_t j = 0; j < columns; ++j) {
          const double value = is_hot ? hot[from + j] : lookup.codebooks[from + j];
          sums.out[to + j] += scale * weights[i] * value;
          (is_hot ? sums.hot : sums.books)[from + j] += scale * weights[i] * grad[to + j];
          sums.weights[i] += scale * value * grad[to + j];
        }
      }
    }
  }
  return sums;
}

// Two codes in a byte, the first in its low half; for codes below 16.
template <typename Code>
std::vector<char> packed(const std::vector<Code>& table, int64_t N, int64_t M) {
  std::vector<char> bytes;
  for (int64_t row = 0; row < N; ++row)
    for (int64_t m = 0; m < M; m += 2)
      bytes.push_back(char(table[row * M + m] | (m + 1 < M ? table[row * M + m + 1] << 4 : 0)));
  return bytes;
}

template <typename Code, typename Index>
int check(int64_t K, int64_t width, bool is_residual, bool is_mean, int64_t num_hot, int bits, bool is_packed = false) {
  const int64_t M = 27, N = 77, B = 63;
  const int64_t D = is_residual ? width : M * width, first_size = num_hot ? K - 1 : K;
  if (bits == 4 && D % 4) return 0;
  std::vector<Code> table = codes_of<Code>(N, M, K, num_hot);
  std::vector<Index> offsets(1), ids;
  for (int64_t b = 0; b < B; ++b) offsets.push_back(Index(offsets[b] + (b == 7 ? 300 : draw(5))));
  const int64_t L = int64_t(offsets[B]);
  for (int64_t i = 0; i < L; ++i) ids.push_back(Index(draw(N)));
  const std::vector<float> books = floats(M * K * width), weights = floats(L);
  const Hot hot = hot_of(num_hot, D, bits);
  const std::vector<float> grad = floats(B * D);

  Batch batch = {ids.data(), int(sizeof(Index)), offsets.data(), int(sizeof(Index)), weights.data(), L};
  Lookup lookup = {};
  lookup.codes = reinterpret_cast<const char*>(table.data());
  lookup.code_bytes = int(sizeof(Code));
  const int64_t row_bytes = M * lookup.code_bytes;
  lookup.stride = row_bytes;
  const std::vector<char> halves = packed(table, N, M);
  if (is_packed) {
    lookup.codes = halves.data();
    lookup.stride = (M + 1) / 2;
    lookup.is_packed = true;
  }
  lookup.num_rows = N;
  lookup.num_codes = M;
  lookup.codebook_size = K;
  lookup.num_hot = num_hot;
  lookup.first_size = first_size;
  lookup.width = width;
  lookup.dim = lookup.row_step = D;
  lookup.is_residual = is_residual;
  lookup.is_mean = is_mean;
  lookup.codebooks = books.data();
  lookup.hot_rows = num_hot ? hot.bytes.data() : nullptr;
  lookup.hot_stride = num_hot ? int64_t(hot.bytes.size()) / num_hot : 0;
  lookup.hot_bits = bits;
  lookup.num_bags = B;
  std::vector<char> saved(L * row_bytes), scratch(scratch_bytes(lookup));
  std::vector<float> out(B * D, NAN), grad_books(books.size()), grad_hot(num_hot * D), grad_weights(L);
  lookup.out = out.data();
  lookup.saved = saved.data();
  lookup.saved_step = row_bytes;

  const Expected expected = expect(lookup, table, offsets, ids, weights, grad, hot.values);
  int wrong = 0;
  if (KERNELS.forward(batch, lookup, 0, B / 2, scratch.data()).kind != Wrong::NOTHING) ++wrong;
  if (KERNELS.forward(batch, lookup, B / 2, B, scratch.data()).kind != Wrong::NOTHING) ++wrong;
  wrong += compare("forward", lookup, out, expected.out);
  std::vector<char> asked;
  for (int64_t i = 0; i < L; ++i) {
    const char* row = lookup.codes + int64_t(ids[i]) * lookup.stride;
    asked.insert(asked.end(), row, row + lookup.stride);
  }
  Lookup given = lookup;
  given.codes = asked.data();
  given.is_gathered = true;
  given.saved = nullptr;
  std::fill(out.begin(), out.end(), NAN);
  if (KERNELS.forward(batch, given, 0, B, scratch.data()).kind != Wrong::NOTHING) ++wrong;
  wrong += compare("forward of gathered codes", lookup, out, expected.out);
  Lookup back = lookup;
  back.codes = saved.data();
  back.stride = row_bytes;
  back.is_packed = false;
  back.is_gathered = true;
  back.grad = grad.data();
  back.grad_codebooks = grad_books.data();
  const bool is_trained = num_hot && bits == 32;
  back.grad_hot_rows = is_trained ? grad_hot.data() : nullptr;
  back.grad_weights = grad_weights.data();
  const int64_t pieces = KERNELS.num_pieces(back);
  KERNELS.backward(batch, back, 0, pieces / 2, scratch.data());
  KERNELS.backward(batch, back, pieces / 2, pieces, scratch.data());
  KERNELS.backward_weights(batch, back, 0, B, scratch.data());
  wrong += compare("gradient of codebooks", lookup, grad_books, expected.books);
  if (is_trained) {
    wrong += compare("gradient of hot rows", lookup, grad_hot, expected.hot);
    std::fill(grad_hot.begin(), grad_hot.end(), 0.0f);
    back.grad_codebooks = nullptr;
    KERNELS.backward(batch, back, 0, pieces, scratch.data());
    wrong += compare("gradient of hot rows alone", lookup, grad_hot, expected.hot);
  }
  wrong += compare("gradient of weights", lookup, grad_weights, expected.weights);

  std::vector<char> rows(L * lookup.stride);
  KERNELS.gather(batch, lookup, 0, L, rows.data(), lookup.stride);
  if (rows != asked) wrong += std::printf("gather: other codes than the table's\n") > 0;
  if (num_hot && !is_packed) {
    const Code right = table[ids[L / 3] * M + M - 1];
    table[ids[L / 3] * M] = Code(K - 1);
    table[ids[L / 3] * M + M - 1] = Code(num_hot);
    const int64_t first = std::find(ids.begin(), ids.end(), ids[L / 3]) - ids.begin();
    const Wrong met = KERNELS.forward(batch, lookup, 0, B, scratch.data());
    if (met.kind != Wrong::HOT_ROW || met.position != first)
      wrong += std::printf("an escape code that leads nowhere was not seen\n") > 0;
    table[ids[L / 3] * M + M - 1] = Code(right < num_hot ? right : 0);
    std::fill(&table[ids[L / 3] * M + 1], &table[ids[L / 3] * M + M - 1], Code(0));
  }
  ids[L / 2] = Index(N);
  const Wrong met = KERNELS.forward(batch, lookup, 0, B, scratch.data());
  if (met.kind != Wrong::ID || met.position != L / 2) wrong += std::printf("an id out of range was not seen\n") > 0;
  return wrong;
}

}  // namespace

int main() {
  int wrong = 0, cases = 0;
  for (int64_t width : {1, 4, 5, 8, 16, 32, 40})
    for (int flags = 0; flags < 4; ++flags)
      for (int bits : {0, 32, 8, 4}) {  // of hot rows; 0: none
        const int num_hot = bits ? 20 : 0;
        wrong += check<uint8_t, int64_t>(250, width, flags & 1, flags & 2, num_hot, bits);
        wrong += check<uint8_t, int64_t>(256, width, flags & 1, flags & 2, num_hot, bits);
        wrong += check<uint8_t, int32_t>(256, width, flags & 1, flags & 2, num_hot, bits);
        wrong += check<uint16_t, int32_t>(300, width, flags & 1, flags & 2, num_hot, bits);
        wrong += check<uint32_t, int64_t>(300, width, flags & 1, flags & 2, num_hot, bits);
        wrong += check<uint8_t, int64_t>(16, width, flags & 1, flags & 2, bits ? 12 : 0, bits, true);
        cases += 6;
      }
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong ? 1 : 0;
}
