// The seam between the bindings and the instruction-set units: plain data and function pointers.
//
// This header is compiled with different instruction-set flags in different units. It therefore
// holds declarations, constants and functions of internal linkage only, and includes no C++ library
// header: an inline function compiled with AVX-512 could be the copy that the linker keeps.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tierd {

// A tile is 64 rows of one 64-bit word each; runs of values start on 16 bytes (layouts/FORMAT.md).
constexpr uint32_t kTile = 64;
constexpr uint32_t kRunUnit = 16;
static_assert(kTile == 8 * sizeof(uint64_t), "one bitmap word is one row of a tile");

// Tokens that one call of a linear kernel takes, unless its record says otherwise. A longer batch is
// cut into blocks of this size, and the matrix is expanded for each of them.
constexpr uint32_t kTokenBlock = 8;

enum class Dtype : int { kBF16 = 0, kF16 = 1, kF32 = 2 };
enum class Codec : int { kRaw = 0, kExponent = 1, kInt8 = 2, kInt4 = 3 };

// A whole packed matrix. Sizes were checked by the bindings; the contents are not trusted.
struct Packed {
  Codec codec;
  Dtype dtype;
  const uint64_t* bitmap;  // null in the dense form: every element inside the matrix is kept
  const uint32_t* offsets;
  const uint8_t* values;
  uint64_t values_bytes;
  const uint32_t* heads;   // kExponent
  const uint16_t* scales;  // kInt8, kInt4: bf16, see scales_of
  uint32_t group_tiles;    // kInt8, kInt4: tiles side by side that share scales; else 0
  uint32_t groups;
  uint32_t item_bytes;  // of an element of the matrix: 2 or 4
  uint32_t rows;
  uint32_t cols;
  uint32_t tile_cols;
};

// What is wrong with a tile. Numbers are read by bindings.cpp only.
enum class Fault : int {
  kNone = 0,
  kOffsetsDescend,
  kRunPastEnd,
  kRunLength,
  kBitsOutside,
  kHead,
  kEscape,
};

// One instruction set's kernels. Every function takes one tile row, and refuses a wrong tile
// before it follows what that tile's values say. On a fault `*tile` is the number of the tile.
struct Kernels {
  const char* name;
  bool (*supported)();
  // Writes the rows of `tile_row` to `out` (its first row, elements of the matrix's dtype; `stride`
  // elements from row to row).
  // `streaming`: the output is larger than the caches, and every row starts on 64 bytes.
  Fault (*expand)(const Packed&, uint32_t tile_row, void* out, uint64_t stride, bool streaming,
                  uint64_t* tile);
  // x of one token block as floats, in the order that this instruction set's linear wants for this
  // matrix: [tile_cols][tokens][64], zero beyond its columns. `x`: bits of its dtype,
  // [tokens][cols].
  void (*prepare)(const Packed&, const void* x, uint32_t tokens, float* prepared);
  // out[token * stride + row] = sum over columns, for the rows of `tile_row`, of at most
  // `token_block` tokens.
  Fault (*linear)(const Packed&, uint32_t tile_row, const float* prepared, uint32_t tokens,
                  float* out, uint64_t stride, uint64_t* tile);
  uint32_t token_block;
};

// In dispatch.cpp: no code of a unit runs before these said yes.
bool plain_supported();
bool avx2_supported();
bool avx512_supported();
bool avx512bf16_supported();
bool neon_supported();

extern const Kernels kPlain;
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
extern const Kernels kNeon;

// Null-terminated, slowest first.
extern const Kernels* const kAllKernels[];

