// Denormal bf16 weights, which AVX512_BF16 takes for zero: are there any, and their exact product.
#pragma once

#include "math_avx512.h"

namespace tierd {
namespace avx512 {
namespace {

// Whether one of `count` bf16 is denormal: twice its bits, without the sign, is in 1..255. A first
// look with `skipped` = 0 takes zeros, which are rarely stored, for denormal too; one with 1 not.
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

// A packed exponent is 0 only in a window from 0 on, or as an escape.
inline bool has_zero_exponents(const Packed& m, uint64_t tile, uint32_t count) {
  const Head head = head_of(m, tile);
  const uint8_t* escape =
      m.values + uint64_t{m.offsets[tile]} * kRunUnit + escapes_at(m, head, count);
  bool found = head.base == 0;
  for (uint32_t i = 0; i < head.escapes; ++i) found |= escape[i * kEscapeBytes + 2] == 0;
  return found;
}

// Whether a checked tile of bf16, whose kept elements are `run`, has denormals.
inline bool has_denormals(const Packed& m, uint64_t tile, uint32_t count, const uint8_t* run) {
  if (quantised(m)) return false;
  if (m.codec == Codec::kExponent && !has_zero_exponents(m, tile, count)) return false;
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

}  // namespace
}  // namespace avx512
}  // namespace tierd
