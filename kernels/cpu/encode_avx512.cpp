// The encoder with AVX-512: compress for the kept elements, vector tests for bitmaps and bit planes.
#include <immintrin.h>

#include "encode.h"
#include "encode_levels.h"

namespace tierd {
namespace encode {
namespace {

template <typename Element>
const Element* row_of(const Source& s, uint32_t row) {
  return static_cast<const Element*>(s.first) + int64_t{row} * s.stride;
}

inline __mmask64 first64(uint32_t n) { return low_bits(n < 64 ? n : 64); }

// 64 bytes of a row or of packed elements: `kCount` of them.
struct Vector8 {
  using Element = uint8_t;
  static constexpr uint32_t kCount = 64;

  static __m512i load(const Element* from, uint32_t count) {
    return _mm512_maskz_loadu_epi8(first64(count), from);
  }
  static uint64_t set(__m512i bits) { return _mm512_test_epi8_mask(bits, bits); }
  static __m512i compress(uint64_t mask, __m512i bits) {
    return _mm512_maskz_compress_epi8(mask, bits);
  }
};

struct Vector16 {
  using Element = uint16_t;
  static constexpr uint32_t kCount = 32;

  static __m512i load(const Element* from, uint32_t count) {
    return count >= kCount ? _mm512_loadu_si512(from)
                           : _mm512_maskz_loadu_epi16(static_cast<__mmask32>(first64(count)), from);
  }
  static uint64_t set(__m512i bits) { return _mm512_test_epi16_mask(bits, bits); }
  static __m512i compress(uint64_t mask, __m512i bits) {
    return _mm512_maskz_compress_epi16(static_cast<__mmask32>(mask), bits);
  }
};

struct Vector32 {
  using Element = uint32_t;
  static constexpr uint32_t kCount = 16;

  static __m512i load(const Element* from, uint32_t count) {
    return count >= kCount ? _mm512_loadu_si512(from)
                           : _mm512_maskz_loadu_epi32(static_cast<__mmask16>(first64(count)), from);
  }
  static uint64_t set(__m512i bits) { return _mm512_test_epi32_mask(bits, bits); }
  static __m512i compress(uint64_t mask, __m512i bits) {
    return _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), bits);
  }
};

template <typename Vector>
void bitmap(const Source& s, uint64_t* words) {
  for (uint32_t row = 0; row < s.rows; ++row) {
    const auto* elements = row_of<typename Vector::Element>(s, row);
    uint64_t word = 0;
    for (uint32_t col = 0; col < s.cols; col += Vector::kCount) {
      word |= Vector::set(Vector::load(elements + col, s.cols - col)) << col;
    }
    words[row] = word;
  }
  for (uint32_t row = s.rows; row < kTile; ++row) words[row] = 0;
}

template <typename Vector>
void pack(const Source& s, const uint64_t* words, void* packed) {
  const uint64_t all = low_bits(Vector::kCount);
  auto* to = static_cast<typename Vector::Element*>(packed);
  for (uint32_t row = 0; row < s.rows; ++row) {
    const auto* elements = row_of<typename Vector::Element>(s, row);
    for (uint32_t col = 0; col < s.cols; col += Vector::kCount) {
      const uint64_t mask = words[row] >> col & all;
      // To a register and then all of it to memory: compressing into memory is microcode on Zen.
      const __m512i kept = Vector::compress(mask, Vector::load(elements + col, s.cols - col));
      _mm512_storeu_si512(to, kept);
      to += __builtin_popcountll(mask);
    }
  }
}

// 64 packed elements rotated left, in byte planes.
template <typename Element>
struct Bytes;

template <>
struct Bytes<uint16_t> {
  __m512i low[1];
  __m512i top;

