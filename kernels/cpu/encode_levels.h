// Weights to small integers, on vectors as long as its unit's flags allow: included by every unit. Internal linkage only, no C++ library header; see kernels.h.
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

// Left to itself the compiler takes most of these loops one float at a time, and it takes vectors
// that are longer than the processor's apart badly.
#if defined(__AVX512F__)
constexpr uint32_t kWide = 16;
#else
constexpr uint32_t kWide = 4;
#endif
constexpr uint32_t kParts = kLanes / kWide;

using Floats = float __attribute__((vector_size(4 * kWide)));
using Words = uint32_t __attribute__((vector_size(4 * kWide)));
using Halves = uint16_t __attribute__((vector_size(2 * kWide)));
using Integers = int32_t __attribute__((vector_size(4 * kWide)));

// To the nearest integer, ties to even: above 2^23 a float has no fraction left. |x| < 2^22.
inline void round_even(const Floats& x, Floats* rounded) {
  *rounded = (x + 12582912.0f) - 12582912.0f;
}

inline void load_halves(const uint16_t* elements, uint32_t count, Words* words) {
  Halves halves{};
  memcpy(&halves, elements, count < kWide ? count * sizeof(uint16_t) : sizeof halves);
  *words = __builtin_convertvector(halves, Words);
}

// Each type loads up to kWide elements as floats; zeros behind `count`.
struct BF16 {
  using Element = uint16_t;
  static void load(const uint16_t* elements, uint32_t count, Floats* weights) {
    Words words;
    load_halves(elements, count, &words);
    *weights = reinterpret_cast<Floats>(words << 16);
  }
};

struct F16 {
  using Element = uint16_t;
  // Finite ones. The exponents differ by 112, and the product is exact for denormals, too.
  static void load(const uint16_t* elements, uint32_t count, Floats* weights) {
    Words words;
    load_halves(elements, count, &words);
    const Floats magnitudes = reinterpret_cast<Floats>((words & 0x7fff) << 13) * 0x1p112f;
    *weights = reinterpret_cast<Floats>(reinterpret_cast<Words>(magnitudes) |
                                        (words & 0x8000) << 16);
  }
};

struct F32 {
  using Element = uint32_t;
  static void load(const uint32_t* elements, uint32_t count, Floats* weights) {
    *weights = Floats{};
    memcpy(weights, elements, count < kWide ? count * sizeof(uint32_t) : sizeof *weights);
  }
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

// The sum of squared distances, in units of the scale, of the weights from their int4 levels.
template <typename Type>
void square_sums(const void* row, uint64_t count, const float* scales, float* sums) {
  const auto* elements = static_cast<const typename Type::Element*>(row);
  Floats parts[kParts][kScaleCandidates] = {};
  uint32_t part = 0;
  for (uint64_t i = 0; i < count; i += kWide, part = (part + 1) % kParts) {
    Floats weights;  // those behind the last are zero and add nothing
    Type::load(elements + i, static_cast<uint32_t>(count - i < kWide ? count - i : kWide),
               &weights);
    weights = reinterpret_cast<Floats>(reinterpret_cast<Words>(weights) & 0x7fffffff);
    for (uint32_t k = 0; k < kScaleCandidates; ++k) {
      const Floats quotients = weights / scales[k];
      Floats level;
      round_even(quotients, &level);
      const Floats distances = quotients - (level < 7.0f ? level : Floats{} + 7.0f);
      parts[part][k] += distances * distances;
    }
  }
  for (uint32_t k = 0; k < kScaleCandidates; ++k) {
    float lanes[kLanes];
    for (uint32_t lane = 0; lane < kLanes; ++lane) lanes[lane] = parts[lane / kWide][k][lane % kWide];
    for (uint32_t width = kLanes / 2; width != 0; width /= 2) {
      for (uint32_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    sums[k] = lanes[0];
  }
}

// The levels of one tile; every row has its scale, none is zero.
template <typename Type>
void make_levels(const Source& s, const float* scales, float limit, int8_t* levels) {
  const Floats most = Floats{} + limit;
  for (uint32_t row = 0; row < s.rows; ++row) {
    const auto* elements =
        static_cast<const typename Type::Element*>(s.first) + int64_t{row} * s.stride;
    for (uint32_t col = 0; col < s.cols; col += kWide) {
      Floats weights;
      Type::load(elements + col, s.cols - col, &weights);
      Floats level;
      round_even(weights / scales[row], &level);
      level = level < most ? level : most;
      level = level > -most ? level : -most;
      const Integers whole = __builtin_convertvector(level, Integers);
      int8_t* const to = levels + row * kTile + col;
      for (uint32_t i = 0; i < kWide; ++i) to[i] = static_cast<int8_t>(whole[i]);
    }
  }
}

template <typename Type>
constexpr LevelEncoder kLevels = {largest<Type>, square_sums<Type>, make_levels<Type>};

}  // namespace
}  // namespace encode
}  // namespace tierd
