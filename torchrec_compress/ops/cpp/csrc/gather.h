// The gather of codes, compiled once per instruction set: windows of positions whose codes lie side by side in the
// cache when they are summed, while those of the next window are on their way from memory.
#pragma once
#include "hot.h"

namespace torchrec_compress {
namespace {

inline int64_t read(const void* numbers, int bytes, int64_t i) {
  return bytes == 8 ? static_cast<const int64_t*>(numbers)[i] : static_cast<const int32_t*>(numbers)[i];
}

inline int64_t offset(const Batch& batch, int64_t bag) {
  return batch.offsets ? read(batch.offsets, batch.offset_bytes, bag) : bag;
}

// The positions [first, last) of a look-up, with their codes.
struct Window {
  int64_t first, last;
  const char* codes;         // of position `first`, `stride` bytes a row
  int64_t stride;
  const int32_t* hot;        // the hot row of a position or -1; null without hot rows
  const char* const* ahead;  // for every position one address to fetch for the next window
};

template <typename Id>
inline int64_t find_rows(const Lookup& lookup, const Id* ids, int64_t count, const char** rows) {
  bool is_wrong = false;
  for (int64_t i = 0; i < count; ++i) {
    is_wrong |= uint64_t(ids[i]) >= uint64_t(lookup.num_rows);
    rows[i] = lookup.codes + int64_t(ids[i]) * lookup.stride;
  }
  if (is_wrong)
    for (int64_t i = 0; i < count; ++i)
      if (uint64_t(ids[i]) >= uint64_t(lookup.num_rows)) return i;
  return -1;
}

// Writes the address of every position's codes to `rows`; returns the first position whose id is out of range, or -1.
inline int64_t find_rows(const Batch& batch, const Lookup& lookup, int64_t first, int64_t last, const char** rows) {
  const int64_t wrong =
      batch.id_bytes == 8 ? find_rows(lookup, static_cast<const int64_t*>(batch.ids) + first, last - first, rows)
                          : find_rows(lookup, static_cast<const int32_t*>(batch.ids) + first, last - first, rows);
  return wrong < 0 ? -1 : first + wrong;
}

template <int BYTES>
inline void copy_rows(const char* const* rows, int64_t count, int64_t bytes, char* to, char* also, int64_t also_step) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t size = BYTES > 0 ? BYTES : bytes;  // a constant wherever it can be
    __builtin_memcpy(to + i * size, rows[i], size);
    if (also) __builtin_memcpy(also + i * also_step, rows[i], size);
  }
}

__attribute__((noinline)) void copy_rows(const char* const* rows, int64_t count, int64_t bytes, char* to, char* also,
                                        int64_t also_step) {
  switch (bytes) {
    case 4: return copy_rows<4>(rows, count, bytes, to, also, also_step);
    case 8: return copy_rows<8>(rows, count, bytes, to, also, also_step);
    case 16: return copy_rows<16>(rows, count, bytes, to, also, also_step);
    case 32: return copy_rows<32>(rows, count, bytes, to, also, also_step);
  }
  copy_rows<0>(rows, count, bytes, to, also, also_step);
}

// Unpacks the two codes of every byte. Behind an odd number of codes it writes the empty half of their last byte.
inline void unpack_row(const char* from, int64_t num_codes, char* to) {
  typedef uint8_t Bytes __attribute__((vector_size(8), aligned(1), may_alias));
  typedef uint16_t Pairs __attribute__((vector_size(16)));
  typedef uint16_t Memory __attribute__((vector_size(16), aligned(1), may_alias));
  const int64_t bytes = (num_codes + 1) / 2;
  int64_t b = 0;
  // in an integer twice as wide, a shift by half a byte moves the high half to the next byte: the lower one in memory
  // comes first on x86 and ARM
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "codes are unpacked on little-endian processors");
  for (; b + 8 <= bytes; b += 8) {
    const Pairs wide = __builtin_convertvector(*reinterpret_cast<const Bytes*>(from + b), Pairs);
    *reinterpret_cast<Memory*>(to + 2 * b) = (wide | wide << 4) & 0x0F0F;
  }
  for (; b < bytes; ++b) {
    const unsigned both = static_cast<unsigned char>(from[b]);
    to[2 * b] = char(both & 15);
    to[2 * b + 1] = char(both >> 4);
  }
}

// As copy_rows, of packed codes. Rows are unpacked in order: what is written behind one is overwritten by the next.
inline void unpack_rows(const char* const* rows, int64_t count, int64_t num_codes, char* to, char* also,
                        int64_t also_step) {
  for (int64_t i = 0; i < count; ++i, to += num_codes) {
    unpack_row(rows[i], num_codes, to);
    if (also) __builtin_memcpy(also + i * also_step, to, num_codes);
  }
}

// The first position with a code out of range, or -1.
template <typename Code>
inline int64_t find_wrong_code(const Lookup& lookup, const Window& window) {
  // wider codes are signed in Python: read as unsigned, a negative one is beyond what a code may be
  const int64_t reach = int64_t(1) << (lookup.is_packed ? 4 : sizeof(Code) == 1 ? 8 : 8 * sizeof(Code) - 1);
  const int64_t end = lookup.codebook_size < reach ? lookup.codebook_size : reach;
  if (sizeof(Code) == 1 && end == reach) return -1;
  const int64_t count = window.last - window.first, num_codes = lookup.num_codes;
  const Code* codes = reinterpret_cast<const Code*>(window.codes);
  // one pass that the compiler vectorises; the position is looked for only if there is a wrong code at all
  Code largest = 0;
  for (int64_t j = 0; j < count * num_codes; ++j) largest = codes[j] > largest ? codes[j] : largest;
  if (largest < end) return -1;
  for (int64_t j = 0;; ++j)
    if (codes[j] >= end) return window.first + j / num_codes;
}

