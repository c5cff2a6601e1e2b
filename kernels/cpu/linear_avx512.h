// The fused sparse product with AVX-512, for one way of multiplying (a class `Math`).
//
// For every row of the matrix and every token there is one vector of 16 partial sums for a whole
// tile row. A token's sum takes the same additions in the same order whether it is alone, when rows
// are expanded into registers and never stored, or in a batch, when tiles are expanded into L1 and
// multiplied block by block: so its result does not depend on its batch.
#pragma once

#include "decode_avx512.h"

namespace tierd {
namespace avx512 {
namespace {

// Before GCC 12 unrolls a loop by itself it has put an array of vectors into memory for good: a batch
// of 8 tokens took 549 ns a tile instead of 497.
#define TIERD_UNROLL _Pragma("GCC unroll 8")

// Tokens for which a tile is expanded once. Measured with 32 tokens in bf16 on one Zen 5 core: 8
// 1600, 16 1350, 32 1050 ns a tile.
constexpr uint32_t kTokensTogether = 32;

// Rows and tokens of a block: 16 sums in registers, 8 loads for 16 products.
constexpr uint32_t kBlock = 4;

// Single-precision products, for any dtype. 64 weights or x are four vectors.
template <Dtype dtype>
struct Fma {
  static constexpr uint32_t kVectors = 4;
  static constexpr uint32_t kLines = dtype == Dtype::kF32 ? 2 : 1;  // of values, a half-full row
  // Rows whose sums are loaded together.
  static constexpr uint32_t kRowsAtOnce = 8;
  static constexpr bool kFlushes = false;  // denormals
  using Vector = __m512;

  // The 64 weights of one row, and the run behind them.
  static const uint8_t* load_row(uint64_t word, const uint8_t* run, Vector w[kVectors]) {
    if constexpr (dtype == Dtype::kF32) {
      TIERD_UNROLL
      for (uint32_t i = 0; i < kVectors; ++i, word >>= 16) {
        const uint32_t some = word & 0xffff;
        w[i] = _mm512_castsi512_ps(expand16x32(some, run));
        run += 4 * __builtin_popcount(some);
      }
      return run;
    } else {
      const uint32_t low = static_cast<uint32_t>(word);
      const __m512i left = expand32x16(low, run);
      const __m512i right =
          expand32x16(static_cast<uint32_t>(word >> 32), run + 2 * __builtin_popcount(low));
      split(left, w);
      split(right, w + 2);
      return run + 2 * __builtin_popcountll(word);
    }
  }

  static __m512 add_product(__m512 sum, Vector w, Vector x) { return _mm512_fmadd_ps(w, x, sum); }
  static Vector load(const void* from) { return _mm512_load_ps(from); }

  // x of one token and tile, `here` of its columns inside the matrix, in the order of `load_row`.
  static void prepare(uint64_t here, const void* x, void* prepared) {
    if constexpr (dtype == Dtype::kF32) {
      TIERD_UNROLL
      for (uint32_t i = 0; i < kVectors; ++i) {
        const __mmask16 some = static_cast<__mmask16>(here >> (16 * i));
        _mm512_store_ps(static_cast<float*>(prepared) + 16 * i,
                        _mm512_maskz_loadu_ps(some, static_cast<const float*>(x) + 16 * i));
      }
    } else {
      for (uint32_t i = 0; i < 2; ++i) {
        const __mmask32 some = static_cast<__mmask32>(here >> (32 * i));
        Vector two[2];
        split(_mm512_maskz_loadu_epi16(some, static_cast<const uint16_t*>(x) + 32 * i), two);
        _mm512_store_ps(static_cast<float*>(prepared) + 32 * i, two[0]);
        _mm512_store_ps(static_cast<float*>(prepared) + 32 * i + 16, two[1]);
      }
    }
  }

