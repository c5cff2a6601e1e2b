// The list of instruction sets, and the questions to the processor. They are compiled here, without
// any instruction set's flags; nothing in a unit is called before its question said yes.
#include "kernels.h"

namespace tierd {

bool plain_supported() { return true; }

#if defined(__x86_64__)
// GCC's builtin also asks whether the operating system saves the wide registers.
bool avx2_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

bool avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
}

bool avx512bf16_supported() {
  return avx512_supported() && __builtin_cpu_supports("avx512bf16");
}
#endif

#if defined(__aarch64__)
// Every 64-bit Arm processor that runs Linux has it.
bool neon_supported() { return true; }
#endif

const Kernels* const kAllKernels[] = {
    &kPlain,
#if defined(__x86_64__)
    &kAvx2,
    &kAvx512,
    &kAvx512Bf16,
#elif defined(__aarch64__)
    &kNeon,
#endif
    nullptr,
};

}  // namespace tierd
