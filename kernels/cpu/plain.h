// What the two plain units share: the check of a tile, and the expansion of one row.
#pragma once

#include <string.h>

#include "kernels.h"

namespace tierd {
namespace plain {

Fault expand(const Packed&, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
             uint64_t* tile);

namespace {

inline Fault check_tile(const Packed& m, uint64_t tile, uint32_t rows, uint32_t cols) {
  const uint64_t* words = m.bitmap + tile * kTile;
  uint64_t count = 0;
  uint64_t outside = 0;
  const uint64_t beyond = ~low_bits(cols);
  for (uint32_t row = 0; row < kTile; ++row) {
    count += static_cast<uint64_t>(__builtin_popcountll(words[row]));
    outside |= row < rows ? words[row] & beyond : words[row];
  }
  if (outside != 0) return Fault::kBitsOutside;
  return check_run(m, tile, count);
}

// Writes `cols` elements, returns the run behind the values that it took.
template <typename Element>
inline const uint8_t* expand_row(uint64_t word, const uint8_t* run, Element* to, uint32_t cols) {
  memset(to, 0, cols * sizeof(Element));
  for (; word != 0; word &= word - 1, run += sizeof(Element)) {
    memcpy(to + __builtin_ctzll(word), run, sizeof(Element));
  }
  return run;
}

}  // namespace
}  // namespace plain
}  // namespace tierd