// Finds the hot rows of a window; returns the first position with an escape code that leads nowhere, or -1.
template <typename Code>
inline int64_t find_hot_rows(const Lookup& lookup, const Window& window, int32_t* hot) {
  const char* row = window.codes;
  for (int64_t i = 0; i < window.last - window.first; ++i, row += window.stride) {
    const Code* codes = reinterpret_cast<const Code*>(row);
    hot[i] = -1;
    if (codes[0] < lookup.first_size) continue;
    const int64_t number = hot_number(lookup, codes);
    if (number >= lookup.num_hot) return window.first + i;
    hot[i] = int32_t(number);
    if (lookup.hot_rows) fetch(lookup.hot_rows + number * lookup.hot_stride, lookup.hot_stride);
  }
  return -1;
}

// Walks over the positions [first, stop) of a look-up, window by window.
template <typename Code>
class Windows {
 public:
  Window window = {};

  Windows(const Batch& batch, const Lookup& lookup, int64_t first, int64_t stop, char* scratch)
      : batch_(batch), lookup_(lookup), stop_(stop) {
    rows_ = reinterpret_cast<const char**>(scratch);
    ahead_ = rows_ + WINDOW;
    hot_ = reinterpret_cast<int32_t*>(ahead_ + WINDOW);
    copies_ = reinterpret_cast<char*>(hot_ + WINDOW);
    window.first = window.last = first;
    window.stride = window_stride(lookup);
    window.ahead = ahead_;
    window.hot = lookup.num_hot > 0 ? hot_ : nullptr;
    for (int64_t i = 0; i < WINDOW; ++i) rows_[i] = ahead_[i] = lookup.codes;
  }

  // Moves to the next positions; `is_new` says whether the codes were never checked.
  __attribute__((noinline)) Wrong next(bool is_new) {
    const int64_t first = window.last, last = first + WINDOW < stop_ ? first + WINDOW : stop_;
    if (lookup_.is_gathered) {
      window.codes = lookup_.codes + (first - lookup_.first_row) * lookup_.stride;
      if (lookup_.is_packed) unpack(window.codes, last - first);
    } else {
      const int64_t wrong = fetch(first, last);
      if (wrong >= 0) return {Wrong::ID, wrong};
    }
    window.first = first;
    window.last = last;
    if (is_new) {
      const int64_t wrong = find_wrong_code<Code>(lookup_, window);
      if (wrong >= 0) return {Wrong::CODE, wrong};
    }
    if (window.hot) {
      const int64_t wrong = find_hot_rows<Code>(lookup_, window, hot_);
      if (wrong >= 0) return {Wrong::HOT_ROW, wrong};
    }
    return {Wrong::NOTHING, 0};
  }

 private:
  // Copies the codes of [first, last) and finds the addresses of those behind.
  inline int64_t fetch(int64_t first, int64_t last) {
    if (!is_started_) {
      const int64_t wrong = find_rows(batch_, lookup_, first, last, ahead_);
      if (wrong >= 0) return wrong;
      is_started_ = true;
    }
    const char** now = ahead_;
    ahead_ = rows_;
    rows_ = now;
    const int64_t behind = last + WINDOW < stop_ ? last + WINDOW : stop_;
    const int64_t wrong = find_rows(batch_, lookup_, last, behind, ahead_);
    if (wrong >= 0) return wrong;
    window.ahead = ahead_;
    char* saved = lookup_.saved ? lookup_.saved + first * lookup_.saved_step : nullptr;
    // saved unpacked: the backward reads them once per piece
    lookup_.is_packed ? unpack_rows(rows_, last - first, lookup_.num_codes, copies_, saved, lookup_.saved_step)
                      : copy_rows(rows_, last - first, lookup_.stride, copies_, saved, lookup_.saved_step);
    window.codes = copies_;
    return -1;
  }

  inline void unpack(const char* row, int64_t count) {
    for (int64_t i = 0; i < count; ++i, row += lookup_.stride)
      unpack_row(row, lookup_.num_codes, copies_ + i * lookup_.num_codes);
    window.codes = copies_;
  }

  const Batch& batch_;
  const Lookup& lookup_;
  int64_t stop_;
  const char** rows_;
  const char** ahead_;
  int32_t* hot_;
  char* copies_;
  bool is_started_ = false;
};

// Rows of a code table for the exchange between ranks.
inline Wrong gather_rows(const Batch& batch, const Lookup& lookup, int64_t begin, int64_t end, char* to,
                         int64_t row_bytes) {
  const char* rows[2 * WINDOW];
  for (int64_t first = begin; first < end;) {
    const int64_t last = first + WINDOW < end ? first + WINDOW : end;
    const int64_t wrong = find_rows(batch, lookup, first, last, rows);
    if (wrong >= 0) return {Wrong::ID, wrong};
    if (row_bytes == lookup.stride) {
      copy_rows(rows, last - first, row_bytes, to + first * row_bytes, nullptr, 0);
    } else {
      for (int64_t i = 0; i < last - first; ++i) {
        char* row = to + (first + i) * row_bytes;
        __builtin_memcpy(row, rows[i], lookup.stride);
        __builtin_memset(row + lookup.stride, 0, row_bytes - lookup.stride);
      }
    }
    first = last;
  }
  return {Wrong::NOTHING, 0};
}

}  // namespace
}  // namespace torchrec_compress
