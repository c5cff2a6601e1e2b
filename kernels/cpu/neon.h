// What the NEON units share: records that may be read past their end, exponents decoded 16 at a
// time, and rows expanded by table. As with AVX2, a byte of the bitmap names the shuffle that brings
// the values of eight columns to their places, with zeros between.
#pragma once

#include <arm_neon.h>
#include <string.h>

#include "plain.h"

namespace tierd {
namespace neon {

Fault expand(const Packed&, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
             uint64_t* tile);

namespace {

using plain::check_tile;
using plain::quantised;

// Columns that one byte of a row's word decides on, and how many of these make a row.
constexpr uint32_t kPiece = 8;
constexpr uint32_t kPieces = kTile / kPiece;

// Bytes behind a record that may be read: eight values of four bytes, of which none is kept.
constexpr uint64_t kMargin = 32;

// Bytes of values ahead of the load. Taken from the AVX2 unit, not measured.
constexpr uint64_t kAhead = 4096;

// A record, or the items decoded from it, and what is read behind them and not used.
struct alignas(64) Readable {
  plain::Items decoded;
  uint8_t record[kLongestRecord + kMargin];
};
static_assert(offsetof(Readable, record) == sizeof(plain::Items), "items are read past their end");

// ---------------------------------------------------------------------------------------- tables

// For each byte of a bitmap, where each of eight columns finds its value: shuffles of values of one,
// two and four bytes. A number beyond the values writes zero.
struct alignas(64) Tables {
  uint8_t bytes[256][8];
  uint8_t words[256][16];
  uint8_t dwords[256][32];

  constexpr Tables() : bytes(), words(), dwords() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t value = 0;
      for (uint32_t i = 0; i < kPiece; ++i) {
        const bool kept = byte >> i & 1;
        bytes[byte][i] = static_cast<uint8_t>(kept ? value : 0x80);
        for (uint32_t part = 0; part < 2; ++part) {
          words[byte][2 * i + part] = static_cast<uint8_t>(kept ? 2 * value + part : 0x80);
        }
        for (uint32_t part = 0; part < 4; ++part) {
          dwords[byte][4 * i + part] = static_cast<uint8_t>(kept ? 4 * value + part : 0x80);
        }
        value += kept;
      }
    }
  }
};

constexpr Tables kTables;

inline uint16x8_t expand8x16(uint8_t kept, const uint8_t* run) {
  return vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(run), vld1q_u8(kTables.words[kept])));
}

inline uint32x4x2_t expand8x32(uint8_t kept, const uint8_t* run) {
  const uint8x16x2_t values = {{vld1q_u8(run), vld1q_u8(run + 16)}};
  const uint8_t* from = kTables.dwords[kept];
  return {{vreinterpretq_u32_u8(vqtbl2q_u8(values, vld1q_u8(from))),
           vreinterpretq_u32_u8(vqtbl2q_u8(values, vld1q_u8(from + 16)))}};
}

// What a row's values are: the bits of a dtype, or int8 before its scale.
enum class Values { kBF16, kF16, kF32, kInt8 };

template <Values values>
constexpr uint32_t kValueBytes = values == Values::kF32 ? 4 : values == Values::kInt8 ? 1 : 2;

inline float32x4x2_t widen_bf16(uint16x8_t bits) {
  return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
           vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(bits), 16))}};
}

inline float32x4x2_t widen_f16(uint16x8_t bits) {
  const float16x8_t halves = vreinterpretq_f16_u16(bits);
  return {{vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))}};
}

// Eight columns as floats.
template <Values values>
inline float32x4x2_t expand_floats(uint8_t kept, const uint8_t* run) {
  if constexpr (values == Values::kF32) {
    const uint32x4x2_t bits = expand8x32(kept, run);
    return {{vreinterpretq_f32_u32(bits.val[0]), vreinterpretq_f32_u32(bits.val[1])}};
  } else if constexpr (values == Values::kBF16) {
    return widen_bf16(expand8x16(kept, run));
  } else if constexpr (values == Values::kF16) {
    return widen_f16(expand8x16(kept, run));
  } else {
    const uint8x8_t bytes = vtbl1_u8(vld1_u8(run), vld1_u8(kTables.bytes[kept]));
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(bytes));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))),
             vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))}};
  }
}

