// What the two AVX-512 units share: the check of a tile, and runs that may be read past their end.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace tierd {
namespace avx512 {

Fault expand(const Packed&, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
             uint64_t* tile);

namespace {

constexpr uint64_t kVector = 64;

// The longest run (a dense tile of 4-byte elements), and one vector that is read and not used.
constexpr uint64_t kLongestRun = uint64_t{kTile} * kTile * 4;
struct alignas(kVector) RunCopy {
  uint8_t bytes[kLongestRun + kVector];
};

// Expansion from a register. Given a load, the compiler would fold it into vpexpand's memory form:
// alone it is as fast, but between the stores of the fused product it took 320 ns a tile instead of
// 180 (Zen 5).
inline __m512i in_register(const uint8_t* run) {
  __m512i vector = _mm512_loadu_si512(run);
  asm("" : "+v"(vector));
  return vector;
}

inline __m512i expand32x16(uint32_t bits, const uint8_t* run) {
  return _mm512_maskz_expand_epi16(bits, in_register(run));
}

inline __m512i expand16x32(uint32_t bits, const uint8_t* run) {
  return _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), in_register(run));
}

inline Fault check_tile(const Packed& m, uint64_t tile, uint32_t rows, uint32_t cols) {
  const uint64_t* words = m.bitmap + tile * kTile;
  __m512i count = _mm512_setzero_si512();
  __m512i outside = _mm512_setzero_si512();
  const __m512i beyond = _mm512_set1_epi64(static_cast<long long>(~low_bits(cols)));
  for (uint32_t row = 0; row < kTile; row += 8) {
    const __m512i eight = _mm512_loadu_si512(words + row);
    count = _mm512_add_epi64(count, _mm512_popcnt_epi64(eight));
    outside = _mm512_or_si512(outside, _mm512_and_si512(eight, beyond));
  }
  for (uint32_t row = rows; row < kTile; ++row) {
    outside = _mm512_or_si512(outside, _mm512_set1_epi64(static_cast<long long>(words[row])));
  }
  if (_mm512_test_epi64_mask(outside, outside) != 0) return Fault::kBitsOutside;
  return check_run(m, tile, static_cast<uint64_t>(_mm512_reduce_add_epi64(count)));
}

// A checked tile's run, of which one vector more than it has may be read: the loop over its rows
// loads whole vectors. Only the last tiles of the matrix have to be copied for that.
inline const uint8_t* readable_run(const Packed& m, uint64_t tile, RunCopy* copy) {
  const uint64_t begin = uint64_t{m.offsets[tile]} * kRunUnit;
  const uint64_t end = uint64_t{m.offsets[tile + 1]} * kRunUnit;
  if (end + kVector <= m.values_bytes) return m.values + begin;
  if (end != begin) memcpy(copy->bytes, m.values + begin, end - begin);
  return copy->bytes;
}

}  // namespace
}  // namespace avx512
}  // namespace tierd
