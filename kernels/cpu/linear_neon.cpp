// The fused sparse product with NEON: rows expanded into registers, multiplied, added.
//
// For every row of the matrix and every token there are 8 partial sums for a whole tile row. A
// token's sum takes the same additions in the same order whether it is alone or in a batch: so its
// result does not depend on its batch.
#include "neon.h"
#include "plain_floats.h"

namespace tierd {
namespace neon {
namespace {

using Eight = float32x4x2_t;

// The 64 weights of a row: half of the registers.
struct Row {
  Eight piece[kPieces];
};

inline Eight zero() { return {{vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}}; }

inline Eight load8(const float* from) { return {{vld1q_f32(from), vld1q_f32(from + 4)}}; }

inline void store8(float* to, Eight floats) {
  vst1q_f32(to, floats.val[0]);
  vst1q_f32(to + 4, floats.val[1]);
}

template <Values values>
inline const uint8_t* load_row(uint64_t word, const uint8_t* run, Row* row) {
  return for_pieces<kValueBytes<values>>(word, run, [row](uint32_t piece, uint8_t kept,
                                                          const uint8_t* from) {
    row->piece[piece] = expand_floats<values>(kept, from);
  });
}

// `count` tokens side by side, so that no addition waits for the one before it. With scales a tile
// has its own sums, which are then scaled and added.
template <bool scaled, uint32_t count>
inline void multiply(const Row& row, const float* x, float scale, Eight* sums) {
  Eight sum[count];
  for (uint32_t t = 0; t < count; ++t) sum[t] = scaled ? zero() : sums[t];
  for (uint32_t piece = 0; piece < kPieces; ++piece) {
    for (uint32_t t = 0; t < count; ++t) {
      const Eight xs = load8(x + t * kTile + piece * kPiece);
      for (uint32_t half = 0; half < 2; ++half) {
        sum[t].val[half] = vfmaq_f32(sum[t].val[half], row.piece[piece].val[half], xs.val[half]);
      }
    }
  }
  for (uint32_t t = 0; t < count; ++t) {
    for (uint32_t half = 0; half < 2; ++half) {
      sums[t].val[half] = scaled ? vfmaq_n_f32(sums[t].val[half], sum[t].val[half], scale)
                                 : sum[t].val[half];
    }
  }
}

template <bool scaled>
inline void multiply_tokens(const Row& row, const float* x, uint32_t tokens, float scale,
                            Eight* sums) {
  uint32_t token = 0;
  for (; token + 4 <= tokens; token += 4) {
    multiply<scaled, 4>(row, x + token * kTile, scale, sums + token);
  }
  for (; token < tokens; ++token) {
    multiply<scaled, 1>(row, x + token * kTile, scale, sums + token);
  }
}

template <Values values>
Fault product(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
              float* out, uint64_t stride, uint64_t* tile) {
  constexpr bool scaled = values == Values::kInt8;
  Readable copy;
  Eight sums[kTile * kTokenBlock];  // [row][token]
  const uint32_t rows = rows_of(m, tile_row);
  for (uint32_t i = 0; i < kTile * tokens; ++i) sums[i] = zero();
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint64_t number = uint64_t{tile_row} * m.tile_cols + tile_col;
    *tile = number;
    const uint32_t cols = cols_of(m, tile_col);
    uint32_t count;
    const Fault fault = check_tile(m, number, rows, cols, &count);
    if (fault != Fault::kNone) return fault;
    const uint8_t* run = items_of(m, number, count, &copy);
    const uint16_t* scales = scaled ? scales_of(m, tile_row, tile_col) : nullptr;
    const float* x = prepared + uint64_t{tile_col} * tokens * kTile;
    for (uint32_t row = 0; row < rows; ++row) {
      Row weights;
      run = load_row<values>(word_of(m, number, row, cols), run, &weights);
      const float scale = scaled ? plain::from_bf16(scales[row]) : 1.0f;
      multiply_tokens<scaled>(weights, x, tokens, scale, sums + row * tokens);
    }
  }
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t token = 0; token < tokens; ++token) {
      const Eight sum = sums[row * tokens + token];
      out[token * stride + uint64_t{tile_row} * kTile + row] =
          vaddvq_f32(vaddq_f32(sum.val[0], sum.val[1]));
    }
  }
  return Fault::kNone;
}

Values values_of(Dtype dtype) {
  return dtype == Dtype::kBF16 ? Values::kBF16 : dtype == Dtype::kF16 ? Values::kF16 : Values::kF32;
}

// [tile_cols][tokens][64]
void prepare(const Packed& m, const void* x, uint32_t tokens, float* prepared) {
  const uint8_t* bytes = static_cast<const uint8_t*>(x);
  for (uint32_t first = 0; first < m.cols; first += kTile) {
    const uint32_t cols = cols_of(m, first / kTile);
    for (uint32_t token = 0; token < tokens; ++token, prepared += kTile) {
      uint8_t row[kTile * 4] = {};
      memcpy(row, bytes + (uint64_t{token} * m.cols + first) * m.item_bytes, cols * m.item_bytes);
      for (uint32_t piece = 0; piece < kPieces; ++piece) {
        const uint8_t* from = row + piece * kPiece * m.item_bytes;
        float* to = prepared + piece * kPiece;
        switch (values_of(m.dtype)) {
          case Values::kBF16: store8(to, expand_floats<Values::kBF16>(0xff, from)); break;
          case Values::kF16: store8(to, expand_floats<Values::kF16>(0xff, from)); break;
          default: memcpy(to, from, kPiece * sizeof *to); break;
        }
      }
    }
  }
}

Fault linear(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
             float* out, uint64_t stride, uint64_t* tile) {
  if (quantised(m)) {
    return product<Values::kInt8>(m, tile_row, prepared, tokens, out, stride, tile);
  }
  switch (values_of(m.dtype)) {
    case Values::kBF16:
      return product<Values::kBF16>(m, tile_row, prepared, tokens, out, stride, tile);
    case Values::kF16:
      return product<Values::kF16>(m, tile_row, prepared, tokens, out, stride, tile);
    default:
      return product<Values::kF32>(m, tile_row, prepared, tokens, out, stride, tile);
  }
}

}  // namespace
}  // namespace neon

extern const Kernels kNeon = {
    "neon", neon_supported, neon::expand, neon::prepare, neon::linear, kTokenBlock,
};

}  // namespace tierd
