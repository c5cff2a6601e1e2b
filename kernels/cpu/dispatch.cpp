// The list of instruction sets. Whether this machine has one is asked by its `supported`, which is
// compiled here without that instruction set's flags.
#include "kernels.h"

namespace tierd {

const Kernels* const kAllKernels[] = {&kPlain, nullptr};

}  // namespace tierd
