// How the encoder walks a matrix: tile by tile, in the order of FORMAT.md.
#pragma once

#include <algorithm>

#include "encode.h"

namespace tierd {
namespace encode {

// A matrix as it comes: `stride` elements from row to row, of any sign.
struct Matrix {
  const uint8_t* first;
  int64_t stride;
  uint64_t rows;
  uint64_t cols;
  uint32_t item_bytes;  // 2 or 4

  uint64_t tile_rows() const { return (rows + kTile - 1) / kTile; }
  uint64_t tile_cols() const { return (cols + kTile - 1) / kTile; }
  uint64_t tiles() const { return tile_rows() * tile_cols(); }

  const uint8_t* at(uint64_t row, uint64_t col) const {
    const int64_t element = static_cast<int64_t>(row) * stride + static_cast<int64_t>(col);
    return first + element * static_cast<int64_t>(item_bytes);
  }
};

constexpr uint64_t kNoTile = ~uint64_t{0};

inline uint64_t units(uint64_t bytes) { return (bytes + kRunUnit - 1) / kRunUnit; }

// Counted in fields that the compiler can take several words of at once: these files are compiled
// without popcnt.
inline uint32_t set_bits(const uint64_t* words) {
  uint64_t sum = 0;
  for (uint32_t row = 0; row < kTile; ++row) {
    uint64_t word = words[row];
    word -= word >> 1 & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
    word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    sum += (word & 0x00ff00ff00ff00ffu) + (word >> 8 & 0x00ff00ff00ff00ffu);
  }
  return static_cast<uint32_t>(sum * 0x0001000100010001u >> 48);
}

// The bitmap of a tile in the dense form.
inline void fill_words(const Source& s, uint64_t* words) {
  std::fill(words, words + s.rows, low_bits(s.cols));
  std::fill(words + s.rows, words + kTile, 0);
}

// The rows of a tile lie too far apart for the processor to foresee them.
inline void prefetch_tile(const Matrix& m, uint64_t top, uint64_t left) {
  const uint64_t bytes = std::min<uint64_t>(m.cols - left, kTile) * m.item_bytes;
  const uint64_t rows = std::min<uint64_t>(m.rows - top, kTile);
  for (uint64_t row = 0; row < rows; ++row) {
    const uint8_t* const line = m.at(top + row, left);
    for (uint64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(line + byte);
  }
}

// Calls visit(tile number, source) for all tiles in order, until it returns false.
template <typename Visit>
void for_each_tile(const Matrix& m, Visit visit) {
  uint64_t tile = 0;
  for (uint64_t top = 0; top < m.rows; top += kTile) {
    for (uint64_t left = 0; left < m.cols; left += kTile, ++tile) {
      if (m.cols - left > kTile) prefetch_tile(m, top, left + kTile);
      const Source source{m.at(top, left), m.stride,
                          static_cast<uint32_t>(std::min<uint64_t>(m.rows - top, kTile)),
                          static_cast<uint32_t>(std::min<uint64_t>(m.cols - left, kTile))};
      if (!visit(tile, source)) return;
    }
  }
}

}  // namespace encode
}  // namespace tierd
