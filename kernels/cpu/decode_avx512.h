// Records to runs with AVX-512: the kept elements of a tile, one after the other, in L1.
//
// Whatever the codec, the loops over rows then see what `raw` stores: 16 or 32 bits for each kept
// element. Levels of the quantised codecs become elements of the matrix's dtype, which holds all of
// them exactly; the scale is left to the row. Decoding what is kept, before the zeros come between,
// costs half the instructions at 50 % zeros.
#pragma once

#include "avx512.h"

namespace tierd {
namespace avx512 {
namespace {

// A dense tile of 4-byte elements, and the vector behind it that is read and not used.
struct alignas(kVector) Items {
  uint8_t bytes[kTile * kTile * 4 + kVector];
};

// Prefetched behind the end of the record: all its parts are read from the first element on.
constexpr uint64_t kAheadOfRecord = 1536;

// 64 top bytes: the base and the code's bits, of which the words lie `stride` bytes apart.
template <uint32_t planes>
inline __m512i top_bytes(__m512i base, const uint8_t* codes, uint64_t stride) {
  __m512i top = base;
  for (uint32_t plane = 0; plane < planes; ++plane) {
    uint64_t bits;
    memcpy(&bits, codes + plane * stride, sizeof bits);
    const __m512i worth = _mm512_set1_epi8(static_cast<char>(1u << plane));
    top = _mm512_mask_add_epi8(top, _cvtu64_mask64(bits), top, worth);
  }
  return top;
}

// 64 elements at a time: two bytes that belong together meet in vpunpck, which works in lanes of 16
// bytes; so the lanes get their halves first.
template <uint32_t planes>
void decode16(const Head& head, uint32_t count, const uint8_t* low, const uint8_t* codes,
              uint8_t* to) {
  const uint64_t stride = bit_plane_bytes(count);
  const __m512i base = _mm512_set1_epi8(static_cast<char>(head.base));
  const __m512i halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const uint8_t* ahead = codes + planes * stride + kAheadOfRecord;
  for (uint32_t first = 0; first < count; first += 64, to += 2 * kVector) {
    prefetch<2>(ahead);
    ahead += 64 + 8 * planes;
    const __m512i lows = _mm512_permutexvar_epi64(halves, _mm512_loadu_si512(low + first));
    const __m512i tops =
        _mm512_permutexvar_epi64(halves, top_bytes<planes>(base, codes + first / 8, stride));
    const __m512i one = _mm512_unpacklo_epi8(lows, tops);
    const __m512i two = _mm512_unpackhi_epi8(lows, tops);
    _mm512_store_si512(to, _mm512_shrdi_epi16(one, one, 1));
    _mm512_store_si512(to + kVector, _mm512_shrdi_epi16(two, two, 1));
  }
}

template <uint32_t planes>
void decode32(const Head& head, uint32_t count, const uint8_t* low, const uint8_t* codes,
              uint8_t* to) {
  const uint64_t stride = bit_plane_bytes(count);
  const uint64_t bytes = byte_plane_bytes(count);
  const __m512i base = _mm512_set1_epi8(static_cast<char>(head.base));
  const uint8_t* ahead = codes + planes * stride + kAheadOfRecord;
  for (uint32_t first = 0; first < count; first += 64) {
    prefetch<4>(ahead);
    ahead += 3 * 64 + 8 * planes;
    alignas(kVector) uint8_t tops[kVector];
    _mm512_store_si512(tops, top_bytes<planes>(base, codes + first / 8, stride));
    for (uint32_t i = 0; i < 64; i += 16, to += kVector) {
      const auto widened = [](const uint8_t* from) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      };
      const uint8_t* from = low + first + i;
      __m512i turned = _mm512_slli_epi32(widened(tops + i), 24);
      turned = _mm512_or_si512(turned, widened(from));
      turned = _mm512_or_si512(turned, _mm512_slli_epi32(widened(from + bytes), 8));
      turned = _mm512_or_si512(turned, _mm512_slli_epi32(widened(from + 2 * bytes), 16));
      _mm512_store_si512(to, _mm512_ror_epi32(turned, 1));
    }
  }
}

inline void patch_escapes(const Packed& m, const Head& head, uint32_t count, const uint8_t* record,
                          uint8_t* items) {
  const uint8_t* escape = record + escapes_at(m, head, count);
  const uint64_t bytes = byte_plane_bytes(count);
  for (uint32_t i = 0; i < head.escapes; ++i, escape += kEscapeBytes) {
    const uint32_t ordinal = escape_ordinal(escape);
    if (m.item_bytes == 2) {
      const uint32_t turned = record[ordinal] | uint32_t{escape[2]} << 8;
      const uint16_t bits = static_cast<uint16_t>(turned >> 1 | turned << 15);
      memcpy(items + uint64_t{ordinal} * 2, &bits, sizeof bits);
    } else {
      const uint32_t turned = record[ordinal] | uint32_t{record[bytes + ordinal]} << 8 |
                              uint32_t{record[2 * bytes + ordinal]} << 16 |
                              uint32_t{escape[2]} << 24;
      const uint32_t bits = turned >> 1 | turned << 31;
      memcpy(items + uint64_t{ordinal} * 4, &bits, sizeof bits);
    }
  }
}

template <uint32_t planes>
inline void decode_planes(const Packed& m, const Head& head, uint32_t count, const uint8_t* record,
                          uint8_t* to) {
  if (m.item_bytes == 2) {
    decode16<planes>(head, count, record, record + codes_at(m, count), to);
  } else {
    decode32<planes>(head, count, record, record + codes_at(m, count), to);
  }
}

inline void decode_exponents(const Packed& m, uint64_t tile, uint32_t count, const uint8_t* record,
                             uint8_t* to) {
  const Head head = head_of(m, tile);
  switch (head.planes) {
    case 0: decode_planes<0>(m, head, count, record, to); break;
    case 1: decode_planes<1>(m, head, count, record, to); break;
    case 2: decode_planes<2>(m, head, count, record, to); break;
    case 3: decode_planes<3>(m, head, count, record, to); break;
    case 4: decode_planes<4>(m, head, count, record, to); break;
    case 5: decode_planes<5>(m, head, count, record, to); break;
    case 6: decode_planes<6>(m, head, count, record, to); break;
    case 7: decode_planes<7>(m, head, count, record, to); break;
    default: decode_planes<8>(m, head, count, record, to); break;
  }
  patch_escapes(m, head, count, record, to);
}

// The upper halves of 16 + 16 floats: bf16 where nothing is lost.
inline __m512i upper_halves(__m512 one, __m512 two) {
  const __m512i odd = _mm512_setr_epi32(
      0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015, 0x001b0019,
      0x001f001d, 0x00230021, 0x00270025, 0x002b0029, 0x002f002d, 0x00330031, 0x00370035,
      0x003b0039, 0x003f003d);
  return _mm512_permutex2var_epi16(_mm512_castps_si512(one), odd, _mm512_castps_si512(two));
}

inline void decode_int8(Dtype dtype, uint32_t count, const uint8_t* record, uint8_t* to) {
  for (uint32_t first = 0; first < count; first += 32, record += 32) {
    prefetch<1>(record + kAhead);
    const auto level = [record](uint32_t at) {
      const __m128i* from = reinterpret_cast<const __m128i*>(record + at);
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
    };
    const __m512 one = level(0);
    const __m512 two = level(16);
    if (dtype == Dtype::kBF16) {
      _mm512_store_si512(to, upper_halves(one, two));
      to += kVector;
    } else if (dtype == Dtype::kF16) {
      constexpr int exact = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(one, exact));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32), _mm512_cvtps_ph(two, exact));
      to += kVector;
    } else {
      _mm512_store_ps(to, one);
      _mm512_store_ps(to + kVector, two);
      to += 2 * kVector;
    }
  }
}