namespace {

inline uint32_t rows_of(const Packed& m, uint32_t tile_row) {
  const uint32_t left = m.rows - tile_row * kTile;
  return left < kTile ? left : kTile;
}

inline uint32_t cols_of(const Packed& m, uint32_t tile_col) {
  const uint32_t left = m.cols - tile_col * kTile;
  return left < kTile ? left : kTile;
}

inline uint64_t low_bits(uint32_t n) { return n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// Rows of a tile that are kept whole: the bitmap's word, or what it would be in the dense form.
inline uint64_t word_of(const Packed& m, uint64_t tile, uint32_t row, uint32_t cols) {
  return m.bitmap != nullptr ? m.bitmap[tile * kTile + row] : low_bits(cols);
}

// The 64 scales of a tile of kInt8 or kInt4, one for each row.
inline const uint16_t* scales_of(const Packed& m, uint32_t tile_row, uint32_t tile_col) {
  return m.scales + (uint64_t{tile_row} * m.groups + tile_col / m.group_tiles) * kTile;
}

// ---------------------------------------------------------------------- exponent-packed records
// `count` kept elements, each rotated left by one: byte planes, bit planes of codes, escapes.

struct Head {
  uint32_t base;     // of the top byte
  uint32_t planes;   // bits of a code, at most 8
  uint32_t escapes;  // at most `count`
};

inline Head head_of(const Packed& m, uint64_t tile) {
  const uint32_t head = m.heads[tile];
  return {head & 0xff, head >> 8 & 0xff, head >> 16};
}

inline bool head_is_sane(const Packed& m, uint64_t tile, uint64_t count) {
  const Head head = head_of(m, tile);
  if (count == 0) return m.heads[tile] == 0;
  return head.planes <= 8 && head.base + (1u << head.planes) <= 256 && head.escapes <= count;
}

// Bytes from one byte plane, or one bit plane, to the next.
inline uint64_t byte_plane_bytes(uint64_t count) { return (count + 7) & ~uint64_t{7}; }
inline uint64_t bit_plane_bytes(uint64_t count) { return (count + 63) / 64 * 8; }

// Where the bit planes begin in a record, and the escapes.
inline uint64_t codes_at(const Packed& m, uint64_t count) {
  return (m.item_bytes - 1) * byte_plane_bytes(count);
}
inline uint64_t escapes_at(const Packed& m, const Head& head, uint64_t count) {
  return codes_at(m, count) + head.planes * bit_plane_bytes(count);
}

// One escape of 4 bytes: ordinal (little-endian), top byte, zero.
constexpr uint32_t kEscapeBytes = 4;
inline uint32_t escape_ordinal(const uint8_t* escape) {
  return escape[0] | uint32_t{escape[1]} << 8;
}

// --------------------------------------------------------------------------------------- checks

// Bytes of the record of a tile that keeps `count` elements; its head was checked.
inline uint64_t record_bytes(const Packed& m, uint64_t tile, uint64_t count) {
  switch (m.codec) {
    case Codec::kRaw:
      return count * m.item_bytes;
    case Codec::kExponent: {
      const Head head = head_of(m, tile);
      return escapes_at(m, head, count) + head.escapes * kEscapeBytes;
    }
    case Codec::kInt8:
      return count;
    default:
      return (count + 1) / 2;
  }
}

// The longest record: all bytes of a dense 4-byte tile, no window, every element an escape.
constexpr uint64_t kLongestRecord = uint64_t{kTile} * kTile * (3 + 1 + kEscapeBytes);

// The tile's head is sane, and its run lies in `values` and is as long as its record.
inline Fault check_run(const Packed& m, uint64_t tile, uint64_t count) {
  const uint64_t begin = m.offsets[tile];
  const uint64_t end = m.offsets[tile + 1];
  if (end < begin) return Fault::kOffsetsDescend;
  if (end * kRunUnit > m.values_bytes) return Fault::kRunPastEnd;
  if (m.codec == Codec::kExponent && !head_is_sane(m, tile, count)) return Fault::kHead;
  if ((record_bytes(m, tile, count) + kRunUnit - 1) / kRunUnit != end - begin) {
    return Fault::kRunLength;
  }
  return Fault::kNone;
}

// The escapes of a tile that passed check_run ascend and name kept elements.
inline Fault check_escapes(const Packed& m, uint64_t tile, uint64_t count) {
  const Head head = head_of(m, tile);
  const uint8_t* escape =
      m.values + uint64_t{m.offsets[tile]} * kRunUnit + escapes_at(m, head, count);
  uint32_t next = 0;
  for (uint32_t i = 0; i < head.escapes; ++i, escape += kEscapeBytes) {
    const uint32_t ordinal = escape_ordinal(escape);
    if (ordinal < next || ordinal >= count || escape[3] != 0) return Fault::kEscape;
    next = ordinal + 1;
  }
  return Fault::kNone;
}

}  // namespace
}  // namespace tierd