  Bytes(const uint16_t* packed, uint32_t count) {
    __m256i low_half[2], top_half[2];
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t left = count > 32 * i ? count - 32 * i : 0;
      const __m512i bits = Vector16::load(packed + 32 * i, left);
      const __m512i u = _mm512_shldi_epi16(bits, bits, 1);
      low_half[i] = _mm512_cvtepi16_epi8(u);
      top_half[i] = _mm512_cvtepi16_epi8(_mm512_srli_epi16(u, 8));
    }
    low[0] = _mm512_inserti64x4(_mm512_castsi256_si512(low_half[0]), low_half[1], 1);
    top = _mm512_inserti64x4(_mm512_castsi256_si512(top_half[0]), top_half[1], 1);
  }
};

template <>
struct Bytes<uint32_t> {
  __m512i low[3];
  __m512i top;

  Bytes(const uint32_t* packed, uint32_t count) {
    alignas(64) uint8_t bytes[4][64];
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t left = count > 16 * i ? count - 16 * i : 0;
      __m512i u = _mm512_rol_epi32(Vector32::load(packed + 16 * i, left), 1);
      for (uint32_t b = 0; b < 4; ++b, u = _mm512_srli_epi32(u, 8)) {
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes[b] + 16 * i), _mm512_cvtepi32_epi8(u));
      }
    }
    for (uint32_t b = 0; b < 3; ++b) low[b] = _mm512_load_si512(bytes[b]);
    top = _mm512_load_si512(bytes[3]);
  }
};

template <typename Element>
uint32_t write_record(const void* packed, uint32_t count, uint32_t base, uint32_t planes,
                      uint8_t* record) {
  constexpr uint32_t kLowBytes = sizeof(Element) - 1;
  const Element* elements = static_cast<const Element*>(packed);
  const uint64_t byte_plane = byte_plane_bytes(count);
  const uint64_t bit_plane = bit_plane_bytes(count);
  uint8_t* const bits = record + kLowBytes * byte_plane;
  uint8_t* const escapes = bits + planes * bit_plane;
  const __m512i bases = _mm512_set1_epi8(static_cast<char>(base));
  const __m512i most = _mm512_set1_epi8(static_cast<char>((1u << planes) - 1));

  uint32_t escaped = 0;
  for (uint32_t begin = 0; begin < count; begin += kTile) {
    const uint32_t left = count - begin;
    const Bytes<Element> bytes(elements + begin, left);
    // The padding of a plane is zero as the vectors are behind the last element; and it is all that
    // may be written: what follows is the next plane.
    const __mmask64 stored = first64((left + 7) & ~7u);
    for (uint32_t b = 0; b < kLowBytes; ++b) {
      _mm512_mask_storeu_epi8(record + b * byte_plane + begin, stored, bytes.low[b]);
    }
    const __m512i distance = _mm512_sub_epi8(bytes.top, bases);
    const __mmask64 inside = _mm512_cmple_epu8_mask(distance, most) & first64(left);
    for (uint32_t plane = 0; plane < planes; ++plane) {
      const uint64_t word = _mm512_mask_test_epi8_mask(
          inside, distance, _mm512_set1_epi8(static_cast<char>(1u << plane)));
      __builtin_memcpy(bits + plane * bit_plane + begin / 8, &word, sizeof word);
    }
    for (uint64_t outside = ~inside & first64(left); outside != 0; outside &= outside - 1) {
      const uint32_t i = begin + static_cast<uint32_t>(__builtin_ctzll(outside));
      const uint32_t top = elements[i] >> (8 * sizeof(Element) - 9) & 0xff;
      const uint32_t escape = i | top << 16;
      __builtin_memcpy(escapes + uint64_t{escaped} * kEscapeBytes, &escape, sizeof escape);
      ++escaped;
    }
  }
  return escaped;
}

}  // namespace

const Encoder kAvx512 = {
    "avx512",
    avx512_supported,
    {bitmap<Vector16>, count_tops_16, pack<Vector16>, write_record<uint16_t>},
    {bitmap<Vector32>, count_tops_32, pack<Vector32>, write_record<uint32_t>},
    {kLevels<BF16>, kLevels<F16>, kLevels<F32>},
    bitmap<Vector8>,
    pack<Vector8>,
};

}  // namespace encode
}  // namespace tierd
