// The fused sparse product with AVX-512: rows are expanded into registers and never stored.
//
// For every row of the matrix and every token one vector of 16 partial sums lives in L1 for a whole
// tile row; x is in registers for a tile (one token) or in L1. The order of the additions is the
// same for every number of tokens, so a token's result does not depend on its batch.
#include "avx512.h"

namespace tierd {
namespace avx512 {
namespace {

// Bytes of values ahead of the load. Runs are consecutive, but the hardware's prefetcher stops at
// each 4 KiB page. Measured on Zen 5, one core, 4096 x 4096 in bf16 at 50 %: 512 B 32, 1.5 KiB 43,
// 4 KiB 48, 8 KiB 48 GB/s of dense bytes.
constexpr uint64_t kAhead = 4096;

// What a half-full row takes. Asking beyond the end of the values is harmless.
template <Dtype dtype>
inline void prefetch_row(const uint8_t* run) {
  constexpr uint64_t row_bytes = kTile / 2 * (dtype == Dtype::kF32 ? 4 : 2);
  for (uint64_t at = kAhead; at < kAhead + row_bytes; at += kVector) {
    _mm_prefetch(reinterpret_cast<const char*>(run + at), _MM_HINT_T0);
  }
}

// The 64 weights of one row in four vectors, and the run behind them.
template <Dtype dtype>
inline const uint8_t* load_row(uint64_t word, const uint8_t* run, __m512 w[4]) {
  if constexpr (dtype == Dtype::kF32) {
    for (int i = 0; i < 4; ++i, word >>= 16) {
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
    if constexpr (dtype == Dtype::kBF16) {
      // Even columns, then odd ones, as `prepare` orders x: no shuffle is needed.
      const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
      w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(left, 16));
      w[1] = _mm512_castsi512_ps(_mm512_and_si512(left, top));
      w[2] = _mm512_castsi512_ps(_mm512_slli_epi32(right, 16));
      w[3] = _mm512_castsi512_ps(_mm512_and_si512(right, top));
    } else {
      w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(left));
      w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(left, 1));
      w[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(right));
      w[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(right, 1));
    }
    return run + 2 * __builtin_popcountll(word);
  }
}

inline __m512 add_products(__m512 sum, const __m512 w[4], const __m512 x[4]) {
  sum = _mm512_fmadd_ps(w[0], x[0], sum);
  sum = _mm512_fmadd_ps(w[1], x[1], sum);
  sum = _mm512_fmadd_ps(w[2], x[2], sum);
  return _mm512_fmadd_ps(w[3], x[3], sum);
}

inline void load_x(const float* from, __m512 x[4]) {
  for (int i = 0; i < 4; ++i) x[i] = _mm512_load_ps(from + 16 * i);
}

// Rows whose sums are loaded before the first of them is stored. Row by row, each load of a sum was
// held back by the store before it: one chain of all rows, at half the speed (Zen 5).
constexpr uint32_t kRowsAtOnce = 4;

template <Dtype dtype>
void one_token(const uint64_t* words, const uint8_t* run, const float* from, __m512* sums) {
  __m512 x[4], w[4], group[kRowsAtOnce];
  load_x(from, x);
  for (uint32_t row = 0; row < kTile; row += kRowsAtOnce) {
    for (uint32_t i = 0; i < kRowsAtOnce; ++i) group[i] = sums[row + i];
    for (uint32_t i = 0; i < kRowsAtOnce; ++i) {
      prefetch_row<dtype>(run);
      run = load_row<dtype>(words[row + i], run, w);
      group[i] = add_products(group[i], w, x);
    }
    for (uint32_t i = 0; i < kRowsAtOnce; ++i) sums[row + i] = group[i];
  }
}

// Two rows at a time share each load of x.
template <Dtype dtype>
void some_tokens(const uint64_t* words, const uint8_t* run, const float* from, uint32_t tokens,
                 __m512* sums) {
  __m512 x[4], w[4], v[4];
  for (uint32_t row = 0; row < kTile; row += 2) {
    prefetch_row<dtype>(run);
    run = load_row<dtype>(words[row], run, w);
    prefetch_row<dtype>(run);
    run = load_row<dtype>(words[row + 1], run, v);
    __m512* sum = sums + row * tokens;
    for (uint32_t token = 0; token < tokens; ++token) {
      load_x(from + token * kTile, x);
      sum[token] = add_products(sum[token], w, x);
      sum[tokens + token] = add_products(sum[tokens + token], v, x);
    }
  }
}

template <Dtype dtype>
Fault product(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
              float* out, uint64_t stride, uint64_t* tile) {
  RunCopy copy;
  __m512 sums[kTile * kTokenBlock];  // [row][token]
  const uint32_t rows = rows_of(m, tile_row);
  for (uint32_t i = 0; i < kTile * tokens; ++i) sums[i] = _mm512_setzero_ps();
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint64_t number = uint64_t{tile_row} * m.tile_cols + tile_col;
    *tile = number;
    const Fault fault = check_tile(m, number, rows, cols_of(m, tile_col));
    if (fault != Fault::kNone) return fault;
    const uint64_t* words = m.bitmap + number * kTile;
    const uint8_t* run = readable_run(m, number, &copy);
    const float* x = prepared + uint64_t{tile_col} * tokens * kTile;
    if (tokens == 1) {
      one_token<dtype>(words, run, x, sums);
    } else {
      some_tokens<dtype>(words, run, x, tokens, sums);
    }
  }
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t token = 0; token < tokens; ++token) {
      out[token * stride + uint64_t{tile_row} * kTile + row] =
          _mm512_reduce_add_ps(sums[row * tokens + token]);
    }
  }
  return Fault::kNone;
}

