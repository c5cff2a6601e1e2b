// Bitmap decompression in portable C++.
#include "plain.h"

namespace tierd {
namespace plain {
namespace {

template <typename Element>
Fault expand_elements(const Packed& m, uint32_t tile_row, Element* out, uint64_t stride, uint64_t* tile) {
  const uint32_t rows = rows_of(m, tile_row);
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint64_t number = uint64_t{tile_row} * m.tile_cols + tile_col;
    *tile = number;
    const uint32_t cols = cols_of(m, tile_col);
    const Fault fault = check_tile(m, number, rows, cols);
    if (fault != Fault::kNone) return fault;
    const uint64_t* words = m.bitmap + number * kTile;
    const uint8_t* run = m.values + uint64_t{m.offsets[number]} * kRunUnit;
    Element* to = out + uint64_t{tile_col} * kTile;
    for (uint32_t row = 0; row < rows; ++row, to += stride) {
      run = expand_row(words[row], run, to, cols);
    }
  }
  return Fault::kNone;
}

}  // namespace

Fault expand(const Packed& m, uint32_t tile_row, void* out, uint64_t stride, bool, uint64_t* tile) {
  return m.item_bytes == 2
             ? expand_elements(m, tile_row, static_cast<uint16_t*>(out), stride, tile)
             : expand_elements(m, tile_row, static_cast<uint32_t*>(out), stride, tile);
}

}  // namespace plain
}  // namespace tierd
