// int8 and int4, whatever the instruction set; tierd_layouts.quantised is the specification.
#pragma once

#include "encode_tiles.h"

namespace tierd {
namespace encode {

struct Quantised {
  Dtype dtype;
  bool int4;
  uint64_t group;  // columns that share a scale: a multiple of 64

  uint64_t groups(const Matrix& m) const { return (m.cols + group - 1) / group; }
  uint64_t scale_count(const Matrix& m) const { return m.tile_rows() * groups(m) * kTile; }
};

// Fills `scales`. Returns false, with part of them written, when a weight is not finite.
bool choose_scales(const Encoder&, const Matrix&, const Quantised&, uint16_t* scales);

// As exponent_structure and exponent_values; the bits of the levels that are not 0.
uint64_t level_structure(const Encoder&, const Matrix&, const Quantised&, const uint16_t* scales,
                         uint64_t* bitmap, uint32_t* offsets);
uint64_t level_values(const Encoder&, const Matrix&, const Quantised&, const uint16_t* scales,
                      const uint64_t* bitmap, const uint32_t* offsets, uint8_t* values);

}  // namespace encode
}  // namespace tierd
