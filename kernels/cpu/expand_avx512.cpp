// Bitmap decompression with AVX-512: one vpexpand for each vector of a row.
//
// Several tiles that lie side by side are expanded together, row by row: the output of one row is
// then half a KiB in one place. Tile by tile, 64 rows with a power-of-two stride fall into the same
// few sets of L1, and nearly every store misses.
#include "decode_avx512.h"

namespace tierd {
namespace avx512 {
namespace {

constexpr uint32_t kTogether = 4;

// Bytes of values ahead of the load: what the tiles side by side take, so that the next ones are
// there when their turn comes. Without, `raw` ran at 19 GB/s of dense bytes instead of 23 on one
// core, at 33 instead of 40 on two (4096 x 4096 in bf16 at 50 %, Zen 5).
constexpr uint64_t kRowAhead = 4608 * kTogether;

struct Row16 {
  using Element = uint16_t;
  __m512i part[2];

  // Returns the run behind the row's values.
  const uint8_t* load(uint64_t word, const uint8_t* run) {
    const uint32_t low = static_cast<uint32_t>(word);
    part[0] = expand32x16(low, run);
    part[1] = expand32x16(static_cast<uint32_t>(word >> 32), run + 2 * __builtin_popcount(low));
    return run + 2 * __builtin_popcountll(word);
  }

  void store_some(uint16_t* to, uint64_t cols) const {
    _mm512_mask_storeu_epi16(to, static_cast<__mmask32>(cols), part[0]);
    _mm512_mask_storeu_epi16(to + 32, static_cast<__mmask32>(cols >> 32), part[1]);
  }
};

struct Row32 {
  using Element = uint32_t;
  __m512i part[4];

  const uint8_t* load(uint64_t word, const uint8_t* run) {
    for (int i = 0; i < 4; ++i, word >>= 16) {
      part[i] = expand16x32(word & 0xffff, run);
      run += 4 * __builtin_popcount(word & 0xffff);
    }
    return run;
  }

  void store_some(uint32_t* to, uint64_t cols) const {
    for (int i = 0; i < 4; ++i) {
      _mm512_mask_storeu_epi32(to + 16 * i, static_cast<__mmask16>(cols >> (16 * i)), part[i]);
    }
  }
};

// Weights as they are stored.
struct Plain {
  static constexpr bool kScaled = false;
  template <typename Row>
  static void scale(Row&, __m512) {}
};

// Levels times a scale, which is exact, rounded once to the nearest, of two to the even one.
struct ScaledBF16 {
  static constexpr bool kScaled = true;
  static void scale(Row16& row, __m512 by) {
    const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (__m512i& part : row.part) {
      const __m512i even = rounded(_mm512_slli_epi32(part, 16), by);
      const __m512i odd = rounded(_mm512_and_si512(part, top), by);
      // odd's upper halves over even's, moved down: (odd & top) | (even >> 16)
      part = _mm512_ternarylogic_epi32(top, odd, _mm512_srli_epi32(even, 16), 0xca);
    }
  }

 private:
  // Never a NaN: both factors are finite.
  static __m512i rounded(__m512i level, __m512 by) {
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(level), by));
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  }
};

struct ScaledF16 {
  static constexpr bool kScaled = true;
  static void scale(Row16& row, __m512 by) {
    for (__m512i& part : row.part) {
      const __m256i low = half(_mm512_castsi512_si256(part), by);
      const __m256i high = half(_mm512_extracti64x4_epi64(part, 1), by);
      part = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
  }

 private:
  static __m256i half(__m256i levels, __m512 by) {
    return _mm512_cvtps_ph(_mm512_mul_ps(_mm512_cvtph_ps(levels), by),
                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

struct ScaledF32 {
  static constexpr bool kScaled = true;
  static void scale(Row32& row, __m512 by) {
    for (__m512i& part : row.part) {
      part = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(part), by));
    }
  }
};

inline __m512 scale_of(const uint16_t* scales, uint32_t row) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(uint32_t{scales[row]} << 16)));
}

template <bool streaming, typename Row>
inline void store(const Row& row, typename Row::Element* to) {
  __m512i* at = reinterpret_cast<__m512i*>(to);
  for (const __m512i& part : row.part) {
    if constexpr (streaming) {
      _mm512_stream_si512(at++, part);
    } else {
      _mm512_storeu_si512(at++, part);
    }
  }
}

