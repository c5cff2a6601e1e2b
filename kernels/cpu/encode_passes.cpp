#include "encode_passes.h"

#include <string.h>

#include <algorithm>

namespace tierd {
namespace encode {
namespace {

const TileEncoder& tile_encoder(const Encoder& encoder, const Matrix& m) {
  return m.item_bytes == 2 ? encoder.two_bytes : encoder.four_bytes;
}

uint64_t record_bytes(uint32_t count, uint32_t item_bytes, uint32_t planes, uint32_t escapes) {
  return (item_bytes - 1) * byte_plane_bytes(count) + planes * bit_plane_bytes(count) +
         uint64_t{escapes} * kEscapeBytes;
}

struct Choice {
  uint32_t head;
  uint64_t bytes;  // of the record, before it is filled up to units
};

// The number of codes' bits and their base with the fewest bytes; equal ones: the fewest bits, then
// the lowest base. `tops[v]` of the `count` elements have the top byte v.
Choice choose(const uint16_t* tops, uint32_t count, uint32_t item_bytes) {
  if (count == 0) return {0, 0};
  int16_t below[kTopBytes + 1];  // signed: SSE2 has a maximum for these
  below[0] = 0;
  for (uint32_t top = 0; top < kTopBytes; ++top) {
    below[top + 1] = static_cast<int16_t>(below[top] + tops[top]);
  }
  uint64_t least = UINT64_MAX;
  uint32_t best_planes = 0;
  int16_t most_inside = 0;
  for (uint32_t planes = 0; planes <= kMostPlanes; ++planes) {
    const uint32_t width = 1u << planes;
    int16_t most = 0;
    for (uint32_t base = 0; base + width <= kTopBytes; ++base) {
      most = std::max(most, static_cast<int16_t>(below[base + width] - below[base]));
    }
    const uint32_t escapes = count - static_cast<uint32_t>(most);
    const uint64_t bytes = record_bytes(count, item_bytes, planes, escapes);
    if (bytes < least) {
      least = bytes;
      best_planes = planes;
      most_inside = most;
    }
  }
  uint32_t base = 0;
  while (below[base + (1u << best_planes)] - below[base] != most_inside) ++base;
  const uint32_t escapes = count - static_cast<uint32_t>(most_inside);
  return {base | best_planes << 8 | escapes << 16, least};
}

}  // namespace

Sizes measure(const Encoder& encoder, const Matrix& m) {
  const TileEncoder& on = tile_encoder(encoder, m);
  Sizes sizes{0, 0, 0};
  for_each_tile(m, [&](uint64_t, const Source& source) {
    uint64_t words[kTile];
    uint16_t tops[kTopBytes];
    on.bitmap(source, words);
    on.count_tops(source, tops);
    const uint32_t kept = set_bits(words);
    const uint32_t all = source.rows * source.cols;
    sizes.raw += units(uint64_t{kept} * m.item_bytes);
    sizes.dense_form += units(choose(tops, all, m.item_bytes).bytes);
    tops[0] = static_cast<uint16_t>(tops[0] - (all - kept));
    sizes.masked += units(choose(tops, kept, m.item_bytes).bytes);
    return true;
  });
  return sizes;
}

uint64_t raw_structure(const Encoder& encoder, const Matrix& m, uint64_t* bitmap,
                       uint32_t* offsets) {
  const TileEncoder& on = tile_encoder(encoder, m);
  uint64_t end = 0;
  offsets[0] = 0;
  for_each_tile(m, [&](uint64_t tile, const Source& source) {
    uint64_t* words = bitmap + tile * kTile;
    on.bitmap(source, words);
    end += units(uint64_t{set_bits(words)} * m.item_bytes);
    offsets[tile + 1] = static_cast<uint32_t>(end);
    return true;
  });
  return end;
}

uint64_t exponent_structure(const Encoder& encoder, const Matrix& m, uint64_t* bitmap,
                            uint32_t* offsets, uint32_t* heads) {
  const TileEncoder& on = tile_encoder(encoder, m);
  uint64_t end = 0;
  offsets[0] = 0;
  for_each_tile(m, [&](uint64_t tile, const Source& source) {
    uint16_t tops[kTopBytes];
    on.count_tops(source, tops);
    const uint32_t all = source.rows * source.cols;
    uint32_t kept = all;
    if (bitmap != nullptr) {
      uint64_t* words = bitmap + tile * kTile;
      on.bitmap(source, words);
      kept = set_bits(words);
      tops[0] = static_cast<uint16_t>(tops[0] - (all - kept));
    }
    const Choice choice = choose(tops, kept, m.item_bytes);
    heads[tile] = choice.head;
    end += units(choice.bytes);
    offsets[tile + 1] = static_cast<uint32_t>(end);
    return true;
  });
  return end;
}

uint64_t raw_values(const Encoder& encoder, const Matrix& m, const uint64_t* bitmap,
                    const uint32_t* offsets, uint8_t* values) {
  const TileEncoder& on = tile_encoder(encoder, m);
  alignas(64) uint8_t packed[kPackedBytes];
  uint64_t wrong = kNoTile;
  uint64_t end = 0;
  for_each_tile(m, [&](uint64_t tile, const Source& source) {
    const uint64_t* words = bitmap + tile * kTile;
    const uint64_t bytes = uint64_t{set_bits(words)} * m.item_bytes;
    const uint64_t begin = end;
    end += units(bytes);
    if (offsets[tile + 1] != end) {
      wrong = tile;
      return false;
    }
    on.pack(source, words, packed);
    memset(packed + bytes, 0, kRunUnit);
    memcpy(values + begin * kRunUnit, packed, (end - begin) * kRunUnit);
    return true;
  });
  return wrong;
}

uint64_t exponent_values(const Encoder& encoder, const Matrix& m, const uint64_t* bitmap,
                         const uint32_t* offsets, const uint32_t* heads, uint8_t* values) {
  const TileEncoder& on = tile_encoder(encoder, m);
  alignas(64) uint8_t packed[kPackedBytes];
  alignas(64) uint8_t record[kRecordBytes];
  uint64_t wrong = kNoTile;
  uint64_t end = 0;
  for_each_tile(m, [&](uint64_t tile, const Source& source) {
    uint64_t filled[kTile];
    const uint64_t* words = filled;
    if (bitmap != nullptr) {
      words = bitmap + tile * kTile;
    } else {
      fill_words(source, filled);
    }
    const uint32_t count = set_bits(words);
    const uint32_t base = heads[tile] & 0xff;
    const uint32_t planes = heads[tile] >> 8 & 0xff;
    const uint32_t escapes = heads[tile] >> 16;
    const uint64_t bytes = record_bytes(count, m.item_bytes, planes, escapes);
    const uint64_t begin = end;
    end += units(bytes);
    if (planes > kMostPlanes || offsets[tile + 1] != end) {
      wrong = tile;
      return false;
    }
    if (count == 0) return true;
    on.pack(source, words, packed);
    if (on.write_record(packed, count, base, planes, record) != escapes) {
      wrong = tile;
      return false;
    }
    memset(record + bytes, 0, kRunUnit);
    memcpy(values + begin * kRunUnit, record, (end - begin) * kRunUnit);
    return true;
  });
  return wrong;
}

}  // namespace encode
}  // namespace tierd
