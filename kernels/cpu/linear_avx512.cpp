// The fused sparse product in single precision, and the record of the AVX-512 kernels.
#include "linear_avx512.h"

namespace tierd {
namespace avx512 {

Fault linear(const Packed& m, uint32_t tile_row, const float* prepared, uint32_t tokens,
             float* out, uint64_t stride, uint64_t* tile) {
  switch (m.dtype) {
    case Dtype::kBF16:
      return product_of<Fma<Dtype::kBF16>>(m, tile_row, prepared, tokens, out, stride, tile);
    case Dtype::kF16:
      return product_of<Fma<Dtype::kF16>>(m, tile_row, prepared, tokens, out, stride, tile);
    default:
      return product_of<Fma<Dtype::kF32>>(m, tile_row, prepared, tokens, out, stride, tile);
  }
}

void prepare(const Packed& m, const void* x, uint32_t tokens, float* prepared) {
  switch (m.dtype) {
    case Dtype::kBF16: return prepare_x<Fma<Dtype::kBF16>>(m, x, tokens, prepared);
    case Dtype::kF16: return prepare_x<Fma<Dtype::kF16>>(m, x, tokens, prepared);
    default: return prepare_x<Fma<Dtype::kF32>>(m, x, tokens, prepared);
  }
}

}  // namespace avx512

extern const Kernels kAvx512 = {
    "avx512",        avx512_supported, avx512::expand,
    avx512::prepare, avx512::linear,   avx512::kTokensTogether,
};

}  // namespace tierd