inline uint8_t piece_of(uint64_t word, uint32_t piece) {
  return static_cast<uint8_t>(word >> (kPiece * piece));
}

// Hands the pieces of a row to `take(piece number, kept, run)`; returns the run behind them. The next
// row starts from the whole word's population: it does not wait for eight additions.
template <uint32_t value_bytes, typename Take>
inline const uint8_t* for_pieces(uint64_t word, const uint8_t* run, Take take) {
  const uint8_t* behind = run + value_bytes * static_cast<uint64_t>(__builtin_popcountll(word));
  __builtin_prefetch(run + kAhead);
  for (uint32_t i = 0; i < kPieces; ++i) {
    const uint8_t kept = piece_of(word, i);
    take(i, kept, run);
    run += value_bytes * static_cast<uint32_t>(__builtin_popcount(kept));
  }
  return behind;
}

// ----------------------------------------------------------------------------------------- tiles

// `count` 16-bit elements of a checked exponent-packed record, 16 at a time; what is written behind
// the last one is not used.
inline void decode_exponents16(const Packed& m, uint64_t tile, uint32_t count,
                               const uint8_t* record, uint16_t* to) {
  const Head head = head_of(m, tile);
  const uint8_t* codes = record + codes_at(m, count);
  const uint64_t plane_bytes = bit_plane_bytes(count);
  constexpr uint8_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t bit = vld1q_u8(kBits);
  for (uint32_t first = 0; first < count; first += 16) {
    uint8x16_t tops = vdupq_n_u8(static_cast<uint8_t>(head.base));
    for (uint32_t plane = 0; plane < head.planes; ++plane) {
      const uint8_t* eights = codes + plane * plane_bytes + first / 8;
      const uint8x16_t bits = vcombine_u8(vdup_n_u8(eights[0]), vdup_n_u8(eights[1]));
      const uint8x16_t set = vtstq_u8(bits, bit);
      tops = vaddq_u8(tops, vandq_u8(set, vdupq_n_u8(static_cast<uint8_t>(1u << plane))));
    }
    const uint8x16_t low = vld1q_u8(record + first);
    const uint8x16x2_t turned = vzipq_u8(low, tops);
    for (uint32_t half = 0; half < 2; ++half) {
      const uint16x8_t element = vreinterpretq_u16_u8(turned.val[half]);
      vst1q_u16(to + first + 8 * half, vsriq_n_u16(vshlq_n_u16(element, 15), element, 1));
    }
  }
  const uint8_t* escape = record + escapes_at(m, head, count);
  for (uint32_t i = 0; i < head.escapes; ++i, escape += kEscapeBytes) {
    uint16_t& element = to[escape_ordinal(escape)];
    const uint32_t low = plain::rotate_left(element) & 0xffu;
    element = plain::rotate_right(static_cast<uint16_t>(low | uint32_t{escape[2]} << 8));
  }
}

// The `count` items of a checked tile, one after the other, as plain::items_of gives them, of which
// kMargin bytes more may be read. Only records at the end of the values have to be copied for that.
inline const uint8_t* items_of(const Packed& m, uint64_t tile, uint32_t count, Readable* copy) {
  const uint64_t begin = uint64_t{m.offsets[tile]} * kRunUnit;
  const uint64_t end = uint64_t{m.offsets[tile + 1]} * kRunUnit;
  if (m.codec == Codec::kInt4 || (m.codec == Codec::kExponent && m.item_bytes != 2)) {
    return plain::items_of(m, tile, count, &copy->decoded);
  }
  const uint8_t* record = m.values + begin;
  if (end + kMargin > m.values_bytes) {
    if (end != begin) memcpy(copy->record, record, end - begin);
    record = copy->record;
  }
  if (m.codec != Codec::kExponent) return record;
  decode_exponents16(m, tile, count, record, reinterpret_cast<uint16_t*>(copy->decoded.bytes));
  return copy->decoded.bytes;
}

}  // namespace
}  // namespace neon
}  // namespace tierd
