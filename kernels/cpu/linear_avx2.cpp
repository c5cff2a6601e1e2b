// The fused sparse product with AVX2: a table shuffle brings eight weights to their columns.
//
// For every row of the matrix and every token one vector of 8 partial sums lives for a whole tile
// row. A token's sum takes the same additions in the same order whether it is alone, when rows are
// expanded into registers and never stored, or in a batch, when tiles are expanded into L1 and
// multiplied block by block: so its result does not depend on its batch.
#include "decode_avx2.h"

namespace tierd {
namespace avx2 {
namespace {

// Rows whose sums are loaded before the first of them is stored, as in the AVX-512 unit. Their loop
// has to be unrolled, or the compiler keeps these sums on the stack.
constexpr uint32_t kRowsAtOnce = 4;

// Rows and tokens of a block of a batch. 12 sums, 3 x and a weight fill the registers; with 8 sums
// each waited for itself (Zen 5, 8 tokens: 1140 ns a tile instead of 870).
constexpr uint32_t kBlockRows = 4;
constexpr uint32_t kBlockTokens = 3;

// Rows of a tile that are expanded before they meet the tokens of a batch.
constexpr uint32_t kRowsExpanded = 8;

inline __m256 zero() { return _mm256_setzero_ps(); }

inline __m256 scaled_sum(__m256 products, float scale, __m256 sum) {
  return _mm256_fmadd_ps(products, _mm256_set1_ps(scale), sum);
}

// One tile, one token. The sums go on through the tile; with scales it has its own, which are then
// scaled and added.
template <Dtype items, bool scaled, bool full>
void one_token(const uint64_t* words, const uint8_t* run, const float* scales, const float* from,
               __m256* sums) {
  __m256 x[kPieces];
  for (uint32_t i = 0; i < kPieces; ++i) x[i] = _mm256_load_ps(from + i * kPiece);
  for (uint32_t row = 0; row < kTile; row += kRowsAtOnce) {
    __m256 group[kRowsAtOnce];
    for (uint32_t i = 0; i < kRowsAtOnce; ++i) group[i] = scaled ? zero() : sums[row + i];
#pragma GCC unroll 4
    for (uint32_t i = 0; i < kRowsAtOnce; ++i) {
      if constexpr (!scaled) prefetch_row<items, full>(run);
      run = for_pieces<items, full>(words[row + i], run, [&](uint32_t piece, __m256 weights) {
        group[i] = _mm256_fmadd_ps(weights, x[piece], group[i]);
      });
    }
    for (uint32_t i = 0; i < kRowsAtOnce; ++i) {
      sums[row + i] = scaled ? scaled_sum(group[i], scales[row + i], sums[row + i]) : group[i];
    }
  }
}

// kBlockRows rows and `count` tokens of an expanded tile.
template <bool scaled, uint32_t count>
inline void multiply_block(const float* weights, const float* x, uint32_t tokens,
                           const float* scales, __m256* sums) {
  __m256 sum[kBlockRows][count];
  for (uint32_t r = 0; r < kBlockRows; ++r) {
    for (uint32_t t = 0; t < count; ++t) sum[r][t] = scaled ? zero() : sums[r * tokens + t];
  }
#pragma GCC unroll 1
  for (uint32_t at = 0; at < kTile; at += kPiece) {
    __m256 xs[count];
    for (uint32_t t = 0; t < count; ++t) xs[t] = _mm256_load_ps(x + t * kTile + at);
    for (uint32_t r = 0; r < kBlockRows; ++r) {
      const __m256 w = _mm256_load_ps(weights + r * kTile + at);
      for (uint32_t t = 0; t < count; ++t) sum[r][t] = _mm256_fmadd_ps(w, xs[t], sum[r][t]);
    }
  }
  for (uint32_t r = 0; r < kBlockRows; ++r) {
    for (uint32_t t = 0; t < count; ++t) {
      __m256* to = sums + r * tokens + t;
      *to = scaled ? scaled_sum(sum[r][t], scales[r], *to) : sum[r][t];
    }
  }
}

template <bool scaled>
inline void multiply_rows(const float* w, const float* x, uint32_t tokens, const float* scales,
                          __m256* to) {
  uint32_t token = 0;
  for (; token + kBlockTokens <= tokens; token += kBlockTokens) {
    multiply_block<scaled, kBlockTokens>(w, x + token * kTile, tokens, scales, to + token);
  }
  const float* left = x + token * kTile;
  switch (tokens - token) {
    case 1: multiply_block<scaled, 1>(w, left, tokens, scales, to + token); break;
    case 2: multiply_block<scaled, 2>(w, left, tokens, scales, to + token); break;
    case 3: multiply_block<scaled, 3>(w, left, tokens, scales, to + token); break;
  }
}

// One tile, some tokens. A whole expanded tile would drive the sums out of L1.
template <Dtype items, bool scaled, bool full>
void some_tokens(const uint64_t* words, const uint8_t* run, const float* scales, const float* x,
                 uint32_t tokens, __m256* sums) {
  alignas(kVector) float expanded[kRowsExpanded * kTile];
  for (uint32_t first = 0; first < kTile; first += kRowsExpanded) {
    float* to = expanded;
    for (uint32_t i = 0; i < kRowsExpanded; ++i, to += kTile) {
      if constexpr (!scaled) prefetch_row<items, full>(run);
      run = for_pieces<items, full>(words[first + i], run, [to](uint32_t piece, __m256 weights) {
        _mm256_store_ps(to + piece * kPiece, weights);
      });
    }
    for (uint32_t i = 0; i < kRowsExpanded; i += kBlockRows) {
      const uint32_t row = first + i;
      multiply_rows<scaled>(expanded + i * kTile, x, tokens, scales + row, sums + row * tokens);
    }
  }
}

inline float sum_of(__m256 lanes) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// A tile row's scales in single precision.
inline void widen_scales(const uint16_t* scales, float* to) {
  for (uint32_t row = 0; row < kTile; row += kPiece) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(scales + row);
    _mm256_store_ps(to + row, widen_floats<Dtype::kBF16>(from));
  }
}

template <Dtype items, bool scaled>
Fault product(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
              float* out, uint64_t stride, uint64_t* tile) {
  RunCopy copy;
  Items decoded;
  alignas(kVector) float scales[kTile];
  __m256 sums[kTile * kTokenBlock];  // [row][token]
  const uint32_t rows = rows_of(m, tile_row);
  const DenseWords dense(m, rows);
  for (uint32_t i = 0; i < kTile * tokens; ++i) sums[i] = zero();
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint64_t number = uint64_t{tile_row} * m.tile_cols + tile_col;
    *tile = number;
    uint32_t count;
    const Fault fault = check_tile(m, number, rows, cols_of(m, tile_col), &count);
    if (fault != Fault::kNone) return fault;
    const uint64_t* words = dense.of(m, number, tile_col);
    const uint8_t* run = run_of(m, number, count, &copy, &decoded);
    const bool full = count == kTile * kTile;
    if constexpr (scaled) widen_scales(scales_of(m, tile_row, tile_col), scales);
    const float* x = prepared + uint64_t{tile_col} * tokens * kTile;
    if (tokens == 1) {
      full ? one_token<items, scaled, true>(words, run, scales, x, sums)
           : one_token<items, scaled, false>(words, run, scales, x, sums);
    } else {
      full ? some_tokens<items, scaled, true>(words, run, scales, x, tokens, sums)
           : some_tokens<items, scaled, false>(words, run, scales, x, tokens, sums);
    }
  }
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t token = 0; token < tokens; ++token) {
      out[token * stride + uint64_t{tile_row} * kTile + row] = sum_of(sums[row * tokens + token]);
    }
  }
  return Fault::kNone;
}

