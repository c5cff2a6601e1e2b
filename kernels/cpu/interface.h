// What the C++ modules and the Python around them agree on.
#pragma once

namespace tierd {

// Plus one whenever a function of bindings.cpp or encode_bindings.cpp takes or returns something
// else, is added or goes; native.py has the same number.
constexpr int kInterface = 1;

}  // namespace tierd
