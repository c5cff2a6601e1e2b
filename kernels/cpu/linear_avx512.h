// The fused sparse product with AVX-512, for one way of multiplying (a class `Math`).
//
// For every row of the matrix and every token there is one vector of 16 partial sums for a whole
// tile row. A token's sum takes the same additions in the same order whether it is alone, when rows
// are expanded into registers and never stored, or in a batch, when tiles are expanded into L1 and
// multiplied block by block: so its result does not depend on its batch.
#pragma once

#include "batch_avx512.h"
#include "denormals_avx512.h"

namespace tierd {
namespace avx512 {
namespace {

// One tile, one token. The sums go on through the tile; with scales it has its own, which are then
// scaled and added.
template <typename Math, bool scaled>
void one_token(const uint64_t* words, const uint8_t* run, const float* scales, const uint8_t* from,
               __m512* sums) {
  constexpr uint32_t vectors = Math::kVectors;
  constexpr uint32_t rows = Math::kRowsAtOnce;
  typename Math::Vector x[vectors], w[vectors];
  TIERD_UNROLL
  for (uint32_t i = 0; i < vectors; ++i) x[i] = Math::load(from + kVector * i);
  for (uint32_t row = 0; row < kTile; row += rows) {
    __m512 group[rows];
    TIERD_UNROLL
    for (uint32_t i = 0; i < rows; ++i) group[i] = scaled ? _mm512_setzero_ps() : sums[row + i];
    TIERD_UNROLL
    for (uint32_t i = 0; i < rows; ++i) {
      if constexpr (!scaled) prefetch<Math::kLines>(run + kAhead);
      run = Math::load_row(words[row + i], run, w);
      TIERD_UNROLL
      for (uint32_t v = 0; v < vectors; ++v) group[i] = Math::add_product(group[i], w[v], x[v]);
    }
    TIERD_UNROLL
    for (uint32_t i = 0; i < rows; ++i) {
      sums[row + i] =
          scaled ? _mm512_fmadd_ps(group[i], _mm512_set1_ps(scales[row + i]), sums[row + i])
                 : group[i];
    }
  }
}

// A tile row's scales in single precision.
inline void widen_scales(const uint16_t* scales, float* to) {
  for (uint32_t row = 0; row < kTile; row += 16) {
    const __m512i bits = _mm512_cvtepu16_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + row)));
    _mm512_store_si512(to + row, _mm512_slli_epi32(bits, 16));
  }
}

// Tiles side by side that are expanded before the sums of a batch are touched: these would else
// come from L2 for every tile. With scales, every tile has its own sums.
template <bool scaled>
constexpr uint32_t kTilesAtOnce = scaled ? 1 : 8;

template <typename Math, bool scaled>
Fault product(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
              float* out, uint64_t stride, uint64_t* tile) {
  constexpr uint64_t token_bytes = Math::kVectors * kVector;
  constexpr uint32_t most = kTilesAtOnce<scaled>;
  RunCopy copy;
  Items items;
  alignas(kVector) float scales[kTile];
  typename Math::Vector expanded[most * kTile * Math::kVectors];
  __m512 sums[kTile * kTokensTogether];  // [row][token]
  const uint32_t rows = rows_of(m, tile_row);
  const DenseWords dense(m, rows);
  for (uint32_t i = 0; i < kTile * tokens; ++i) sums[i] = _mm512_setzero_ps();
  uint32_t waiting = 0;  // expanded tiles
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint64_t number = uint64_t{tile_row} * m.tile_cols + tile_col;
    *tile = number;
    uint32_t count;
    const Fault fault = check_tile(m, number, rows, cols_of(m, tile_col), &count);
    if (fault != Fault::kNone) return fault;
    const uint64_t* words = dense.of(m, number, tile_col);
    const uint8_t* run = run_of(m, number, count, &copy, &items);
    if constexpr (scaled) widen_scales(scales_of(m, tile_row, tile_col), scales);
    const uint8_t* x = reinterpret_cast<const uint8_t*>(prepared) + tile_col * tokens * token_bytes;
    // The order of the tiles is kept: those that wait come first.
    const bool exactly = Math::kFlushes && has_denormals(m, number, count, run);
    if (tokens == 1 && !exactly) {
      one_token<Math, scaled>(words, run, scales, x, sums);
      continue;
    }
    if (!exactly) {
      expand_tile<Math>(words, run, expanded + waiting * kTile * Math::kVectors);
      ++waiting;
    }
    if (waiting == most || (waiting > 0 && (exactly || tile_col + 1 == m.tile_cols))) {
      const uint32_t behind = exactly ? waiting : waiting - 1;
      const uint64_t end = m.offsets[number + 1];
      multiply_tiles<Math, scaled>(expanded, x - behind * tokens * token_bytes, waiting, tokens,
                                   scales, sums, m.values + end * kRunUnit);
      waiting = 0;
    }
    if (exactly) multiply_exactly(words, run, x, tokens, sums);
  }
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t token = 0; token < tokens; ++token) {
      out[token * stride + uint64_t{tile_row} * kTile + row] =
          _mm512_reduce_add_ps(sums[row * tokens + token]);
    }
  }
  return Fault::kNone;
}

// [tile_cols][tokens][the vectors of 64 x]
template <typename Math>
void prepare_x(const Packed& m, const void* x, uint32_t tokens, float* prepared) {
  uint8_t* to = reinterpret_cast<uint8_t*>(prepared);
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint64_t here = low_bits(cols_of(m, tile_col));
    for (uint32_t token = 0; token < tokens; ++token, to += Math::kVectors * kVector) {
      const uint64_t at = uint64_t{token} * m.cols + uint64_t{tile_col} * kTile;
      Math::prepare(here, static_cast<const uint8_t*>(x) + at * m.item_bytes, to);
    }
  }
}

template <typename Math>
Fault product_of(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
                 float* out, uint64_t stride, uint64_t* tile) {
  return quantised(m)
             ? product<Math, true>(m, tile_row, prepared, tokens, out, stride, tile)
             : product<Math, false>(m, tile_row, prepared, tokens, out, stride, tile);
}

}  // namespace
}  // namespace avx512
}  // namespace tierd
