// The list of encoders, and the question to the processor; compiled without any instruction set's
// flags, as dispatch.cpp is.
#include "encode.h"

namespace tierd {
namespace encode {

bool plain_supported() { return true; }

#if defined(__x86_64__)
bool avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}
#endif

const Encoder* const kAllEncoders[] = {
    &kPlain,
#if defined(__x86_64__)
    &kAvx512,
#endif
    nullptr,
};

}  // namespace encode
}  // namespace tierd