// [tile_cols][tokens][64]
template <Dtype dtype>
void prepare_x(const Packed& m, const void* x, uint32_t tokens, float* prepared) {
  const uint8_t* bytes = static_cast<const uint8_t*>(x);
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint32_t cols = cols_of(m, tile_col);
    for (uint32_t token = 0; token < tokens; ++token, prepared += kTile) {
      const uint64_t at = uint64_t{token} * m.cols + uint64_t{tile_col} * kTile;
      const uint8_t* from = bytes + at * kItemBytes<dtype>;
      uint8_t edge[kTile * kItemBytes<dtype>];
      if (cols < kTile) {
        memset(edge, 0, sizeof edge);
        memcpy(edge, from, cols * kItemBytes<dtype>);
        from = edge;
      }
      for_pieces<dtype, true>(0, from, [prepared](uint32_t piece, __m256 floats) {
        _mm256_store_ps(prepared + piece * kPiece, floats);
      });
    }
  }
}

void prepare(const Packed& m, const void* x, uint32_t tokens, float* prepared) {
  switch (m.dtype) {
    case Dtype::kBF16: return prepare_x<Dtype::kBF16>(m, x, tokens, prepared);
    case Dtype::kF16: return prepare_x<Dtype::kF16>(m, x, tokens, prepared);
    default: return prepare_x<Dtype::kF32>(m, x, tokens, prepared);
  }
}

Fault linear(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
             float* out, uint64_t stride, uint64_t* tile) {
  if (quantised(m)) {
    return product<Dtype::kBF16, true>(m, tile_row, prepared, tokens, out, stride, tile);
  }
  switch (m.dtype) {
    case Dtype::kBF16:
      return product<Dtype::kBF16, false>(m, tile_row, prepared, tokens, out, stride, tile);
    case Dtype::kF16:
      return product<Dtype::kF16, false>(m, tile_row, prepared, tokens, out, stride, tile);
    default:
      return product<Dtype::kF32, false>(m, tile_row, prepared, tokens, out, stride, tile);
  }
}

}  // namespace
}  // namespace avx2

extern const Kernels kAvx2 = {
    "avx2", avx2_supported, avx2::expand, avx2::prepare, avx2::linear, kTokenBlock,
};

}  // namespace tierd