 private:
  // 32 elements of 16 bits: of bf16 the even columns, then the odd ones, without a shuffle.
  static void split(__m512i bits, Vector two[2]) {
    if constexpr (dtype == Dtype::kBF16) {
      const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
      two[0] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
      two[1] = _mm512_castsi512_ps(_mm512_and_si512(bits, top));
    } else {
      two[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
      two[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
    }
  }
};

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

template <typename Math>
void expand_tile(const uint64_t* words, const uint8_t* run, typename Math::Vector* to) {
  for (uint32_t row = 0; row < kTile; ++row, to += Math::kVectors) {
    prefetch<Math::kLines>(run + kAhead);
    run = Math::load_row(words[row], run, to);
  }
}

// kBlock rows and `count` tokens of `tiles` expanded tiles.
template <typename Math, bool scaled, uint32_t count>
inline void multiply_block(const typename Math::Vector* w, const uint8_t* x, uint32_t tiles,
                           uint32_t tokens, const float* scales, __m512* sums, const uint8_t*& next) {
  constexpr uint32_t vectors = Math::kVectors;
  __m512 sum[kBlock][count];
  TIERD_UNROLL
  for (uint32_t r = 0; r < kBlock; ++r) {
    TIERD_UNROLL
    for (uint32_t t = 0; t < count; ++t) {
      sum[r][t] = scaled ? _mm512_setzero_ps() : sums[r * tokens + t];
    }
  }
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    TIERD_UNROLL
    for (uint32_t v = 0; v < vectors; ++v) {
      typename Math::Vector xs[count];
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
      next += kVector;
      TIERD_UNROLL
      for (uint32_t t = 0; t < count; ++t) xs[t] = Math::load(x + (t * vectors + v) * kVector);
      TIERD_UNROLL
      for (uint32_t r = 0; r < kBlock; ++r) {
        const typename Math::Vector weights = w[r * vectors + v];
        TIERD_UNROLL
        for (uint32_t t = 0; t < count; ++t) {
          sum[r][t] = Math::add_product(sum[r][t], weights, xs[t]);
        }
      }
    }
    w += kTile * vectors;
    x += uint64_t{tokens} * vectors * kVector;
  }
  TIERD_UNROLL
  for (uint32_t r = 0; r < kBlock; ++r) {
    TIERD_UNROLL
    for (uint32_t t = 0; t < count; ++t) {
      __m512* to = sums + r * tokens + t;
      *to = scaled ? _mm512_fmadd_ps(sum[r][t], _mm512_set1_ps(scales[r]), *to) : sum[r][t];
    }
  }
}

// Meanwhile the `coming` bytes from `next` on come into L2: without, memory would rest until the next
// tiles are expanded.
template <typename Math, bool scaled>
void multiply_tiles(const typename Math::Vector* w, const uint8_t* x, uint32_t tiles,
                    uint32_t tokens, const float* scales, __m512* sums, const uint8_t* next) {
  constexpr uint64_t token_bytes = Math::kVectors * kVector;
  for (uint32_t row = 0; row < kTile; row += kBlock) {
    const typename Math::Vector* rows = w + row * Math::kVectors;
    __m512* to = sums + row * tokens;
    const float* by = scaled ? scales + row : nullptr;
    uint32_t token = 0;
    for (; token + kBlock <= tokens; token += kBlock) {
      multiply_block<Math, scaled, kBlock>(rows, x + token * token_bytes, tiles, tokens, by,
                                           to + token, next);
    }
    const uint8_t* left = x + token * token_bytes;
    switch (tokens - token) {
      case 1: multiply_block<Math, scaled, 1>(rows, left, tiles, tokens, by, to + token, next); break;
      case 2: multiply_block<Math, scaled, 2>(rows, left, tiles, tokens, by, to + token, next); break;
      case 3: multiply_block<Math, scaled, 3>(rows, left, tiles, tokens, by, to + token, next); break;
    }
  }
}

// Whether one of `count` bf16 is denormal: twice its bits, without the sign, is in 1..255. `skipped`
// says from where on: 1 after a first look that took zeros, which are rarely stored, for denormal.
template <uint16_t skipped>
inline bool has_magnitudes_below_normal(const uint8_t* run, uint32_t count) {
  const __m512i offset = _mm512_set1_epi16(skipped);
  __m512i least[4];
  for (__m512i& each : least) each = _mm512_set1_epi16(-1);
  const auto look = [offset](__m512i bits, __m512i& lowest) {
    __m512i twice = _mm512_add_epi16(bits, bits);
    if constexpr (skipped != 0) twice = _mm512_sub_epi16(twice, offset);
    lowest = _mm512_min_epu16(lowest, twice);
  };
  uint32_t first = 0;
  for (; first + 128 <= count; first += 128, run += 4 * kVector) {
    TIERD_UNROLL
    for (uint32_t i = 0; i < 4; ++i) look(_mm512_loadu_si512(run + i * kVector), least[i]);
  }
  for (; first < count; first += 32, run += kVector) {
    const __mmask32 some =
        static_cast<__mmask32>(low_bits(count - first < 32 ? count - first : 32));
    look(_mm512_mask_loadu_epi16(_mm512_set1_epi16(0x7f7f), some, run), least[0]);
  }
  const __m512i low = _mm512_min_epu16(least[0], least[1]);
  const __m512i high = _mm512_min_epu16(least[2], least[3]);
  return _mm512_cmplt_epu16_mask(_mm512_min_epu16(low, high),
                                 _mm512_set1_epi16(0x100 - skipped)) != 0;
}

inline bool has_denormals(const uint8_t* run, uint32_t count) {
  return has_magnitudes_below_normal<0>(run, count) && has_magnitudes_below_normal<1>(run, count);
}

// A tile whose weights must not be flushed, in single precision. `x` are bf16 as they are.
inline void multiply_exactly(const uint64_t* words, const uint8_t* run, const uint8_t* x,
                             uint32_t tokens, __m512* sums) {
  using Exact = Fma<Dtype::kBF16>;
  __m512 w[Exact::kVectors], xs[Exact::kVectors];
  for (uint32_t row = 0; row < kTile; ++row) {
    run = Exact::load_row(words[row], run, w);
    for (uint32_t token = 0; token < tokens; ++token) {
      Exact::prepare(~uint64_t{0}, x + token * 2 * kTile, xs);
      __m512* sum = sums + row * tokens + token;
      for (uint32_t i = 0; i < Exact::kVectors; ++i) *sum = _mm512_fmadd_ps(w[i], xs[i], *sum);
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
    // Levels are never denormal. The order of the tiles is kept: those that wait come first.
    const bool exactly = Math::kFlushes && !scaled && has_denormals(run, count);
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