// A tile that was checked and decoded.
struct Ready {
  const uint64_t* words;
  const uint8_t* run;
  const uint16_t* scales;
};

// `count` whole tiles side by side.
template <uint32_t count, bool streaming, typename Row, typename Values>
void expand_tiles(const Ready* tiles, typename Row::Element* out, uint64_t stride, uint32_t rows) {
  const uint8_t* run[count];
  for (uint32_t i = 0; i < count; ++i) run[i] = tiles[i].run;
  for (uint32_t row = 0; row < rows; ++row, out += stride) {
    for (uint32_t i = 0; i < count; ++i) {
      Row expanded;
      prefetch<1>(run[i] + kRowAhead);
      run[i] = expanded.load(tiles[i].words[row], run[i]);
      if constexpr (Values::kScaled) Values::scale(expanded, scale_of(tiles[i].scales, row));
      store<streaming>(expanded, out + i * kTile);
    }
  }
}

template <bool streaming, typename Row, typename Values>
Fault expand_row(const Packed& m, uint32_t tile_row, typename Row::Element* out, uint64_t stride,
                 uint64_t* tile) {
  RunCopy copies[kTogether];
  Items items[kTogether];
  Ready ready[kTogether];
  const uint32_t rows = rows_of(m, tile_row);
  const DenseWords dense(m, rows);
  for (uint32_t tile_col = 0; tile_col < m.tile_cols;) {
    const uint32_t whole = m.cols / kTile - tile_col;
    const uint32_t together = whole >= kTogether ? kTogether : 1;
    for (uint32_t i = 0; i < together; ++i) {
      const uint32_t col = tile_col + i;
      const uint64_t number = uint64_t{tile_row} * m.tile_cols + col;
      *tile = number;
      uint32_t count;
      const Fault fault = check_tile(m, number, rows, cols_of(m, col), &count);
      if (fault != Fault::kNone) return fault;
      ready[i].words = dense.of(m, number, col);
      ready[i].run = run_of(m, number, count, &copies[i], &items[i]);
      ready[i].scales = Values::kScaled ? scales_of(m, tile_row, col) : nullptr;
    }
    typename Row::Element* to = out + uint64_t{tile_col} * kTile;
    if (together == kTogether) {
      expand_tiles<kTogether, streaming, Row, Values>(ready, to, stride, rows);
    } else if (whole > 0) {
      expand_tiles<1, streaming, Row, Values>(ready, to, stride, rows);
    } else {
      const uint64_t cols = low_bits(cols_of(m, tile_col));
      const uint8_t* run = ready[0].run;
      for (uint32_t row = 0; row < rows; ++row, to += stride) {
        Row expanded;
        run = expanded.load(ready[0].words[row], run);
        if constexpr (Values::kScaled) Values::scale(expanded, scale_of(ready[0].scales, row));
        expanded.store_some(to, cols);
      }
    }
    tile_col += together;
  }
  if constexpr (streaming) _mm_sfence();
  return Fault::kNone;
}

template <typename Row, typename Values>
Fault expand_as(const Packed& m, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
                uint64_t* tile) {
  auto* to = static_cast<typename Row::Element*>(out);
  return streaming ? expand_row<true, Row, Values>(m, tile_row, to, stride, tile)
                   : expand_row<false, Row, Values>(m, tile_row, to, stride, tile);
}

}  // namespace

Fault expand(const Packed& m, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
             uint64_t* tile) {
  if (!quantised(m)) {
    return m.item_bytes == 2 ? expand_as<Row16, Plain>(m, tile_row, out, stride, streaming, tile)
                             : expand_as<Row32, Plain>(m, tile_row, out, stride, streaming, tile);
  }
  switch (m.dtype) {
    case Dtype::kBF16:
      return expand_as<Row16, ScaledBF16>(m, tile_row, out, stride, streaming, tile);
    case Dtype::kF16:
      return expand_as<Row16, ScaledF16>(m, tile_row, out, stride, streaming, tile);
    default:
      return expand_as<Row32, ScaledF32>(m, tile_row, out, stride, streaming, tile);
  }
}

}  // namespace avx512
}  // namespace tierd
