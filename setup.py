"""Builds the two shared libraries; all else about the package is in pyproject.toml.

`fusednorm/_ops.so` holds the operators and knows nothing of Python; `fusednorm/_build.so` is a small Python module
with build facts and test hooks, which the package can do without.
"""

import os
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 11)
INSTALL = "python -m pip install --no-build-isolation ."
# Never -ffast-math: NaN, infinities and the order of additions are part of the contract, and multiply-adds fuse only
# where the source says so. errno and floating-point traps are not, and without giving them up the plain loops do not
# vectorise. No -std: torch knows what its headers need.
FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden"]
BUILD_INFO = "csrc/build_info.cpp"


def log(message):
    print(f"fusednorm: {message}", flush=True)


def load_torch():
    """Returns torch and its cpp_extension, or ends the build with one sentence that says what to do."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit(f"fusednorm is compiled against the torch that will run it ({error}): install torch, then `{INSTALL}`")
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        sys.exit(f"fusednorm needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer; this one is {torch.__version__}")
    return torch, cpp_extension


def decide_cuda():
    wish = os.environ.get("FUSEDNORM_CUDA") or "0"
    if wish == "1":
        sys.exit("FUSEDNORM_CUDA=1 cannot be met: this version has no CUDA kernels; unset it to build for the CPU")
    if wish != "0":
        sys.exit(f"FUSEDNORM_CUDA must be 0 or 1, got {wish!r}")
    log("building for the CPU only (this version has no CUDA kernels)")


class BuildLibraries(build_ext):
    """Hands the work to torch's BuildExtension when it runs, and not before: reading the metadata needs no torch."""

    def get_ext_filename(self, fullname):
        # One name for every Python, so that the operators need not be rebuilt and _library.py need not search.
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self):
        decide_cuda()
        torch, cpp_extension = load_torch()
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            log("leaving out fusednorm._build, which needs Python.h (apt-get install python3-dev); all else works")
            self.extensions = [ext for ext in self.extensions if BUILD_INFO not in ext.sources]
        for ext in self.extensions:
            ext.include_dirs += cpp_extension.include_paths()
            ext.library_dirs += cpp_extension.library_paths()
            ext.define_macros.append(("FUSEDNORM_TORCH_VERSION", f'"{torch.__version__}"'))

        class Builder(cpp_extension.BuildExtension):
            get_ext_filename = BuildLibraries.get_ext_filename

        # ninja may be installed beside a python that runs from an environment that is not activated.
        os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)
        builder = Builder(self.distribution)
        vars(builder).update(vars(self))  # what the command line and pip have set
        builder.force = True  # ninja knows what is out of date
        builder.run()
        record = f'TORCH = "{torch.__version__}"\nPYTHON = "{sys.implementation.cache_tag}"\n'
        for root in [self.build_lib] + ["."] * self.inplace:
            Path(root, "fusednorm", "_built_for.py").write_text(record)


def extension(name, sources, libraries=()):
    return Extension(
        name,
        sources,
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],  # ninja runs elsewhere
        libraries=list(libraries),
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp"],
        language="c++",
    )


OPS = sorted({*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")} - {BUILD_INFO})
setup(
    license="MIT",
    ext_modules=[
        extension("fusednorm._ops", OPS, libraries=["c10", "torch", "torch_cpu"]),
        extension("fusednorm._build", [BUILD_INFO]),
    ],
    cmdclass={"build_ext": BuildLibraries},
)
