// The Python module `fusednorm._build`: how the libraries were built, and hooks into _ops.so for the tests.
// Only pybind11 is included: torch/extension.h would cost 40 seconds of compile time and tie this file to torch's ABI.
#include <dlfcn.h>
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/hooks.h"
#include "cuda/hooks.h"

namespace py = pybind11;

namespace {

// The hooks are looked up in the very file that lies beside this one. Not through the global scope:
// torch.ops.load_library opens it with local scope, where dlsym(RTLD_DEFAULT) does not see it. Not by linking against
// it: the linker would record the bare name "_ops.so", which the loader may satisfy with another package's library of
// that name. RTLD_NOLOAD because loading it here would skip the checks of fusednorm._library.load().
void* ops_library() {
  static void* handle = nullptr;  // the GIL guards it; a failed attempt may be repeated
  if (handle) return handle;
  Dl_info self;
  if (!dladdr(reinterpret_cast<void*>(&ops_library), &self)) throw std::runtime_error("dladdr failed");
  std::string path = self.dli_fname;
  path = path.substr(0, path.rfind('/') + 1) + "_ops.so";
  handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) throw std::runtime_error(path + " is not loaded; call fusednorm._library.load() first");
  return handle;
}

template <class F>
F* hook(F*, const char* name) {
  void* symbol = dlsym(ops_library(), name);
  if (!symbol) throw std::runtime_error(std::string("_ops.so does not export ") + name);
  return reinterpret_cast<F*>(symbol);
}

#define HOOK(name) hook(static_cast<decltype(&name)>(nullptr), #name)

using Counter = std::array<uint32_t, 4>;
using Key = std::array<uint32_t, 2>;

void check_rounds(int rounds) {
  if (rounds != 7 && rounds != 10) throw py::value_error("rounds must be 7 or 10");
}

py::dict build_info() {
  py::dict info;
  info["torch"] = FUSEDNORM_TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __VERSION__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cxx_standard"] = __cplusplus / 100 % 100;
  info["openmp"] = _OPENMP;
#ifdef FUSEDNORM_CUDA_VERSION
  info["cuda"] = FUSEDNORM_CUDA_VERSION;  // of nvcc
  info["cuda_architectures"] = py::str(FUSEDNORM_CUDA_ARCHITECTURES).attr("split")(",");
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::list();
#endif
  info["levels"] = py::str(HOOK(fusednorm_cpu_levels_compiled)()).attr("split")(",");
  return info;
}

Counter philox4x32(int rounds, const Counter& counter, const Key& key) {
  check_rounds(rounds);
  Counter out;
  HOOK(fusednorm_philox4x32)(rounds, counter.data(), key.data(), out.data());
  return out;
}

std::vector<Counter> philox4x32_lanes(int rounds, const Counter& counter, const Key& key) {
  check_rounds(rounds);
  std::vector<Counter> out(64);
  out.resize(HOOK(fusednorm_philox4x32_lanes)(rounds, counter.data(), key.data(), out.front().data()));
  return out;
}

const char* set_residency(const std::string& name) {
  constexpr std::array<const char*, 3> names = {"automatic", "never", "always"};
  for (int i = 0; i < 3; ++i) {
    if (name == names[i]) return names[HOOK(fusednorm_cuda_set_residency)(i)];
  }
  throw py::value_error("residency must be 'automatic', 'never' or 'always'");
}

}  // namespace

PYBIND11_MODULE(_build, module) {
  module.doc() = "Build facts of fusednorm and hooks for its tests.";
  module.def("build_info", &build_info,
             "torch version, compiler, C++ standard, OpenMP version, levels compiled, CUDA version and architectures.");
  module.def("level", [] { return HOOK(fusednorm_cpu_level)(); }, "The CPU level in use: default, avx2 or avx512.");
  module.def("philox4x32", &philox4x32, py::arg("rounds"), py::arg("counter"), py::arg("key"),
             "One draw of the scalar Philox template; rounds is 7 or 10.");
  module.def("philox4x32_lanes", &philox4x32_lanes, py::arg("rounds"), py::arg("counter"), py::arg("key"),
             "The draws of the vector template at the level in use, one per lane; lane i has counter word 0 + i.");
  module.def("set_residency", &set_residency, py::arg("name"),
             "Which kernels channels-first calls on CUDA get: 'automatic', 'never' or 'always' resident where it fits. "
             "Returns what it was. RuntimeError in a build without CUDA.");
  module.def("max_threads", &omp_get_max_threads, "Threads that a parallel region started here would have.");
}
