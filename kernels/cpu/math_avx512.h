// How 64 weights of a row are multiplied with 64 x, in single precision. Others look the same.
#pragma once

#include "decode_avx512.h"

namespace tierd {
namespace avx512 {
namespace {

// When GCC 12 unrolls a loop by itself it has already put the loop's array of vectors into memory,
// where it stays: a batch of 8 tokens took 549 ns a tile instead of 497.
#define TIERD_UNROLL _Pragma("GCC unroll 8")

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

}  // namespace
}  // namespace avx512
}  // namespace tierd
