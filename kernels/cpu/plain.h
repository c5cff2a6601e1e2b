// What the two plain units share: the check of a tile, and its kept elements in their order.
#pragma once

#include <string.h>

#include "kernels.h"

namespace tierd {
namespace plain {

Fault expand(const Packed&, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
             uint64_t* tile);

namespace {

// Everything is checked that could lead a kernel outside the arrays. `count`: kept elements.
inline Fault check_tile(const Packed& m, uint64_t tile, uint32_t rows, uint32_t cols,
                        uint32_t* count) {
  *count = rows * cols;
  if (m.bitmap != nullptr) {
    const uint64_t* words = m.bitmap + tile * kTile;
    uint64_t outside = 0;
    const uint64_t beyond = ~low_bits(cols);
    *count = 0;
    for (uint32_t row = 0; row < kTile; ++row) {
      *count += static_cast<uint32_t>(__builtin_popcountll(words[row]));
      outside |= row < rows ? words[row] & beyond : words[row];
    }
    if (outside != 0) return Fault::kBitsOutside;
  }
  const Fault fault = check_run(m, tile, *count);
  if (fault != Fault::kNone || m.codec != Codec::kExponent) return fault;
  return check_escapes(m, tile, *count);
}

// A tile's items where they are not stored one after the other.
struct alignas(64) Items {
  uint8_t bytes[kTile * kTile * 4];
};

template <typename Element>
inline Element rotate_right(Element turned) {
  return static_cast<Element>(turned >> 1 | turned << (8 * sizeof(Element) - 1));
}

template <typename Element>
inline Element rotate_left(Element bits) {
  return static_cast<Element>(bits << 1 | bits >> (8 * sizeof(Element) - 1));
}

// Bit i of 8 as the lowest bit of byte i.
inline uint64_t bytes_of_bits(uint8_t bits) {
  const uint64_t each = bits * (~uint64_t{0} / 255) & 0x8040201008040201u;
  return (each + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}

template <typename Element>
inline void decode_exponents(const Packed& m, uint64_t tile, uint32_t count, const uint8_t* record,
                             Element* to) {
  constexpr uint32_t low_bytes = sizeof(Element) - 1;
  const Head head = head_of(m, tile);
  const uint8_t* codes = record + codes_at(m, count);
  for (uint32_t first = 0; first < count; first += 64) {
    const uint32_t some = count - first < 64 ? count - first : 64;
    uint64_t eights[8];
    for (uint64_t& eight : eights) eight = head.base * (~uint64_t{0} / 255);
    for (uint32_t plane = 0; plane < head.planes; ++plane) {
      uint8_t bits[8];
      memcpy(bits, codes + plane * bit_plane_bytes(count) + first / 8, sizeof bits);
      // No byte carries into the next: the base and the largest code make 255 at most.
      for (uint32_t i = 0; i < 8; ++i) eights[i] += bytes_of_bits(bits[i]) << plane;
    }
    uint8_t tops[64];
    memcpy(tops, eights, sizeof tops);
    for (uint32_t i = 0; i < some; ++i) {
      uint32_t turned = uint32_t{tops[i]} << (8 * low_bytes);
      for (uint32_t byte = 0; byte < low_bytes; ++byte) {
        turned |= uint32_t{record[byte * byte_plane_bytes(count) + first + i]} << (8 * byte);
      }
      to[first + i] = rotate_right(static_cast<Element>(turned));
    }
  }
  const uint8_t* escape = record + escapes_at(m, head, count);
  for (uint32_t i = 0; i < head.escapes; ++i, escape += kEscapeBytes) {
    constexpr Element low = static_cast<Element>((uint64_t{1} << (8 * low_bytes)) - 1);
    Element& element = to[escape_ordinal(escape)];
    element = rotate_right(static_cast<Element>((rotate_left(element) & low) |
                                                uint32_t{escape[2]} << (8 * low_bytes)));
  }
}

inline bool quantised(const Packed& m) {
  return m.codec == Codec::kInt8 || m.codec == Codec::kInt4;
}

// The `count` items of a checked tile, one after the other: the bits of elements, or int8 for the
// quantised codecs. They lie in `values` or in `items`.
inline const uint8_t* items_of(const Packed& m, uint64_t tile, uint32_t count, Items* items) {
  const uint8_t* record = m.values + uint64_t{m.offsets[tile]} * kRunUnit;
  if (m.codec == Codec::kRaw || m.codec == Codec::kInt8) return record;
  if (m.codec == Codec::kInt4) {
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t nibble = record[i / 2] >> (i % 2 * 4) & 0xfu;
      items->bytes[i] = static_cast<uint8_t>(nibble ^ 8u) - 8u;
    }
  } else if (m.item_bytes == 2) {
    decode_exponents(m, tile, count, record, reinterpret_cast<uint16_t*>(items->bytes));
  } else {
    decode_exponents(m, tile, count, record, reinterpret_cast<uint32_t*>(items->bytes));
  }
  return items->bytes;
}

}  // namespace
}  // namespace plain
}  // namespace tierd
