// The fused sparse product in portable C++: expand a row to floats in L1, multiply, add.
#include "plain.h"
#include "plain_floats.h"

namespace tierd {
namespace plain {
namespace {

// Sums are kept in 16 lanes, as in the AVX-512 unit: the error of a long sum falls with the number
// of partial sums, and the compiler may use whatever vectors the target has.
constexpr uint32_t kLanes = 16;

void prepare(const Packed& m, const void* x, uint32_t tokens, float* prepared) {
  const uint8_t* bytes = static_cast<const uint8_t*>(x);
  for (uint32_t first = 0; first < m.cols; first += kTile) {
    for (uint32_t token = 0; token < tokens; ++token, prepared += kTile) {
      for (uint32_t i = 0; i < kTile; ++i) {
        const uint32_t col = first + i;
        const uint64_t at = (uint64_t{token} * m.cols + col) * m.item_bytes;
        prepared[i] = col < m.cols ? to_float(m.dtype, bytes + at) : 0.0f;
      }
    }
  }
}

// Both fill the 64 weights of a row and return the items behind those that they took.
const uint8_t* load_row(uint64_t word, const uint8_t* items, const Packed& m, float* weights) {
  memset(weights, 0, kTile * sizeof *weights);
  for (; word != 0; word &= word - 1, items += m.item_bytes) {
    weights[__builtin_ctzll(word)] = to_float(m.dtype, items);
  }
  return items;
}

const uint8_t* load_quantised_row(uint64_t word, const uint8_t* items, float scale,
                                  float* weights) {
  memset(weights, 0, kTile * sizeof *weights);
  for (; word != 0; word &= word - 1, ++items) {
    weights[__builtin_ctzll(word)] = static_cast<float>(static_cast<int8_t>(*items)) * scale;
  }
  return items;
}

// Every zero of the tile is multiplied too: 0 * inf and 0 * NaN are NaN, as in the dense product.
Fault linear(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
             float* out, uint64_t stride, uint64_t* tile) {
  float sums[kTile][kTokenBlock][kLanes];
  float weights[kTile];
  Items decoded;
  const uint32_t rows = rows_of(m, tile_row);
  memset(sums, 0, sizeof sums);
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint64_t number = uint64_t{tile_row} * m.tile_cols + tile_col;
    *tile = number;
    const uint32_t cols = cols_of(m, tile_col);
    uint32_t count;
    const Fault fault = check_tile(m, number, rows, cols, &count);
    if (fault != Fault::kNone) return fault;
    const uint8_t* items = items_of(m, number, count, &decoded);
    const uint16_t* scales = quantised(m) ? scales_of(m, tile_row, tile_col) : nullptr;
    const float* xs = prepared + uint64_t{tile_col} * tokens * kTile;
    for (uint32_t row = 0; row < rows; ++row) {
      const uint64_t word = word_of(m, number, row, cols);
      items = scales == nullptr ? load_row(word, items, m, weights)
                                : load_quantised_row(word, items, from_bf16(scales[row]), weights);
      for (uint32_t token = 0; token < tokens; ++token) {
        float* sum = sums[row][token];
        const float* x = xs + token * kTile;
        for (uint32_t i = 0; i < kTile; i += kLanes) {
          for (uint32_t lane = 0; lane < kLanes; ++lane) {
            sum[lane] += weights[i + lane] * x[i + lane];
          }
        }
      }
    }
  }
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t token = 0; token < tokens; ++token) {
      float* sum = sums[row][token];
      for (uint32_t width = kLanes / 2; width > 0; width /= 2) {
        for (uint32_t lane = 0; lane < width; ++lane) sum[lane] += sum[lane + width];
      }
      out[token * stride + uint64_t{tile_row} * kTile + row] = sum[0];
    }
  }
  return Fault::kNone;
}

}  // namespace
}  // namespace plain

extern const Kernels kPlain = {
    "plain", plain_supported, plain::expand, plain::prepare, plain::linear, kTokenBlock,
};

}  // namespace tierd
