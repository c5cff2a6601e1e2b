// The encoder's walks over a whole matrix, whatever the instruction set. One thread; no exceptions.
#pragma once

#include "encode_tiles.h"

namespace tierd {
namespace encode {

// Units of 16 bytes that the array `values` has in each form.
struct Sizes {
  uint64_t raw;
  uint64_t masked;      // exponent-packed
  uint64_t dense_form;  // exponent-packed
};

Sizes measure(const Encoder&, const Matrix&);

// The arrays in front of `values`, from which follows how long that one is. Both return its units;
// offsets are of no use where these do not fit 32 bits. `bitmap` null: the dense form.
uint64_t raw_structure(const Encoder&, const Matrix&, uint64_t* bitmap, uint32_t* offsets);
uint64_t exponent_structure(const Encoder&, const Matrix&, uint64_t* bitmap, uint32_t* offsets,
                            uint32_t* heads);

// Writes offsets[tiles] * 16 bytes of values. Returns kNoTile, or the first tile for which the
// structure is not that of the matrix: nothing is written for that tile, nor outside `values`.
uint64_t raw_values(const Encoder&, const Matrix&, const uint64_t* bitmap, const uint32_t* offsets,
                    uint8_t* values);
uint64_t exponent_values(const Encoder&, const Matrix&, const uint64_t* bitmap,
                         const uint32_t* offsets, const uint32_t* heads, uint8_t* values);

}  // namespace encode
}  // namespace tierd
