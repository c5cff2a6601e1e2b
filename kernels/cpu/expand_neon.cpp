// Bitmap decompression with NEON.
#include "neon.h"
#include "plain_floats.h"

namespace tierd {
namespace neon {
namespace {

// The nearest bf16, of two as near the even one. No weight of a quantised matrix is a NaN.
inline uint16x4_t round_bf16(float32x4_t floats) {
  const uint32x4_t bits = vreinterpretq_u32_f32(floats);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
}

inline void store_floats(Dtype dtype, float32x4x2_t weights, uint16_t* to) {
  if (dtype == Dtype::kBF16) {
    vst1q_u16(to, vcombine_u16(round_bf16(weights.val[0]), round_bf16(weights.val[1])));
  } else {
    const float16x8_t halves =
        vcombine_f16(vcvt_f16_f32(weights.val[0]), vcvt_f16_f32(weights.val[1]));
    vst1q_u16(to, vreinterpretq_u16_f16(halves));
  }
}

inline void store_floats(Dtype, float32x4x2_t weights, uint32_t* to) {
  vst1q_u32(to, vreinterpretq_u32_f32(weights.val[0]));
  vst1q_u32(to + 4, vreinterpretq_u32_f32(weights.val[1]));
}

inline void store_bits(uint8_t kept, const uint8_t* run, uint16_t* to) {
  vst1q_u16(to, expand8x16(kept, run));
}

inline void store_bits(uint8_t kept, const uint8_t* run, uint32_t* to) {
  const uint32x4x2_t bits = expand8x32(kept, run);
  vst1q_u32(to, bits.val[0]);
  vst1q_u32(to + 4, bits.val[1]);
}

template <typename Element>
inline const uint8_t* expand_bits(uint64_t word, const uint8_t* items, Element* to) {
  return for_pieces<sizeof(Element)>(word, items, [to](uint32_t piece, uint8_t kept,
                                                       const uint8_t* run) {
    store_bits(kept, run, to + piece * kPiece);
  });
}

// Exact: 8 bits times 8 bits. Rounded once, to the dtype.
template <typename Element>
inline const uint8_t* expand_quantised(uint64_t word, const uint8_t* items, Dtype dtype,
                                       float scale, Element* to) {
  return for_pieces<1>(word, items, [=](uint32_t piece, uint8_t kept, const uint8_t* run) {
    float32x4x2_t weights = expand_floats<Values::kInt8>(kept, run);
    for (float32x4_t& four : weights.val) four = vmulq_n_f32(four, scale);
    store_floats(dtype, weights, to + piece * kPiece);
  });
}

template <typename Element>
Fault expand_elements(const Packed& m, uint32_t tile_row, Element* out, uint64_t stride,
                      uint64_t* tile) {
  Readable copy;
  const uint32_t rows = rows_of(m, tile_row);
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint64_t number = uint64_t{tile_row} * m.tile_cols + tile_col;
    *tile = number;
    const uint32_t cols = cols_of(m, tile_col);
    uint32_t count;
    const Fault fault = check_tile(m, number, rows, cols, &count);
    if (fault != Fault::kNone) return fault;
    const uint8_t* items = items_of(m, number, count, &copy);
    const uint16_t* scales = quantised(m) ? scales_of(m, tile_row, tile_col) : nullptr;
    Element* to = out + uint64_t{tile_col} * kTile;
    for (uint32_t row = 0; row < rows; ++row, to += stride) {
      const uint64_t word = word_of(m, number, row, cols);
      Element edge[kTile];
      Element* whole = cols == kTile ? to : edge;
      items = scales == nullptr ? expand_bits(word, items, whole)
                                : expand_quantised(word, items, m.dtype,
                                                   plain::from_bf16(scales[row]), whole);
      if (cols < kTile) memcpy(to, edge, cols * sizeof(Element));
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

}  // namespace neon
}  // namespace tierd
