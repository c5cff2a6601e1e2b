#include "encode_quantise.h"

#include <string.h>

namespace tierd {
namespace encode {
namespace {

const LevelEncoder& level_encoder(const Encoder& encoder, const Quantised& q) {
  return encoder.levels[static_cast<int>(q.dtype)];
}

float limit_of(const Quantised& q) { return q.int4 ? 7.0f : 127.0f; }

uint64_t record_bytes(const Quantised& q, uint32_t count) {
  return q.int4 ? (count + 1) / 2 : count;
}

float float_of(uint32_t bits) {
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

float scale_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// A finite magnitude of this dtype as a float.
float magnitude_float(Dtype dtype, uint32_t bits) {
  switch (dtype) {
    case Dtype::kBF16:
      return float_of(bits << 16);
    case Dtype::kF16:
      return float_of(bits << 13) * 0x1p112f;
    default:
      return float_of(bits);
  }
}

uint32_t infinity_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBF16:
      return 0x7f80;
    case Dtype::kF16:
      return 0x7c00;
    default:
      return 0x7f800000;
  }
}

// The least scale that is not below `target`, or the next smaller one where the largest level times
// it would not be finite in the matrix's dtype.
uint16_t scale_up(float target, const Quantised& q) {
  uint32_t bits;
  memcpy(&bits, &target, sizeof bits);
  bits = (bits + 0xffff) >> 16;
  if (bits == 0) bits = 1;
  const float largest = magnitude_float(q.dtype, infinity_of(q.dtype) - 1);
  if (scale_float(static_cast<uint16_t>(bits)) * limit_of(q) > largest) --bits;
  return static_cast<uint16_t>(bits);
}

uint16_t least_error_scale(const LevelEncoder& on, const Quantised& q, const uint8_t* row,
                           uint64_t count, float amax) {
  const float step = amax / 7.0f;
  uint16_t bits[kScaleCandidates];
  float scales[kScaleCandidates];
  float sums[kScaleCandidates];
  for (uint32_t k = 0; k < kScaleCandidates; ++k) {
    bits[k] = scale_up(step * (static_cast<float>(64 - 3 * k) / 64.0f), q);
    scales[k] = scale_float(bits[k]);
  }
  on.square_sums(row, count, scales, sums);
  uint32_t best = 0;
  float least = sums[0];
  for (uint32_t k = 1; k < kScaleCandidates; ++k) {
    const float ratio = scales[k] / scales[0];
    const float error = sums[k] * (ratio * ratio);
    if (!(error < least)) continue;
    least = error;
    best = k;
  }
  return bits[best];
}

// The levels of tiles, one at a time.
class Levels {
 public:
  Levels(const Encoder& encoder, const Matrix& m, const Quantised& q, const uint16_t* scales)
      : on_(level_encoder(encoder, q)),
        q_(q),
        scales_(scales),
        tile_cols_(m.tile_cols()),
        groups_(q.groups(m)) {}

  Source of(uint64_t tile, const Source& source) {
    const uint64_t group = tile % tile_cols_ * kTile / q_.group;
    const uint16_t* bits = scales_ + (tile / tile_cols_ * groups_ + group) * kTile;
    float scales[kTile];
    for (uint32_t row = 0; row < kTile; ++row) {
      scales[row] = bits[row] == 0 ? 1.0f : scale_float(bits[row]);  // 0: all weights are zero
    }
    on_.make_levels(source, scales, limit_of(q_), levels_);
    return {levels_, kTile, source.rows, source.cols};
  }

 private:
  const LevelEncoder& on_;
  const Quantised& q_;
  const uint16_t* scales_;
  uint64_t tile_cols_;
  uint64_t groups_;
  alignas(64) int8_t levels_[kTileElements];
};

}  // namespace

bool choose_scales(const Encoder& encoder, const Matrix& m, const Quantised& q, uint16_t* scales) {
  const LevelEncoder& on = level_encoder(encoder, q);
  const uint64_t groups = q.groups(m);
  std::fill(scales, scales + q.scale_count(m), 0);
  for (uint64_t row = 0; row < m.rows; ++row) {
    uint16_t* const to = scales + row / kTile * groups * kTile + row % kTile;
    for (uint64_t group = 0; group < groups; ++group) {
      const uint64_t left = group * q.group;
      const uint8_t* first = m.at(row, left);
      const uint64_t count = std::min(m.cols - left, q.group);
      const uint32_t largest = on.largest(first, count);
      if (largest >= infinity_of(q.dtype)) return false;
      if (largest == 0) continue;
      const float amax = magnitude_float(q.dtype, largest);
      to[group * kTile] = q.int4 ? least_error_scale(on, q, first, count, amax)
                                 : scale_up(amax / limit_of(q), q);
    }
  }
  return true;
}

uint64_t level_structure(const Encoder& encoder, const Matrix& m, const Quantised& q,
                         const uint16_t* scales, uint64_t* bitmap, uint32_t* offsets) {
  Levels levels(encoder, m, q, scales);
  uint64_t end = 0;
  offsets[0] = 0;
  for_each_tile(m, [&](uint64_t tile, const Source& source) {
    uint32_t count = source.rows * source.cols;
    if (bitmap != nullptr) {
      uint64_t* words = bitmap + tile * kTile;
      encoder.level_bitmap(levels.of(tile, source), words);
      count = set_bits(words);
    }
    end += units(record_bytes(q, count));
    offsets[tile + 1] = static_cast<uint32_t>(end);
    return true;
  });
  return end;
}

uint64_t level_values(const Encoder& encoder, const Matrix& m, const Quantised& q,
                      const uint16_t* scales, const uint64_t* bitmap, const uint32_t* offsets,
                      uint8_t* values) {
  Levels levels(encoder, m, q, scales);
  alignas(64) uint8_t packed[kTileElements + kSlack];
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
    const uint64_t bytes = record_bytes(q, count);
    const uint64_t begin = end;
    end += units(bytes);
    if (offsets[tile + 1] != end) {
      wrong = tile;
      return false;
    }
    encoder.pack_levels(levels.of(tile, source), words, packed);
    memset(packed + count, 0, kSlack - kRunUnit);
    if (q.int4) {
      for (uint64_t i = 0; i < bytes; ++i) {
        packed[i] = static_cast<uint8_t>((packed[2 * i] & 0xf) | packed[2 * i + 1] << 4);
      }
      memset(packed + bytes, 0, kRunUnit);
    }
    memcpy(values + begin * kRunUnit, packed, (end - begin) * kRunUnit);
    return true;
  });
  return wrong;
}

}  // namespace encode
}  // namespace tierd
