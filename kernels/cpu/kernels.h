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

// Tokens that one call of a linear kernel takes. A longer batch is cut into blocks of this size.
constexpr uint32_t kTokenBlock = 8;

enum class Dtype : int { kBF16 = 0, kF16 = 1, kF32 = 2 };

// A whole packed matrix. Sizes were checked by the bindings; the contents are not trusted.
struct Packed {
  const uint64_t* bitmap;
  const uint32_t* offsets;
  const uint8_t* values;
  uint64_t values_bytes;
  uint32_t item_bytes;  // 2 or 4
  uint32_t rows;
  uint32_t cols;
  uint32_t tile_cols;
};

// What is wrong with a tile. Numbers are read by bindings.cpp only.
enum class Fault : int {
  kNone = 0,
  kOffsetsDescend,
  kRunPastEnd,
  kPopcount,
  kBitsOutside,
};

// One instruction set's kernels. Every function takes one tile row, and refuses a wrong tile
// before it reads that tile's values. On a fault `*tile` is the number of the tile.
struct Kernels {
  const char* name;
  bool (*supported)();
  // Writes the rows of `tile_row` to `out` (its first row; `stride` elements from row to row).
  // `streaming`: the output is larger than the caches, and every row starts on 64 bytes.
  Fault (*expand16)(const Packed&, uint32_t tile_row, uint16_t* out, uint64_t stride,
                    bool streaming, uint64_t* tile);
  Fault (*expand32)(const Packed&, uint32_t tile_row, uint32_t* out, uint64_t stride,
                    bool streaming, uint64_t* tile);
  // x of one token block as floats, in the order that this instruction set's linear wants:
  // [tile_cols][tokens][64], zero beyond `cols`. `x` is the bits of `dtype`, [tokens][cols].
  void (*prepare)(Dtype, const void* x, uint32_t tokens, uint32_t cols, float* prepared);
  // out[token * stride + row] = sum over columns, for the rows of `tile_row`, of at most
  // kTokenBlock tokens.
  Fault (*linear)(const Packed&, Dtype, uint32_t tile_row, const float* prepared, uint32_t tokens,
                  float* out, uint64_t stride, uint64_t* tile);
};

// In dispatch.cpp: no code of a unit runs before these said yes.
bool plain_supported();
bool avx512_supported();

extern const Kernels kPlain;
extern const Kernels kAvx512;

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

// The run of a tile lies in `values` and is as long as `count` values need.
inline Fault check_run(const Packed& m, uint64_t tile, uint64_t count) {
  const uint64_t begin = m.offsets[tile];
  const uint64_t end = m.offsets[tile + 1];
  if (end < begin) return Fault::kOffsetsDescend;
  if (end * kRunUnit > m.values_bytes) return Fault::kRunPastEnd;
  if ((count * m.item_bytes + kRunUnit - 1) / kRunUnit != end - begin) return Fault::kPopcount;
  return Fault::kNone;
}

}  // namespace
}  // namespace tierd
