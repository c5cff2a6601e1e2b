// Records to runs with AVX2: the kept elements of a tile, one after the other, in L1.
//
// Exponent-packed elements get their own bits back. Levels of the quantised codecs become bf16,
// which holds them all exactly, whatever the matrix's dtype; the scale is left to the row.
#pragma once

#include "avx2.h"

namespace tierd {
namespace avx2 {
namespace {

// A dense tile of 4-byte elements, and what is read behind it and not used.
struct alignas(kVector) Items {
  uint8_t bytes[kTile * kTile * 4 + kMargin];
};

// 32 top bytes: base plus the bits of the planes, which lie `stride` bytes apart. Byte i gets bit i
// of each plane's 32 where `spread` has it from byte i / 8; the order is that of `spread`.
template <uint32_t planes>
inline __m256i top_bytes(__m256i base, const uint8_t* codes, uint64_t stride, __m256i spread) {
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
  __m256i top = base;
  for (uint32_t plane = 0; plane < planes; ++plane) {
    int word;
    memcpy(&word, codes + plane * stride, sizeof word);
    const __m256i eight = _mm256_shuffle_epi8(_mm256_set1_epi32(word), spread);
    const __m256i bits = _mm256_and_si256(eight, bit);
    const __m256i worth = _mm256_set1_epi8(static_cast<char>(1u << plane));
    top = _mm256_add_epi8(top, _mm256_and_si256(_mm256_cmpeq_epi8(bits, bit), worth));
  }
  return top;
}

inline __m256i rotate_right16(__m256i turned) {
  return _mm256_or_si256(_mm256_srli_epi16(turned, 1), _mm256_slli_epi16(turned, 15));
}

inline __m256i rotate_right32(__m256i turned) {
  return _mm256_or_si256(_mm256_srli_epi32(turned, 1), _mm256_slli_epi32(turned, 31));
}

// 32 elements at a time. vpunpck works in lanes of 16 bytes: so the first lane gets the elements
// 0-7 and 16-23, the low bytes by a permutation, the top bytes as they are spread.
template <uint32_t planes>
void decode16(const Head& head, uint32_t count, const uint8_t* low, const uint8_t* codes,
              uint8_t* to) {
  const uint64_t stride = bit_plane_bytes(count);
  const __m256i base = _mm256_set1_epi8(static_cast<char>(head.base));
  const __m256i spread = _mm256_setr_epi64x(0, 0x0202020202020202, 0x0101010101010101,
                                            0x0303030303030303);
  for (uint32_t first = 0; first < count; first += 32, to += 2 * kVector) {
    prefetch(low + first + kAhead);
    const __m256i lows = _mm256_permute4x64_epi64(load32(low + first), 0xd8);
    const __m256i tops = top_bytes<planes>(base, codes + first / 8, stride, spread);
    store32(to, rotate_right16(_mm256_unpacklo_epi8(lows, tops)));
    store32(to + kVector, rotate_right16(_mm256_unpackhi_epi8(lows, tops)));
  }
}

template <uint32_t planes>
void decode32(const Head& head, uint32_t count, const uint8_t* low, const uint8_t* codes,
              uint8_t* to) {
  const uint64_t stride = bit_plane_bytes(count);
  const uint64_t bytes = byte_plane_bytes(count);
  const __m256i base = _mm256_set1_epi8(static_cast<char>(head.base));
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                            0x0303030303030303);
  const auto widened = [](const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  };
  for (uint32_t first = 0; first < count; first += 32) {
    alignas(kVector) uint8_t tops[kVector];
    store32(tops, top_bytes<planes>(base, codes + first / 8, stride, spread));
    for (uint32_t i = 0; i < 32; i += 8, to += kVector) {
      const uint8_t* from = low + first + i;
      __m256i turned = _mm256_slli_epi32(widened(tops + i), 24);
      turned = _mm256_or_si256(turned, widened(from));
      turned = _mm256_or_si256(turned, _mm256_slli_epi32(widened(from + bytes), 8));
      turned = _mm256_or_si256(turned, _mm256_slli_epi32(widened(from + 2 * bytes), 16));
      store32(to, rotate_right32(turned));
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

// 16 levels at a time.
inline void decode_int8(uint32_t count, const uint8_t* record, uint8_t* to) {
  const auto level = [](const uint8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
  };
  for (uint32_t first = 0; first < count; first += 16, record += 16, to += kVector) {
    prefetch(record + kAhead);
    const __m256i one = _mm256_srli_epi32(level(record), 16);
    const __m256i two = _mm256_srli_epi32(level(record + 8), 16);
    store32(to, _mm256_permute4x64_epi64(_mm256_packus_epi32(one, two), 0xd8));
  }
}

// The lower and the upper bytes of the 16 levels in bf16.
alignas(16) constexpr uint8_t kLevelsLower[16] = {0x00, 0x80, 0x00, 0x40, 0x80, 0xa0, 0xc0, 0xe0,
                                                  0x00, 0xe0, 0xc0, 0xa0, 0x80, 0x40, 0x00, 0x80};
alignas(16) constexpr uint8_t kLevelsUpper[16] = {0x00, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40,
                                                  0xc1, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xbf};

// 32 levels at a time, each the number of a byte in both tables.
inline void decode_int4(uint32_t count, const uint8_t* record, uint8_t* to) {
  const __m256i lower = _mm256_broadcastsi128_si256(load16(kLevelsLower));
  const __m256i upper = _mm256_broadcastsi128_si256(load16(kLevelsUpper));
  const __m256i nibble = _mm256_set1_epi16(0x0f0f);
  for (uint32_t first = 0; first < count; first += 32, record += 16, to += 2 * kVector) {
    prefetch(record + kAhead);
    // A byte's second nibble in the byte behind it; then the lanes as in `decode16`.
    const __m256i bytes = _mm256_cvtepu8_epi16(load16(record));
    const __m256i numbers = _mm256_permute4x64_epi64(
        _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), nibble), 0xd8);
    const __m256i low = _mm256_shuffle_epi8(lower, numbers);
    const __m256i high = _mm256_shuffle_epi8(upper, numbers);
    store32(to, _mm256_unpacklo_epi8(low, high));
    store32(to + kVector, _mm256_unpackhi_epi8(low, high));
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
      decode_int8(count, record, items->bytes);
      break;
    case Codec::kInt4:
      decode_int4(count, record, items->bytes);
      break;
  }
  return items->bytes;
}

}  // namespace
}  // namespace avx2
}  // namespace tierd
