// The fused sparse product in portable C++: expand a tile to floats in L1, multiply, add.
#include "plain.h"

namespace tierd {
namespace plain {
namespace {

// Sums are kept in 16 lanes, as in the AVX-512 unit: the error of a long sum falls with the number
// of partial sums, and the compiler may use whatever vectors the target has.
constexpr uint32_t kLanes = 16;

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float from_bf16(uint16_t bits) { return as_float(uint32_t{bits} << 16); }

// Shifting the 15 low bits into a float's exponent and mantissa gives the value times 2^-112, for
// ordinary and denormal halves alike; only infinity and NaN need their exponent filled up.
inline float from_f16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{bits & 0x7fffu} << 13;
  if ((bits & 0x7c00u) == 0x7c00u) return as_float(sign | magnitude | 0x7f800000u);
  const float scaled = as_float(magnitude) * as_float((127u + 112u) << 23);
  return sign != 0 ? -scaled : scaled;
}

inline float to_float(Dtype dtype, const uint8_t* bits) {
  if (dtype == Dtype::kF32) {
    float value;
    memcpy(&value, bits, sizeof value);
    return value;
  }
  uint16_t half;
  memcpy(&half, bits, sizeof half);
  return dtype == Dtype::kBF16 ? from_bf16(half) : from_f16(half);
}

void prepare(const Packed& m, const void* x, uint32_t tokens, float* prepared) {
  const Dtype dtype = m.dtype;
  const uint32_t cols = m.cols;
  const size_t item = m.item_bytes;
  const uint8_t* bytes = static_cast<const uint8_t*>(x);
  for (uint32_t first = 0; first < cols; first += kTile) {
    for (uint32_t token = 0; token < tokens; ++token, prepared += kTile) {
      for (uint32_t i = 0; i < kTile; ++i) {
        const uint32_t col = first + i;
        prepared[i] =
            col < cols ? to_float(dtype, bytes + (uint64_t{token} * cols + col) * item) : 0.0f;
      }
    }
  }
}

// Every zero of the tile is multiplied too: 0 * inf and 0 * NaN are NaN, as in the dense product.
Fault linear(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
             float* out, uint64_t stride, uint64_t* tile) {
  const Dtype dtype = m.dtype;
  float sums[kTile][kTokenBlock][kLanes];
  float weights[kTile];
  const uint32_t rows = rows_of(m, tile_row);
  memset(sums, 0, sizeof sums);
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint64_t number = uint64_t{tile_row} * m.tile_cols + tile_col;
    *tile = number;
    const Fault fault = check_tile(m, number, rows, cols_of(m, tile_col));
    if (fault != Fault::kNone) return fault;
    const uint64_t* words = m.bitmap + number * kTile;
    const uint8_t* run = m.values + uint64_t{m.offsets[number]} * kRunUnit;
    const float* xs = prepared + uint64_t{tile_col} * tokens * kTile;
    for (uint32_t row = 0; row < rows; ++row) {
      memset(weights, 0, sizeof weights);
      for (uint64_t word = words[row]; word != 0; word &= word - 1, run += m.item_bytes) {
        weights[__builtin_ctzll(word)] = to_float(dtype, run);
      }
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
    "plain", plain_supported, plain::expand, plain::prepare, plain::linear,
};

}  // namespace tierd