// The 16 levels in bf16, in half and in single precision.
alignas(kVector) constexpr uint16_t kLevelsBF16[16] = {
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
alignas(kVector) constexpr uint16_t kLevelsF16[16] = {
    0x0000, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700,
    0xc800, 0xc700, 0xc600, 0xc500, 0xc400, 0xc200, 0xc000, 0xbc00};
alignas(kVector) constexpr float kLevelsF32[16] = {0,  1,  2,  3,  4,  5,  6,  7,
                                                   -8, -7, -6, -5, -4, -3, -2, -1};

// A permutation takes the level's number from the low bits of each lane: a byte's second nibble
// only has to get into the next lane. Of 16-bit lanes it takes 5 bits, so the table is there twice.
inline void decode_int4(Dtype dtype, uint32_t count, const uint8_t* record, uint8_t* to) {
  if (dtype == Dtype::kF32) {
    const __m512i levels = _mm512_load_si512(kLevelsF32);
    for (uint32_t first = 0; first < count; first += 16, record += 8, to += kVector) {
      prefetch<1>(record + kAhead);
      const __m512i bytes = _mm512_cvtepu8_epi64(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(record)));
      const __m512i numbers = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
      _mm512_store_si512(to, _mm512_permutexvar_epi32(numbers, levels));
    }
    return;
  }
  const __m512i levels = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(
      dtype == Dtype::kBF16 ? kLevelsBF16 : kLevelsF16)));
  for (uint32_t first = 0; first < count; first += 32, record += 16, to += kVector) {
    prefetch<1>(record + kAhead);
    const __m512i bytes = _mm512_cvtepu8_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(record)));
    const __m512i numbers = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
    _mm512_store_si512(to, _mm512_permutexvar_epi16(numbers, levels));
  }
}

// The run of a checked tile of `count` elements; `items` has it where `values` has not.
inline const uint8_t* run_of(const Packed& m, uint64_t tile, uint32_t count, RunCopy* copy,
                             Items* items) {
  const uint8_t* record = readable_record(m, tile, copy);
  switch (m.codec) {
    case Codec::kRaw:
      return record;
    case Codec::kExponent:
      decode_exponents(m, tile, count, record, items->bytes);
      break;
    case Codec::kInt8:
      decode_int8(m.dtype, count, record, items->bytes);
      break;
    case Codec::kInt4:
      decode_int4(m.dtype, count, record, items->bytes);
      break;
  }
  return items->bytes;
}

}  // namespace
}  // namespace avx512
}  // namespace tierd
