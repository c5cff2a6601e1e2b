// The encoder in portable C++, for little-endian processors as all of tierd.
#include <string.h>

#include "encode.h"
#include "encode_levels.h"

namespace tierd {
namespace encode {
namespace {

template <typename Element>
const Element* row_of(const Source& s, uint32_t row) {
  return static_cast<const Element*>(s.first) + int64_t{row} * s.stride;
}

template <typename Element>
uint32_t rotated(Element bits) {
  return static_cast<Element>(bits << 1 | bits >> (8 * sizeof(Element) - 1));
}

// One bit of each of 8 bytes that are 0 or 1, byte 0 lowest. The product's top byte collects them.
uint64_t gather_bits(uint64_t bytes) { return bytes * 0x0102040810204080u >> 56; }

template <typename Element>
void bitmap(const Source& s, uint64_t* words) {
  for (uint32_t row = 0; row < s.rows; ++row) {
    const Element* elements = row_of<Element>(s, row);
    uint8_t set[kTile] = {};
    for (uint32_t col = 0; col < s.cols; ++col) set[col] = elements[col] != 0;
    uint64_t word = 0;
    for (uint32_t col = 0; col < kTile; col += 8) {
      uint64_t eight;
      memcpy(&eight, set + col, sizeof eight);
      word |= gather_bits(eight) << col;
    }
    words[row] = word;
  }
  for (uint32_t row = s.rows; row < kTile; ++row) words[row] = 0;
}

// Several tables, summed at the end: neighbours mostly have the same few top bytes, and an increment
// would wait for the one before it.
constexpr uint32_t kTables = 8;

template <typename Element>
void count_tops(const Source& s, uint16_t* counts) {
  constexpr uint32_t kShift = 8 * sizeof(Element) - 9;  // the top byte behind the sign
  uint16_t tables[kTables][kTopBytes] = {};
  for (uint32_t row = 0; row < s.rows; ++row) {
    const Element* elements = row_of<Element>(s, row);
    uint32_t col = 0;
    for (; col + kTables <= s.cols; col += kTables) {
      for (uint32_t i = 0; i < kTables; ++i) ++tables[i][elements[col + i] >> kShift & 0xff];
    }
    for (; col < s.cols; ++col) ++tables[0][elements[col] >> kShift & 0xff];
  }
  for (uint32_t top = 0; top < kTopBytes; ++top) {
    uint32_t sum = 0;
    for (const uint16_t* table : tables) sum += table[top];
    counts[top] = static_cast<uint16_t>(sum);
  }
}

template <typename Element>
void pack(const Source& s, const uint64_t* words, void* packed) {
  Element* to = static_cast<Element*>(packed);
  for (uint32_t row = 0; row < s.rows; ++row) {
    const Element* elements = row_of<Element>(s, row);
    const uint64_t word = words[row];
    for (uint32_t col = 0; col < s.cols; ++col) {
      // Without a branch: which elements are kept cannot be predicted.
      *to = elements[col];
      to += word >> col & 1;
    }
  }
}

template <typename Element>
uint32_t write_record(const void* packed, uint32_t count, uint32_t base, uint32_t planes,
                      uint8_t* record) {
  constexpr uint32_t kLowBytes = sizeof(Element) - 1;
  const Element* elements = static_cast<const Element*>(packed);
  const uint64_t byte_plane = byte_plane_bytes(count);
  const uint64_t bit_plane = bit_plane_bytes(count);
  uint8_t* const bits = record + kLowBytes * byte_plane;
  uint8_t* const escapes = bits + planes * bit_plane;
  memset(record, 0, static_cast<size_t>(escapes - record));

  uint32_t escaped = 0;
  for (uint32_t begin = 0; begin < count; begin += kTile) {
    const uint32_t end = count - begin < kTile ? count : begin + kTile;
    uint8_t codes[kTile] = {};
    uint32_t outside = 0;
    for (uint32_t i = begin; i < end; ++i) {
      const uint32_t u = rotated(elements[i]);
      for (uint32_t b = 0; b < kLowBytes; ++b) {
        record[b * byte_plane + i] = static_cast<uint8_t>(u >> (8 * b));
      }
      const uint32_t code = (u >> (8 * kLowBytes)) - base;
      codes[i - begin] = static_cast<uint8_t>(code >> planes == 0 ? code : 0);
      outside += code >> planes != 0;
    }
    for (uint32_t i = begin; outside != 0; ++i) {
      const uint32_t top = rotated(elements[i]) >> (8 * kLowBytes);
      if ((top - base) >> planes == 0) continue;
      const uint32_t escape = i | top << 16;
      memcpy(escapes + uint64_t{escaped} * kEscapeBytes, &escape, sizeof escape);
      ++escaped;
      --outside;
    }
    for (uint32_t plane = 0; plane < planes; ++plane) {
      uint64_t word = 0;
      for (uint32_t i = 0; i < kTile; i += 8) {
        uint64_t eight;
        memcpy(&eight, codes + i, sizeof eight);
        word |= gather_bits(eight >> plane & 0x0101010101010101u) << i;
      }
      memcpy(bits + plane * bit_plane + begin / 8, &word, sizeof word);
    }
  }
  return escaped;
}

}  // namespace

void count_tops_16(const Source& s, uint16_t* counts) { count_tops<uint16_t>(s, counts); }
void count_tops_32(const Source& s, uint16_t* counts) { count_tops<uint32_t>(s, counts); }

const Encoder kPlain = {
    "plain",
    plain_supported,
    {bitmap<uint16_t>, count_tops_16, pack<uint16_t>, write_record<uint16_t>},
    {bitmap<uint32_t>, count_tops_32, pack<uint32_t>, write_record<uint32_t>},
    {kLevels<BF16>, kLevels<F16>, kLevels<F32>},
    bitmap<uint8_t>,
    pack<uint8_t>,
};

}  // namespace encode
}  // namespace tierd
