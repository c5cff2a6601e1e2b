// Bitmap decompression with AVX-512: one vpexpand for each vector of a row.
//
// Several tiles that lie side by side are expanded together, row by row: the output of one row is
// then half a KiB in one place. Tile by tile, 64 rows with a power-of-two stride fall into the same
// few sets of L1, and nearly every store misses.
#include "avx512.h"

namespace tierd {
namespace avx512 {
namespace {

constexpr uint32_t kTogether = 4;

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

// `count` whole tiles side by side.
template <uint32_t count, bool streaming, typename Row>
void expand_tiles(const uint64_t* words, const uint8_t* const* runs, typename Row::Element* out,
                  uint64_t stride, uint32_t rows) {
  const uint8_t* run[count];
  for (uint32_t i = 0; i < count; ++i) run[i] = runs[i];
  for (uint32_t row = 0; row < rows; ++row, out += stride) {
    for (uint32_t i = 0; i < count; ++i) {
      Row expanded;
      run[i] = expanded.load(words[i * kTile + row], run[i]);
      store<streaming>(expanded, out + i * kTile);
    }
  }
}

template <bool streaming, typename Row>
Fault expand_rows(const Packed& m, uint32_t tile_row, void* rows_out, uint64_t stride,
                  uint64_t* tile) {
  typename Row::Element* out = static_cast<typename Row::Element*>(rows_out);
  RunCopy copies[kTogether];
  const uint8_t* runs[kTogether];
  const uint32_t rows = rows_of(m, tile_row);
  for (uint32_t tile_col = 0; tile_col < m.tile_cols;) {
    const uint64_t first = uint64_t{tile_row} * m.tile_cols + tile_col;
    const uint64_t* words = m.bitmap + first * kTile;
    const uint32_t whole = m.cols / kTile - tile_col;
    const uint32_t count = whole >= kTogether ? kTogether : 1;
    for (uint32_t i = 0; i < count; ++i) {
      *tile = first + i;
      const Fault fault = check_tile(m, first + i, rows, cols_of(m, tile_col + i));
      if (fault != Fault::kNone) return fault;
      runs[i] = readable_run(m, first + i, &copies[i]);
    }
    typename Row::Element* to = out + uint64_t{tile_col} * kTile;
    if (count == kTogether) {
      expand_tiles<kTogether, streaming, Row>(words, runs, to, stride, rows);
    } else if (whole > 0) {
      expand_tiles<1, streaming, Row>(words, runs, to, stride, rows);
    } else {
      const uint64_t cols = low_bits(cols_of(m, tile_col));
      const uint8_t* run = runs[0];
      for (uint32_t row = 0; row < rows; ++row, to += stride) {
        Row expanded;
        run = expanded.load(words[row], run);
        expanded.store_some(to, cols);
      }
    }
    tile_col += count;
  }
  if constexpr (streaming) _mm_sfence();
  return Fault::kNone;
}

}  // namespace

Fault expand(const Packed& m, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
             uint64_t* tile) {
  if (m.codec != Codec::kRaw) return kPlain.expand(m, tile_row, out, stride, streaming, tile);
  if (m.item_bytes == 2) {
    return streaming ? expand_rows<true, Row16>(m, tile_row, out, stride, tile)
                     : expand_rows<false, Row16>(m, tile_row, out, stride, tile);
  }
  return streaming ? expand_rows<true, Row32>(m, tile_row, out, stride, tile)
                   : expand_rows<false, Row32>(m, tile_row, out, stride, tile);
}

}  // namespace avx512
}  // namespace tierd
