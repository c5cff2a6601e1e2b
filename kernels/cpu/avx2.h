// What the AVX2 units share: the check of a tile, records that may be read past their end, and rows
// expanded by table. AVX2 has no vpexpand: eight columns at a time, a byte of the bitmap names the
// shuffle that brings their values to their places, with zeros between.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace tierd {
namespace avx2 {

Fault expand(const Packed&, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
             uint64_t* tile);

namespace {

constexpr uint64_t kVector = 32;

// Columns that one byte of a row's word decides on, and how many of these make a row.
constexpr uint32_t kPiece = 8;
constexpr uint32_t kPieces = kTile / kPiece;

// Bytes behind a record that may be read: the decoding loops take two vectors at a time.
constexpr uint64_t kMargin = 2 * kVector;

// Bytes of values ahead of the load. Runs are consecutive, but the hardware's prefetcher stops at
// each 4 KiB page.
constexpr uint64_t kAhead = 4096;

// One record, and what is read behind it and not used.
struct alignas(kVector) RunCopy {
  uint8_t bytes[kLongestRecord + kMargin];
};

inline void prefetch(const void* at) {
  _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0);
}

inline __m128i load16(const uint8_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

inline __m256i load32(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

inline void store32(uint8_t* to, __m256i vector) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), vector);
}

inline bool quantised(const Packed& m) {
  return m.codec == Codec::kInt8 || m.codec == Codec::kInt4;
}

// ---------------------------------------------------------------------------------------- tables

// For each byte of a bitmap, where each of eight columns finds its value. 16 bytes for a shuffle of
// 16-bit values; 32 for one that also widens bf16 to float; 8 for a permutation of 32-bit values.
// A shuffle writes zero for a number with its top bit set; a permutation takes it for a keep bit.
struct alignas(64) Tables {
  uint8_t widen[256][32];
  uint8_t words[256][16];
  uint8_t dwords[256][8];

  constexpr Tables() : widen(), words(), dwords() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t value = 0;
      for (uint32_t i = 0; i < kPiece; ++i) {
        const bool kept = byte >> i & 1;
        for (uint32_t half = 0; half < 2; ++half) {
          const uint8_t from = kept ? static_cast<uint8_t>(2 * value + half) : 0x80;
          widen[byte][4 * i + half] = 0x80;
          widen[byte][4 * i + 2 + half] = from;
          words[byte][2 * i + half] = from;
        }
        dwords[byte][i] = kept ? static_cast<uint8_t>(0x80 | value) : 0;
        value += kept;
      }
    }
  }
};

constexpr Tables kTables;

// Byte `piece` of a row's word, times 32: so it addresses a table without another shift, and its
// population is still that of the byte.
inline uint64_t piece_of(uint64_t word, uint32_t piece) {
  return (piece == 0 ? word << 5 : word >> (kPiece * piece - 5)) & 0x1fe0;
}

inline uint64_t kept_of(uint64_t piece) {
  return static_cast<uint64_t>(__builtin_popcountll(piece));
}

template <typename Row>
inline const uint8_t* entry(const Row* rows, uint64_t piece) {
  return reinterpret_cast<const uint8_t*>(rows) + piece / (32 / sizeof(Row));
}

// Eight columns of 16-bit values.
inline __m128i expand8x16(uint64_t piece, const uint8_t* run) {
  return _mm_shuffle_epi8(load16(run), load16(entry(kTables.words, piece)));
}

// Eight columns of 32-bit values.
inline __m256i expand8x32(uint64_t piece, const uint8_t* run) {
  const __m256i from = _mm256_cvtepi8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(entry(kTables.dwords, piece))));
  const __m256 values = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(load32(run), from));
  return _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_setzero_ps(), values, _mm256_castsi256_ps(from)));
}

// Eight columns of a run of `items`, as floats.
template <Dtype items>
inline __m256 expand_floats(uint64_t piece, const uint8_t* run) {
  if constexpr (items == Dtype::kF32) {
    return _mm256_castsi256_ps(expand8x32(piece, run));
  } else if constexpr (items == Dtype::kF16) {
    return _mm256_cvtph_ps(expand8x16(piece, run));
  } else {
    const __m256i both = _mm256_broadcastsi128_si256(load16(run));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, load32(entry(kTables.widen, piece))));
  }
}

// As `expand_floats` of a full piece.
template <Dtype items>
inline __m256 widen_floats(const uint8_t* run) {
  if constexpr (items == Dtype::kF32) {
    return _mm256_castsi256_ps(load32(run));
  } else if constexpr (items == Dtype::kF16) {
    return _mm256_cvtph_ps(load16(run));
  } else {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(run)), 16));
  }
}

template <Dtype items>
constexpr uint32_t kItemBytes = items == Dtype::kF32 ? 4 : 2;

// Hands the 64 weights of a row, eight at a time, to `take(piece number, floats)`, and returns the
// run behind them. `full`: no bit of the word is zero, and it is not looked at.
template <Dtype items, bool full, typename Take>
inline const uint8_t* for_pieces(uint64_t word, const uint8_t* run, Take take) {
  if constexpr (full) {
    for (uint32_t i = 0; i < kPieces; ++i) {
      take(i, widen_floats<items>(run + i * kPiece * kItemBytes<items>));
    }
    return run + kTile * kItemBytes<items>;
  } else {
    // The next row starts from the whole word's population: it does not wait for eight additions.
    const uint8_t* behind = run + kItemBytes<items> * kept_of(word);
    for (uint32_t i = 0; i < kPieces; ++i) {
      const uint64_t piece = piece_of(word, i);
      take(i, expand_floats<items>(piece, run));
      run += kItemBytes<items> * kept_of(piece);
    }
    return behind;
  }
}

// What a row takes that is full, or half full. Asking beyond the end of the values is harmless.
template <Dtype items, bool full>
inline void prefetch_row(const uint8_t* run) {
  constexpr uint64_t row_bytes = kTile * kItemBytes<items> / (full ? 1 : 2);
  for (uint64_t at = 0; at < row_bytes; at += 64) prefetch(run + kAhead + at);
}

// ----------------------------------------------------------------------------------------- tiles

// The 64 words of tiles that store none.
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
    uint64_t bits = 0, inside = 0, below = 0;
    for (uint32_t row = 0; row < kTile; ++row) {
      bits += static_cast<uint64_t>(__builtin_popcountll(words[row]));
      inside |= words[row];
    }
    for (uint32_t row = rows; row < kTile; ++row) below |= words[row];
    if ((inside & ~low_bits(cols)) != 0 || below != 0) return Fault::kBitsOutside;
    *count = static_cast<uint32_t>(bits);
  }
  const Fault fault = check_run(m, tile, *count);
  if (fault != Fault::kNone || m.codec != Codec::kExponent) return fault;
  return check_escapes(m, tile, *count);
}

// A checked tile's record, behind which kMargin bytes may be read. Only the last tiles of the
// matrix have to be copied for that.
inline const uint8_t* readable_record(const Packed& m, uint64_t tile, RunCopy* copy) {
  const uint64_t begin = uint64_t{m.offsets[tile]} * kRunUnit;
  const uint64_t end = uint64_t{m.offsets[tile + 1]} * kRunUnit;
  if (end + kMargin <= m.values_bytes) return m.values + begin;
  if (end != begin) memcpy(copy->bytes, m.values + begin, end - begin);
  return copy->bytes;
}

}  // namespace
}  // namespace avx2
}  // namespace tierd
