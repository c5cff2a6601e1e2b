// Magnitude pruning on raw bits, in place. One thread; throws std::bad_alloc only.
#pragma once

#include <stdint.h>

namespace tierd {
namespace encode {

// Sets the `wanted` elements of smallest absolute value to +0.0, in rows of `cols` elements that are
// `stride` elements apart. Those that are +0.0 already come first, then -0.0; equal ones by
// position. Patterns above `infinity`, without their sign, are NaN and stay: asked for more than
// there are, all others are pruned.
template <typename Element>
void prune(Element* first, int64_t stride, uint64_t rows, uint64_t cols, uint32_t infinity,
           uint64_t wanted);

}  // namespace encode
}  // namespace tierd
