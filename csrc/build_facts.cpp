// What only the compiler knows of this build, for `fusednorm/_hooks.py`; what setup.py knows is in `_built_for.py`.
// Plain C functions and no Python module: so one library, and one wheel, serves every Python.
#include "cpu/hooks.h"

const char* fusednorm_compiler() {
#if defined(__clang__)
  return "clang " __VERSION__;
#else
  return "gcc " __VERSION__;
#endif
}

int fusednorm_cxx_standard() { return __cplusplus / 100 % 100; }

int fusednorm_openmp() { return _OPENMP; }
