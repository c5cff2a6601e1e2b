// Several tokens at once: tiles expanded into L1 or L2, then multiplied block by block.
#pragma once

#include "math_avx512.h"

namespace tierd {
namespace avx512 {
namespace {

// Tokens for which a tile is expanded once. Measured with 32 tokens in bf16 on one Zen 5 core: 8
// 1600, 16 1350, 32 1050 ns a tile.
constexpr uint32_t kTokensTogether = 32;

// Rows and tokens of a block: 16 sums in registers, 8 loads for 16 products.
constexpr uint32_t kBlock = 4;

template <typename Math>
void expand_tile(const uint64_t* words, const uint8_t* run, typename Math::Vector* to) {
  for (uint32_t row = 0; row < kTile; ++row, to += Math::kVectors) {
    prefetch<Math::kLines>(run + kAhead);
    run = Math::load_row(words[row], run, to);
  }
}

// kBlock rows and `count` tokens of `tiles` expanded tiles. Meanwhile what lies from `next` on
// comes into L2: without, memory would rest until the next tiles are expanded (8 tokens, one Zen 5
// core: 1.3 times what it takes in L2 instead of 1.17).
template <typename Math, bool scaled, uint32_t count>
inline void multiply_block(const typename Math::Vector* w, const uint8_t* x, uint32_t tiles,
                           uint32_t tokens, const float* scales, __m512* sums,
                           const uint8_t*& next) {
  constexpr uint32_t vectors = Math::kVectors;
  __m512 sum[kBlock][count];
  TIERD_UNROLL
  for (uint32_t r = 0; r < kBlock; ++r) {
    TIERD_UNROLL
    for (uint32_t t = 0; t < count; ++t) {
      sum[r][t] = scaled ? _mm512_setzero_ps() : sums[r * tokens + t];
    }
  }
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    TIERD_UNROLL
    for (uint32_t v = 0; v < vectors; ++v) {
      typename Math::Vector xs[count];
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
      next += kVector;
      TIERD_UNROLL
      for (uint32_t t = 0; t < count; ++t) xs[t] = Math::load(x + (t * vectors + v) * kVector);
      TIERD_UNROLL
      for (uint32_t r = 0; r < kBlock; ++r) {
        const typename Math::Vector weights = w[r * vectors + v];
        TIERD_UNROLL
        for (uint32_t t = 0; t < count; ++t) {
          sum[r][t] = Math::add_product(sum[r][t], weights, xs[t]);
        }
      }
    }
    w += kTile * vectors;
    x += uint64_t{tokens} * vectors * kVector;
  }
  TIERD_UNROLL
  for (uint32_t r = 0; r < kBlock; ++r) {
    TIERD_UNROLL
    for (uint32_t t = 0; t < count; ++t) {
      __m512* to = sums + r * tokens + t;
      *to = scaled ? _mm512_fmadd_ps(sum[r][t], _mm512_set1_ps(scales[r]), *to) : sum[r][t];
    }
  }
}

// next: the values behind those of the tiles.
template <typename Math, bool scaled>
void multiply_tiles(const typename Math::Vector* w, const uint8_t* x, uint32_t tiles,
                    uint32_t tokens, const float* scales, __m512* sums, const uint8_t* next) {
  constexpr uint64_t token_bytes = Math::kVectors * kVector;
  for (uint32_t row = 0; row < kTile; row += kBlock) {
    const typename Math::Vector* rows = w + row * Math::kVectors;
    __m512* to = sums + row * tokens;
    const float* by = scaled ? scales + row : nullptr;
    uint32_t token = 0;
    for (; token + kBlock <= tokens; token += kBlock) {
      multiply_block<Math, scaled, kBlock>(rows, x + token * token_bytes, tiles, tokens, by,
                                           to + token, next);
    }
    const auto rest = [&]<uint32_t count>() {
      multiply_block<Math, scaled, count>(rows, x + token * token_bytes, tiles, tokens, by,
                                          to + token, next);
    };
    switch (tokens - token) {
      case 1: rest.template operator()<1>(); break;
      case 2: rest.template operator()<2>(); break;
      case 3: rest.template operator()<3>(); break;
    }
  }
}

}  // namespace
}  // namespace avx512
}  // namespace tierd
