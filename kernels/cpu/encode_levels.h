// Weights to small integers, in plain loops that the compiler vectorises: included by every unit, and
// so compiled with that unit's flags. Internal linkage only, no C++ library header; see kernels.h.
//
// tierd_layouts.quantised is the specification: single precision, every operation rounded once, in
// the order written here. The build forbids the compiler to fuse a product with a sum.
#pragma once

#include <string.h>

#include "encode.h"

namespace tierd {
namespace encode {
namespace {

constexpr uint32_t kLanes = 16;  // sums of squares that run side by side, as specified

inline float float_of(uint32_t bits) {
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

// To the nearest integer, ties to even: above 2^23 a float has no fraction left. |x| < 2^22.
inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

struct BF16 {
  using Element = uint16_t;
  static float weight(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
};

struct F16 {
  using Element = uint16_t;
  // Finite ones. The exponents differ by 112, and the product is exact for denormals, too.
  static float weight(uint16_t bits) {
    const float magnitude = float_of((bits & 0x7fffu) << 13) * 0x1p112f;
    uint32_t pattern;
    memcpy(&pattern, &magnitude, sizeof pattern);
    return float_of(pattern | (bits & 0x8000u) << 16);
  }
};

struct F32 {
  using Element = uint32_t;
  static float weight(uint32_t bits) { return float_of(bits); }
};

// The bits of the largest magnitude: they order like the numbers, infinity and NaN last.
template <typename Type>
uint32_t largest(const void* row, uint64_t count) {
  using Element = typename Type::Element;
  constexpr Element kMagnitude = static_cast<Element>(static_cast<Element>(~Element{0}) >> 1);
  const Element* elements = static_cast<const Element*>(row);
  Element most = 0;
  for (uint64_t i = 0; i < count; ++i) {
    const Element magnitude = elements[i] & kMagnitude;
    most = most > magnitude ? most : magnitude;
  }
  return most;
}

template <typename Type>
void add_squares(const typename Type::Element* elements, const float* scales,
                 float lanes[kScaleCandidates][kLanes]) {
  float weights[kLanes];
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const float weight = Type::weight(elements[lane]);
    weights[lane] = weight < 0 ? -weight : weight;
  }
  for (uint32_t k = 0; k < kScaleCandidates; ++k) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      const float quotient = weights[lane] / scales[k];
      const float level = round_even(quotient);
      const float distance = quotient - (level < 7.0f ? level : 7.0f);
      lanes[k][lane] += distance * distance;
    }
  }
}

// The sum of squared distances, in units of the scale, of the weights from their int4 levels.
template <typename Type>
void square_sums(const void* row, uint64_t count, const float* scales, float* sums) {
  using Element = typename Type::Element;
  const Element* elements = static_cast<const Element*>(row);
  float lanes[kScaleCandidates][kLanes] = {};
  uint64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) add_squares<Type>(elements + i, scales, lanes);
  if (i < count) {
    Element rest[kLanes] = {};  // zeros add nothing
    memcpy(rest, elements + i, (count - i) * sizeof(Element));
    add_squares<Type>(rest, scales, lanes);
  }
  for (uint32_t k = 0; k < kScaleCandidates; ++k) {
    for (uint32_t width = kLanes / 2; width != 0; width /= 2) {
      for (uint32_t lane = 0; lane < width; ++lane) lanes[k][lane] += lanes[k][lane + width];
    }
    sums[k] = lanes[k][0];
  }
}

// The levels of one tile; every row has its scale, none is zero.
template <typename Type>
void make_levels(const Source& s, const float* scales, float limit, int8_t* levels) {
  for (uint32_t row = 0; row < s.rows; ++row) {
    const auto* elements =
        static_cast<const typename Type::Element*>(s.first) + int64_t{row} * s.stride;
    const float scale = scales[row];
    int8_t* to = levels + row * kTile;
    for (uint32_t col = 0; col < s.cols; ++col) {
      float level = round_even(Type::weight(elements[col]) / scale);
      level = level < limit ? level : limit;
      level = level > -limit ? level : -limit;
      to[col] = static_cast<int8_t>(static_cast<int32_t>(level));
    }
  }
}

template <typename Type>
constexpr LevelEncoder kLevels = {largest<Type>, square_sums<Type>, make_levels<Type>};

}  // namespace
}  // namespace encode
}  // namespace tierd
