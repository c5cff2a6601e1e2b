// Bitmap decompression in portable C++.
#include "plain.h"
#include "plain_floats.h"

namespace tierd {
namespace plain {
namespace {

// Both write `cols` elements and return the items behind those that they took.
template <typename Element>
const uint8_t* expand_row(uint64_t word, const uint8_t* items, Element* to, uint32_t cols) {
  memset(to, 0, cols * sizeof(Element));
  for (; word != 0; word &= word - 1, items += sizeof(Element)) {
    memcpy(to + __builtin_ctzll(word), items, sizeof(Element));
  }
  return items;
}

template <typename Element>
const uint8_t* expand_quantised_row(uint64_t word, const uint8_t* items, Dtype dtype, float scale,
                                    Element* to, uint32_t cols) {
  memset(to, 0, cols * sizeof(Element));
  for (; word != 0; word &= word - 1, ++items) {
    // Exact: 8 bits times 8 bits.
    const float weight = static_cast<float>(static_cast<int8_t>(*items)) * scale;
    from_float(dtype, weight, to + __builtin_ctzll(word));
  }
  return items;
}

template <typename Element>
Fault expand_elements(const Packed& m, uint32_t tile_row, Element* out, uint64_t stride,
                      uint64_t* tile) {
  Items decoded;
  const uint32_t rows = rows_of(m, tile_row);
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint64_t number = uint64_t{tile_row} * m.tile_cols + tile_col;
    *tile = number;
    const uint32_t cols = cols_of(m, tile_col);
    uint32_t count;
    const Fault fault = check_tile(m, number, rows, cols, &count);
    if (fault != Fault::kNone) return fault;
    const uint8_t* items = items_of(m, number, count, &decoded);
    const uint16_t* scales = quantised(m) ? scales_of(m, tile_row, tile_col) : nullptr;
    Element* to = out + uint64_t{tile_col} * kTile;
    for (uint32_t row = 0; row < rows; ++row, to += stride) {
      const uint64_t word = word_of(m, number, row, cols);
      items = scales == nullptr ? expand_row(word, items, to, cols)
                                : expand_quantised_row(word, items, m.dtype,
                                                       from_bf16(scales[row]), to, cols);
    }
  }
  return Fault::kNone;
}

}  // namespace

Fault expand(const Packed& m, uint32_t tile_row, void* out, uint64_t stride, bool,
             uint64_t* tile) {
  return m.item_bytes == 2
             ? expand_elements(m, tile_row, static_cast<uint16_t*>(out), stride, tile)
             : expand_elements(m, tile_row, static_cast<uint32_t*>(out), stride, tile);
}

}  // namespace plain
}  // namespace tierd
