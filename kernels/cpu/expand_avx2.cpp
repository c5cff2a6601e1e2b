// Bitmap decompression with AVX2: one table shuffle for each eight columns of a row.
//
// As in the AVX-512 unit, tiles side by side are expanded together, row by row, so that the
// stores of a row lie in one place. Two, not four: 330 ns a tile instead of 420 (Zen 5, in L2).
#include "decode_avx2.h"

namespace tierd {
namespace avx2 {
namespace {

constexpr uint32_t kTogether = 2;

// One row of a tile, in registers: the three ways to fill it. `load` returns the run behind it.
template <uint32_t bytes>
struct Row {
  __m256i part[kTile * bytes / kVector];
};

// Weights as they are stored.
struct Bits16 {
  using Element = uint16_t;
  static constexpr bool kScaled = false;

  template <bool full>
  static const uint8_t* load(uint64_t word, const uint8_t* run, __m256, Row<2>* row) {
    if constexpr (full) {
      for (__m256i& part : row->part) part = load32(run), run += kVector;
      return run;
    }
    const uint8_t* behind = run + 2 * kept_of(word);
    for (uint32_t i = 0; i < kPieces / 2; ++i) {
      const uint64_t one = piece_of(word, 2 * i);
      const uint64_t two = piece_of(word, 2 * i + 1);
      const __m128i left = expand8x16(one, run);
      run += 2 * kept_of(one);
      row->part[i] = _mm256_set_m128i(expand8x16(two, run), left);
      run += 2 * kept_of(two);
    }
    return behind;
  }
};

struct Bits32 {
  using Element = uint32_t;
  static constexpr bool kScaled = false;

  template <bool full>
  static const uint8_t* load(uint64_t word, const uint8_t* run, __m256, Row<4>* row) {
    return for_pieces<Dtype::kF32, full>(word, run, [row](uint32_t piece, __m256 weights) {
      row->part[piece] = _mm256_castps_si256(weights);
    });
  }
};

// Levels times a scale, which is exact, rounded once to the nearest, of two to the even one.
template <Dtype dtype>
struct Scaled {
  using Element = uint16_t;
  static constexpr bool kScaled = true;

  template <bool full>
  static const uint8_t* load(uint64_t word, const uint8_t* run, __m256 scale, Row<2>* row) {
    __m256 floats[kPieces];
    run = for_pieces<Dtype::kBF16, full>(word, run, [&](uint32_t piece, __m256 weights) {
      floats[piece] = _mm256_mul_ps(weights, scale);
    });
    for (uint32_t i = 0; i < kPieces / 2; ++i) {
      row->part[i] = rounded(floats[2 * i], floats[2 * i + 1]);
    }
    return run;
  }

 private:
  static __m256i rounded(__m256 one, __m256 two) {
    if constexpr (dtype == Dtype::kF16) {
      constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      return _mm256_set_m128i(_mm256_cvtps_ph(two, nearest), _mm256_cvtps_ph(one, nearest));
    } else {
      return _mm256_permute4x64_epi64(_mm256_packus_epi32(upper_half(one), upper_half(two)), 0xd8);
    }
  }

  // No NaN is rounded to an infinity: of an infinite or NaN scale the lower half is zero.
  static __m256i upper_half(__m256 weight) {
    const __m256i bits = _mm256_castps_si256(weight);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
  }
};

template <>
struct Scaled<Dtype::kF32> {
  using Element = uint32_t;
  static constexpr bool kScaled = true;

