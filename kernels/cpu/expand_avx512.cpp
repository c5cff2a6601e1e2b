// Bitmap decompression with AVX-512: one vpexpand for each vector of a row.
#include "avx512.h"

namespace tierd {
namespace avx512 {
namespace {

// Each returns the run behind the values that it took. `cols` has a bit for each column to write.
inline const uint8_t* expand_row(uint64_t word, const uint8_t* run, uint16_t* to, uint64_t cols) {
  const __mmask32 low = static_cast<__mmask32>(word);
  const __mmask32 high = static_cast<__mmask32>(word >> 32);
  const uint8_t* middle = run + 2 * __builtin_popcount(low);
  const __m512i left = _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(run));
  const __m512i right = _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(middle));
  _mm512_mask_storeu_epi16(to, static_cast<__mmask32>(cols), left);
  _mm512_mask_storeu_epi16(to + 32, static_cast<__mmask32>(cols >> 32), right);
  return middle + 2 * __builtin_popcount(high);
}

inline const uint8_t* expand_row(uint64_t word, const uint8_t* run, uint32_t* to, uint64_t cols) {
  for (uint32_t i = 0; i < kTile; i += 16, word >>= 16, cols >>= 16) {
    const __mmask16 some = static_cast<__mmask16>(word);
    const __m512i part = _mm512_maskz_expand_epi32(some, _mm512_loadu_si512(run));
    _mm512_mask_storeu_epi32(to + i, static_cast<__mmask16>(cols), part);
    run += 4 * __builtin_popcount(some);
  }
  return run;
}

template <typename Element>
Fault expand(const Packed& m, uint32_t tile_row, Element* out, uint64_t stride, uint64_t* tile) {
  RunCopy copy;
  const uint32_t rows = rows_of(m, tile_row);
  for (uint32_t tile_col = 0; tile_col < m.tile_cols; ++tile_col) {
    const uint64_t number = uint64_t{tile_row} * m.tile_cols + tile_col;
    *tile = number;
    const uint32_t cols = cols_of(m, tile_col);
    const Fault fault = check_tile(m, number, rows, cols);
    if (fault != Fault::kNone) return fault;
    const uint64_t* words = m.bitmap + number * kTile;
    const uint8_t* run = readable_run(m, number, &copy);
    Element* to = out + uint64_t{tile_col} * kTile;
    const uint64_t written = low_bits(cols);
    for (uint32_t row = 0; row < rows; ++row, to += stride) {
      run = expand_row(words[row], run, to, written);
    }
  }
  return Fault::kNone;
}

}  // namespace

Fault expand16(const Packed& m, uint32_t tile_row, uint16_t* out, uint64_t stride, uint64_t* tile) {
  return expand(m, tile_row, out, stride, tile);
}

Fault expand32(const Packed& m, uint32_t tile_row, uint32_t* out, uint64_t stride, uint64_t* tile) {
  return expand(m, tile_row, out, stride, tile);
}

}  // namespace avx512
}  // namespace tierd
