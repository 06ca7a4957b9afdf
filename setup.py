"""Builds the two shared libraries; all else about the package is in pyproject.toml.

`fusednorm/_ops.so` holds the operators and knows nothing of Python; `fusednorm/_build.so` is a small Python module
with build facts and test hooks, which the package can do without.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 11)
VERSION = re.search(r'^__version__ = "(.+)"$', Path("fusednorm/__init__.py").read_text(), re.M)[1]
INSTALL = "python -m pip install --no-build-isolation ."
# Never -ffast-math: NaN, infinities and the order of additions are part of the contract, and multiply-adds fuse only
# where the source says so. errno and floating-point traps are not, and without giving them up the plain loops do not
# vectorise. No -std: torch knows what its headers need.
FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden"]
# The kernels likewise. IEEE division, square roots and subnormals are nvcc's default: never --use_fast_math.
NVCC_FLAGS = ["-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden"]
# For `make fuzz SANITIZE=1`: what reads out of bounds or relies on undefined behaviour ends the process.
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1"]
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


def find_nvcc():
    """The path of nvcc or None; where torch would look for it, and before torch does."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = f"{home}/bin" if home else os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=path)
    if nvcc and not home:
        # The nvcc on the PATH may be a wrapper or a link. torch takes the toolkit to be around it; nvcc knows better.
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.M)
        os.environ["CUDA_HOME"] = os.path.realpath(top[1] if top else Path(nvcc).parents[1])
    return nvcc


def decide_cuda(torch, nvcc):
    """The version of nvcc if the CUDA kernels are to be built, else None. Whether a GPU is visible plays no part."""
    wish = os.environ.get("FUSEDNORM_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"FUSEDNORM_CUDA must be 0 or 1, got {wish!r}")
    release = nvcc and re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
    if wish == "0":
        reason = "FUSEDNORM_CUDA=0"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA"
    elif not nvcc:
        reason = "there is no nvcc in $CUDA_HOME/bin or, without that variable, on the PATH or in /usr/local/cuda/bin"
    elif release.split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = f"{nvcc} is of CUDA {release}, torch {torch.__version__} of CUDA {torch.version.cuda}"
    else:
        log(f"building for the CPU and CUDA: torch {torch.__version__} has it, {nvcc} is of CUDA {release}")
        return release
    if wish == "1":
        sys.exit(f"FUSEDNORM_CUDA=1 cannot be met: {reason}")
    log(f"building for the CPU only: {reason}")
    return None


def architectures(torch, nvcc):
    """What TORCH_CUDA_ARCH_LIST asks for, else all that torch was built for and nvcc knows, the newest as PTX too."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if asked:
        return asked
    known = re.findall(r"compute_(\d+)\b", subprocess.check_output([nvcc, "--list-gpu-arch"], text=True))
    # Not torch.cuda.get_arch_list(), which is empty where there is no GPU.
    built = re.findall(r"sm_(\d+)\b", torch._C._cuda_getArchFlags())
    built += ["89"] * ("86" in built)  # which runs torch's code for 8.6
    both = [int(arch) for arch in built if arch in known]
    if not both:
        sys.exit(f"{nvcc} knows no GPU that torch {torch.__version__} was built for: set TORCH_CUDA_ARCH_LIST")
    return [f"{arch // 10}.{arch % 10}" for arch in sorted(both)[:-1]] + ["{}.{}+PTX".format(*divmod(max(both), 10))]


def add_cuda(ops, build_info, torch, cpp_extension, nvcc, release):
    archs = architectures(torch, nvcc)
    os.environ["TORCH_CUDA_ARCH_LIST"] = " ".join(archs)  # for torch; its own default needs a visible GPU
    log(f"CUDA architectures: {', '.join(archs)}")
    ops.sources += sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp"))
    # Kernels of seven architectures are small again that way, for drivers since CUDA 12.4: those of CUDA 13 all are.
    packed = ["--compress-mode=size"] if int(release.split(".")[0]) >= 13 else []
    ops.extra_compile_args = {"cxx": FLAGS, "nvcc": NVCC_FLAGS + packed}
    ops.libraries += ["c10_cuda", "torch_cuda"]
    ops.include_dirs += cpp_extension.include_paths("cuda", torch_include_dirs=False)
    ops.library_dirs += cpp_extension.library_paths("cuda", torch_include_dirs=False)
    # torch from PyPI brings the libraries of CUDA in wheels of their own, and torch's headers include theirs; a toolkit
    # that is only a compiler has neither. Behind the toolkit's: nvcc needs the headers of its own release.
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    if not Path(cpp_extension.CUDA_HOME, "include", "cusparse.h").exists():
        ops.include_dirs += sorted(map(str, wheels.glob("*/include")))
    runtime = f"libcudart.so.{release.split('.')[0]}"
    if any(Path(path, "libcudart.so").exists() for path in ops.library_dirs):
        ops.libraries.append("cudart")
    else:
        ops.library_dirs += sorted({str(path.parent) for path in wheels.glob(f"*/lib/{runtime}")})
        ops.libraries.append(f":{runtime}")
    build_info.define_macros += [
        ("FUSEDNORM_CUDA_VERSION", f'"{release}"'),
        ("FUSEDNORM_CUDA_ARCHITECTURES", f'"{",".join(archs)}"'),
    ]


class BuildLibraries(build_ext):
    """Hands the work to torch's BuildExtension when it runs, and not before: reading the metadata needs no torch."""

    def get_ext_filename(self, fullname):
        # One name for every Python, so that the operators need not be rebuilt and _library.py need not search.
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self):
        nvcc = find_nvcc()
        torch, cpp_extension = load_torch()
        cuda = decide_cuda(torch, nvcc)
        if cuda:
            add_cuda(*self.extensions, torch, cpp_extension, nvcc, cuda)
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
        # That of another build, copied with the sources: it would vouch for a library that was never finished.
        Path(self.build_lib, "fusednorm", "_built_for.py").unlink(missing_ok=True)
        builder.run()
        record = f'TORCH = "{torch.__version__}"\nPYTHON = "{sys.implementation.cache_tag}"\n'
        for root in [self.build_lib] + ["."] * self.inplace:
            Path(root, "fusednorm", "_built_for.py").write_text(record)


def extension(name, sources, libraries=()):
    sanitized = SANITIZED if os.environ.get("FUSEDNORM_SANITIZE") == "1" else []
    return Extension(
        name,
        sources,
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],  # ninja runs elsewhere
        libraries=list(libraries),
        extra_compile_args=FLAGS + sanitized,
        extra_link_args=["-fopenmp"] + sanitized[:1],
        language="c++",
    )


OPS = sorted({*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")} - {BUILD_INFO})


def version():
    """The package's own, and in anything built from it the torch that it was built for: 0.1.0+torch2.13.0.cpu.

    A wheel runs with that torch alone. Named after it, no cache and no index can hand it to another.
    """
    if "sdist" in sys.argv:
        return VERSION
    try:
        from torch.version import __version__ as torch_version  # not all of torch, which takes seconds
    except ImportError:  # reading the metadata needs none
        return VERSION
    return f"{VERSION}+torch{torch_version.replace('+', '.')}"


setup(
    version=version(),
    license="MIT",
    ext_modules=[
        extension("fusednorm._ops", OPS, libraries=["c10", "torch", "torch_cpu"]),
        extension("fusednorm._build", [BUILD_INFO]),
    ],
    cmdclass={"build_ext": BuildLibraries},
)