Fault linear(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
             float* out, uint64_t stride, uint64_t* tile) {
  if (m.codec != Codec::kRaw) {
    return kPlain.linear(m, tile_row, prepared, tokens, out, stride, tile);
  }
  switch (m.dtype) {
    case Dtype::kBF16:
      return product<Dtype::kBF16>(m, tile_row, prepared, tokens, out, stride, tile);
    case Dtype::kF16:
      return product<Dtype::kF16>(m, tile_row, prepared, tokens, out, stride, tile);
    default:
      return product<Dtype::kF32>(m, tile_row, prepared, tokens, out, stride, tile);
  }
}

void prepare(const Packed& m, const void* x, uint32_t tokens, float* prepared) {
  if (m.codec != Codec::kRaw) return kPlain.prepare(m, x, tokens, prepared);
  const Dtype dtype = m.dtype;
  const uint32_t cols = m.cols;
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (uint32_t first = 0; first < cols; first += kTile) {
    const uint32_t left = cols - first;
    const uint64_t here = low_bits(left < kTile ? left : kTile);
    for (uint32_t token = 0; token < tokens; ++token, prepared += kTile) {
      const uint64_t at = uint64_t{token} * cols + first;
      if (dtype == Dtype::kF32) {
        const float* from = static_cast<const float*>(x) + at;
        for (int i = 0; i < 4; ++i) {
          const __mmask16 some = static_cast<__mmask16>(here >> (16 * i));
          _mm512_store_ps(prepared + 16 * i, _mm512_maskz_loadu_ps(some, from + 16 * i));
        }
        continue;
      }
      const uint16_t* from = static_cast<const uint16_t*>(x) + at;
      for (int i = 0; i < 2; ++i) {
        const __mmask32 some = static_cast<__mmask32>(here >> (32 * i));
        const __m512i bits = _mm512_maskz_loadu_epi16(some, from + 32 * i);
        float* to = prepared + 32 * i;
        if (dtype == Dtype::kBF16) {
          _mm512_store_si512(to, _mm512_slli_epi32(bits, 16));
          _mm512_store_si512(to + 16, _mm512_and_si512(bits, top));
        } else {
          _mm512_store_ps(to, _mm512_cvtph_ps(_mm512_castsi512_si256(bits)));
          _mm512_store_ps(to + 16, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)));
        }
      }
    }
  }
}

}  // namespace
}  // namespace avx512

extern const Kernels kAvx512 = {
    "avx512", avx512_supported, avx512::expand, avx512::prepare, avx512::linear,
};

}  // namespace tierd
