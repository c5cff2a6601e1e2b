// The fused sparse product of bf16 with AVX512_BF16, and the record of these kernels.
//
// vdpbf16ps adds two products to each of 16 sums in one instruction and takes bf16 as it is: half
// the multiplications and half the loads of x, nothing to widen. Its rounding is that of two single
// products in single precision, but it takes denormals for zero and makes zeros of them. Weights
// are therefore looked at before they are multiplied, and a tile that has denormal ones is
// multiplied in single precision; x and sums below 2^-126 count as zero. What is not bf16 goes to
// the kernels in single precision.
#include "linear_avx512.h"

namespace tierd {
namespace avx512bf16 {
namespace {

using avx512::kVector;

struct Pairs {
  static constexpr uint32_t kVectors = 2;
  static constexpr uint32_t kLines = 1;
  static constexpr uint32_t kRowsAtOnce = 8;
  static constexpr bool kFlushes = true;
  using Vector = __m512i;

  static const uint8_t* load_row(uint64_t word, const uint8_t* run, Vector w[kVectors]) {
    const uint32_t low = static_cast<uint32_t>(word);
    w[0] = avx512::expand32x16(low, run);
    w[1] = avx512::expand32x16(static_cast<uint32_t>(word >> 32),
                               run + 2 * __builtin_popcount(low));
    return run + 2 * __builtin_popcountll(word);
  }

  static __m512 add_product(__m512 sum, Vector w, Vector x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }

  static Vector load(const void* from) { return _mm512_load_si512(from); }

  static void prepare(uint64_t here, const void* x, void* prepared) {
    for (uint32_t i = 0; i < kVectors; ++i) {
      const __mmask32 some = static_cast<__mmask32>(here >> (32 * i));
      const uint16_t* from = static_cast<const uint16_t*>(x) + 32 * i;
      _mm512_store_si512(static_cast<uint16_t*>(prepared) + 32 * i,
                         _mm512_maskz_loadu_epi16(some, from));
    }
  }
};

void prepare(const Packed& m, const void* x, uint32_t tokens, float* prepared) {
  if (m.dtype != Dtype::kBF16) return avx512::prepare(m, x, tokens, prepared);
  avx512::prepare_x<Pairs>(m, x, tokens, prepared);
}

Fault linear(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
             float* out, uint64_t stride, uint64_t* tile) {
  if (m.dtype != Dtype::kBF16) {
    return avx512::linear(m, tile_row, prepared, tokens, out, stride, tile);
  }
  return avx512::product_of<Pairs>(m, tile_row, prepared, tokens, out, stride, tile);
}

}  // namespace
}  // namespace avx512bf16

extern const Kernels kAvx512Bf16 = {
    "avx512bf16",        avx512bf16_supported, avx512::expand,
    avx512bf16::prepare, avx512bf16::linear,   avx512::kTokensTogether,
};

}  // namespace tierd
