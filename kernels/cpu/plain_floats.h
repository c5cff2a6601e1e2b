// What the bits of the three dtypes stand for, in portable C++, and back.
#pragma once

#include <string.h>

#include "kernels.h"

namespace tierd {
namespace plain {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bf16(uint16_t bits) { return as_float(uint32_t{bits} << 16); }

// Shifting the 15 low bits into a float's exponent and mantissa gives the value times 2^-112, for
// ordinary and denormal halves alike; only infinity and NaN need their exponent filled up.
inline float from_f16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{bits & 0x7fffu} << 13;
  if ((bits & 0x7c00u) == 0x7c00u) return as_float(sign | magnitude | 0x7f800000u);
  const float scaled = as_float(magnitude) * as_float((127u + 112u) << 23);
  return sign != 0 ? -scaled : scaled;
}

inline float to_float(Dtype dtype, const uint8_t* bits) {
  if (dtype == Dtype::kF32) {
    float value;
    memcpy(&value, bits, sizeof value);
    return value;
  }
  uint16_t half;
  memcpy(&half, bits, sizeof half);
  return dtype == Dtype::kBF16 ? from_bf16(half) : from_f16(half);
}

// The nearest, of two as near the even one; a NaN stays one.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline uint16_t to_f16(float value) {
  const uint32_t sign = as_bits(value) >> 16 & 0x8000u;
  const uint32_t magnitude = as_bits(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  // 65520 lies between the largest half and the next power of two.
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  // Denormal halves count in 2^-24, the last place of 0.5: the addition rounds.
  if (magnitude < 0x38800000u) {
    return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
}

// Writes the bits of `value` in `dtype`.
inline void from_float(Dtype dtype, float value, uint16_t* to) {
  *to = dtype == Dtype::kBF16 ? to_bf16(value) : to_f16(value);
}
inline void from_float(Dtype, float value, uint32_t* to) { *to = as_bits(value); }

}  // namespace
}  // namespace plain
}  // namespace tierd
