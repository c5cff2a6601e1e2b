// What the AVX-512 units share: the check of a tile, and records that may be read past their end.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace tierd {
namespace avx512 {

Fault expand(const Packed&, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
             uint64_t* tile);
void prepare(const Packed&, const void* x, uint32_t tokens, float* prepared);
Fault linear(const Packed&, uint32_t tile_row, const float* prepared, uint32_t tokens, float* out,
             uint64_t stride, uint64_t* tile);

namespace {

constexpr uint64_t kVector = 64;

// One record, and one vector that is read and not used.
struct alignas(kVector) RunCopy {
  uint8_t bytes[kLongestRecord + kVector];
};

// A zero that the compiler does not know: vpexpand then merges into it. With zero-masking vpexpand
// waits for the old content of its destination all the same (Zen 5: one per cycle becomes one per
// 5 cycles), and whichever sum the register held before chains the rows together.
inline __m512i fresh_zero() {
  __m512i zero;
  asm("vpxord %0, %0, %0" : "=v"(zero));
  return zero;
}

inline __m512i expand32x16(uint32_t bits, const uint8_t* run) {
  return _mm512_mask_expand_epi16(fresh_zero(), bits, _mm512_loadu_si512(run));
}

inline __m512i expand16x32(uint32_t bits, const uint8_t* run) {
  return _mm512_mask_expand_epi32(fresh_zero(), static_cast<__mmask16>(bits),
                                  _mm512_loadu_si512(run));
}

// Bytes of values ahead of the load. Runs are consecutive, but the hardware's prefetcher stops at
// each 4 KiB page. Measured on Zen 5, one core, 4096 x 4096 in bf16 at 50 %: 512 B 32, 1.5 KiB 43,
// 4 KiB 48, 8 KiB 48 GB/s of dense bytes. Asking beyond the end of the values is harmless.
constexpr uint64_t kAhead = 8192;

// The same for bitmaps, of which a tile takes 512 bytes: with it two cores went from 55 to 65 GB/s.
constexpr uint64_t kBitmapAhead = 2048;

// Not to be kept: every byte is used once. Against _MM_HINT_T0 4 % faster with two cores.
template <uint32_t lines>
inline void prefetch(const uint8_t* at) {
  for (uint32_t line = 0; line < lines; ++line) {
    _mm_prefetch(reinterpret_cast<const char*>(at + line * kVector), _MM_HINT_NTA);
  }
}

inline bool quantised(const Packed& m) {
  return m.codec == Codec::kInt8 || m.codec == Codec::kInt4;
}

// The 64 words of tiles that store none. Where a tile of the dense form is asked for is no matter
// of its contents: only its width counts.
class DenseWords {
 public:
  DenseWords(const Packed& m, uint32_t rows) {
    if (m.bitmap != nullptr) return;
    fill(whole_, ~uint64_t{0}, rows);
    fill(last_, low_bits(cols_of(m, m.tile_cols - 1)), rows);
  }

  const uint64_t* of(const Packed& m, uint64_t tile, uint32_t tile_col) const {
    if (m.bitmap != nullptr) return m.bitmap + tile * kTile;
    return tile_col + 1 < m.tile_cols ? whole_ : last_;
  }

 private:
  static void fill(uint64_t* words, uint64_t word, uint32_t rows) {
    for (uint32_t row = 0; row < kTile; ++row) words[row] = row < rows ? word : 0;
  }

  uint64_t whole_[kTile];
  uint64_t last_[kTile];
};

// Everything is checked that could lead a kernel outside the arrays. `count`: kept elements.
inline Fault check_tile(const Packed& m, uint64_t tile, uint32_t rows, uint32_t cols,
                        uint32_t* count) {
  *count = rows * cols;
  if (m.bitmap != nullptr) {
    const uint64_t* words = m.bitmap + tile * kTile;
    __m512i bits = _mm512_setzero_si512();
    __m512i outside = _mm512_setzero_si512();
    const __m512i beyond = _mm512_set1_epi64(static_cast<long long>(~low_bits(cols)));
    for (uint32_t row = 0; row < kTile; row += 8) {
      const __m512i eight = _mm512_loadu_si512(words + row);
      prefetch<1>(reinterpret_cast<const uint8_t*>(words + row) + kBitmapAhead);
      bits = _mm512_add_epi64(bits, _mm512_popcnt_epi64(eight));
      outside = _mm512_or_si512(outside, _mm512_and_si512(eight, beyond));
    }
    for (uint32_t row = rows; row < kTile; ++row) {
      outside = _mm512_or_si512(outside, _mm512_set1_epi64(static_cast<long long>(words[row])));
    }
    if (_mm512_test_epi64_mask(outside, outside) != 0) return Fault::kBitsOutside;
    *count = static_cast<uint32_t>(_mm512_reduce_add_epi64(bits));
  }
  const Fault fault = check_run(m, tile, *count);
  if (fault != Fault::kNone || m.codec != Codec::kExponent) return fault;
  return check_escapes(m, tile, *count);
}

// A checked tile's record, of which one vector more than it has may be read. Only the last tiles of
// the matrix have to be copied for that.
inline const uint8_t* readable_record(const Packed& m, uint64_t tile, RunCopy* copy) {
  const uint64_t begin = uint64_t{m.offsets[tile]} * kRunUnit;
  const uint64_t end = uint64_t{m.offsets[tile + 1]} * kRunUnit;
  if (end + kVector <= m.values_bytes) return m.values + begin;
  if (end != begin) memcpy(copy->bytes, m.values + begin, end - begin);
  return copy->bytes;
}

}  // namespace
}  // namespace avx512
}  // namespace tierd