  template <bool full>
  static const uint8_t* load(uint64_t word, const uint8_t* run, __m256 scale, Row<4>* row) {
    return for_pieces<Dtype::kBF16, full>(word, run, [&](uint32_t piece, __m256 weights) {
      row->part[piece] = _mm256_castps_si256(_mm256_mul_ps(weights, scale));
    });
  }
};

// A tile that was checked and decoded.
struct Ready {
  const uint64_t* words;
  const uint8_t* run;
  const uint16_t* scales;
};

template <typename Values>
inline __m256 scale_of(const Ready& tile, uint32_t row) {
  if constexpr (!Values::kScaled) return _mm256_setzero_ps();
  const int bits = static_cast<int>(uint32_t{tile.scales[row]} << 16);
  return _mm256_castsi256_ps(_mm256_set1_epi32(bits));
}

// `count` whole tiles side by side. `full`: all of their elements are kept.
template <uint32_t count, bool full, bool streaming, typename Values>
void expand_tiles(const Ready* tiles, typename Values::Element* out, uint64_t stride,
                  uint32_t rows) {
  const uint8_t* run[count];
  for (uint32_t i = 0; i < count; ++i) run[i] = tiles[i].run;
  for (uint32_t row = 0; row < rows; ++row, out += stride) {
    for (uint32_t i = 0; i < count; ++i) {
      Row<sizeof *out> expanded;
      prefetch(run[i] + count * kAhead);
      run[i] = Values::template load<full>(tiles[i].words[row], run[i],
                                           scale_of<Values>(tiles[i], row), &expanded);
      __m256i* to = reinterpret_cast<__m256i*>(out + i * kTile);
      for (const __m256i& part : expanded.part) {
        streaming ? _mm256_stream_si256(to++, part) : _mm256_storeu_si256(to++, part);
      }
    }
  }
}

// A tile that the matrix's last column cuts short.
template <typename Values>
void expand_edge(const Ready& tile, typename Values::Element* out, uint64_t stride, uint32_t rows,
                 uint32_t cols) {
  const uint8_t* run = tile.run;
  for (uint32_t row = 0; row < rows; ++row, out += stride) {
    Row<sizeof *out> expanded;
    run = Values::template load<false>(tile.words[row], run, scale_of<Values>(tile, row),
                                       &expanded);
    memcpy(out, expanded.part, cols * sizeof *out);
  }
}

template <bool streaming, typename Values>
Fault expand_row(const Packed& m, uint32_t tile_row, typename Values::Element* out,
                 uint64_t stride, uint64_t* tile) {
  RunCopy copies[kTogether];
  Items items[kTogether];
  Ready ready[kTogether];
  const uint32_t rows = rows_of(m, tile_row);
  const DenseWords dense(m, rows);
  for (uint32_t tile_col = 0; tile_col < m.tile_cols;) {
    const uint32_t whole = m.cols / kTile - tile_col;
    const uint32_t together = whole >= kTogether ? kTogether : 1;
    bool full = true;
    for (uint32_t i = 0; i < together; ++i) {
      const uint32_t col = tile_col + i;
      const uint64_t number = uint64_t{tile_row} * m.tile_cols + col;
      *tile = number;
      uint32_t count;
      const Fault fault = check_tile(m, number, rows, cols_of(m, col), &count);
      if (fault != Fault::kNone) return fault;
      full = full && count == rows * kTile;
      ready[i].words = dense.of(m, number, col);
      ready[i].run = run_of(m, number, count, &copies[i], &items[i]);
      ready[i].scales = Values::kScaled ? scales_of(m, tile_row, col) : nullptr;
    }
    typename Values::Element* to = out + uint64_t{tile_col} * kTile;
    if (whole == 0) {
      expand_edge<Values>(ready[0], to, stride, rows, cols_of(m, tile_col));
    } else if (together == 1) {
      expand_tiles<1, false, streaming, Values>(ready, to, stride, rows);
    } else if (full) {
      expand_tiles<kTogether, true, streaming, Values>(ready, to, stride, rows);
    } else {
      expand_tiles<kTogether, false, streaming, Values>(ready, to, stride, rows);
    }
    tile_col += together;
  }
  if constexpr (streaming) _mm_sfence();
  return Fault::kNone;
}

template <typename Values>
Fault expand_as(const Packed& m, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
                uint64_t* tile) {
  auto* to = static_cast<typename Values::Element*>(out);
  return streaming ? expand_row<true, Values>(m, tile_row, to, stride, tile)
                   : expand_row<false, Values>(m, tile_row, to, stride, tile);
}

}  // namespace

Fault expand(const Packed& m, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
             uint64_t* tile) {
  if (!quantised(m)) {
    return m.item_bytes == 2 ? expand_as<Bits16>(m, tile_row, out, stride, streaming, tile)
                             : expand_as<Bits32>(m, tile_row, out, stride, streaming, tile);
  }
  switch (m.dtype) {
    case Dtype::kBF16:
      return expand_as<Scaled<Dtype::kBF16>>(m, tile_row, out, stride, streaming, tile);
    case Dtype::kF16:
      return expand_as<Scaled<Dtype::kF16>>(m, tile_row, out, stride, streaming, tile);
    default:
      return expand_as<Scaled<Dtype::kF32>>(m, tile_row, out, stride, streaming, tile);
  }
}

}  // namespace avx2
}  // namespace tierd
