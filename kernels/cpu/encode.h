// The seam between the encoder's passes and the instruction-set units: plain data and function
// pointers. As kernels.h it is compiled with different flags in different units, and therefore holds
// declarations, constants and functions of internal linkage only.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

namespace tierd {
namespace encode {

constexpr uint32_t kTileElements = kTile * kTile;
constexpr uint32_t kTopBytes = 256;
constexpr uint32_t kMostPlanes = 8;
constexpr uint32_t kEscapeBytes = 4;

// Units write and read whole vectors of packed elements: this much behind what is asked for.
constexpr uint32_t kSlack = 64;
constexpr uint32_t kPackedBytes = kTileElements * 4 + kSlack;
// The longest exponent-packed record: 3 byte planes, 8 bit planes, every element escaped.
constexpr uint32_t kRecordBytes =
    3 * kTileElements + kMostPlanes * kTileElements / 8 + kEscapeBytes * kTileElements + kSlack;

// The elements of one tile that are inside the matrix; `stride` elements from row to row.
struct Source {
  const void* first;
  int64_t stride;
  uint32_t rows;  // 1 to 64, as `cols`
  uint32_t cols;
};

// What one instruction set does with a tile, for elements of 2 or of 4 bytes.
struct TileEncoder {
  // Writes the tile's 64 bitmap words: a bit is set where any bit of the element is.
  void (*bitmap)(const Source&, uint64_t* words);
  // Counts the top bytes of all elements, rotated left by one; zeros are counted.
  void (*count_tops)(const Source&, uint16_t* counts);
  // Writes the elements with a set bit in `words` one after the other to `packed`.
  void (*pack)(const Source&, const uint64_t* words, void* packed);
  // Writes the exponent-packed record of `count` packed elements (padded to 8 bytes, as its last
  // part is). Returns how many escapes it has, which the caller compares with the head's.
  uint32_t (*write_record)(const void* packed, uint32_t count, uint32_t base, uint32_t planes,
                           uint8_t* record);
};

// How many scales int4 tries for a group.
constexpr uint32_t kScaleCandidates = 8;

// What one instruction set does to quantise elements of one dtype. Rows are contiguous elements.
struct LevelEncoder {
  // Returns the bits of the largest magnitude of a row.
  uint32_t (*largest)(const void* row, uint64_t count);
  // Writes for each of the candidate scales the sum of squared distances to the int4 levels.
  void (*square_sums)(const void* row, uint64_t count, const float* scales, float* sums);
  // Writes the levels of a tile to the left upper part of int8[64][64]. scales: one for each row.
  void (*make_levels)(const Source&, const float* scales, float limit, int8_t* levels);
};

struct Encoder {
  const char* name;
  bool (*supported)();
  TileEncoder two_bytes;
  TileEncoder four_bytes;
  LevelEncoder levels[3];  // by Dtype
  // As in TileEncoder, of levels instead of elements.
  void (*level_bitmap)(const Source&, uint64_t* words);
  void (*pack_levels)(const Source&, const uint64_t* words, void* packed);
};

// In encode_plain.cpp, for every unit: vectors do not count faster, their scatters conflict.
void count_tops_16(const Source&, uint16_t* counts);
void count_tops_32(const Source&, uint16_t* counts);

// In encode_dispatch.cpp: no code of a unit runs before these said yes.
bool plain_supported();
bool avx512_supported();

extern const Encoder kPlain;
extern const Encoder kAvx512;

// Null-terminated, slowest first.
extern const Encoder* const kAllEncoders[];

namespace {

inline uint64_t byte_plane_bytes(uint32_t count) { return (count + 7) / 8 * 8; }
inline uint64_t bit_plane_bytes(uint32_t count) { return (count + 63) / 64 * 8; }

}  // namespace
}  // namespace encode
}  // namespace tierd
