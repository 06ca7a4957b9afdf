"""Builds the operators' library; all else about the package is in pyproject.toml.

`fusednorm/_ops.so` belongs to one torch and knows nothing of Python: a wheel is for that torch, and for every Python.
Beside it `_built_for.py` records what was decided here.
"""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 11)
VERSION = re.search(r'^__version__ = "(.+)"$', Path("fusednorm/__init__.py").read_text(), re.M)[1]
# Never -ffast-math: NaN, infinities and the order of additions are part of the contract, and multiply-adds fuse only
# where the source says so. errno and floating-point traps are not, and without giving them up the plain loops do not
# vectorise. No -std: torch knows what its headers need.
FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden"]
# The kernels likewise. IEEE division, square roots and subnormals are nvcc's default: never --use_fast_math.
NVCC_FLAGS = ["-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden"]
# For `make fuzz SANITIZE=1`: what reads out of bounds or relies on undefined behaviour ends the process.
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1"]


def log(message):
    print(f"fusednorm: {message}", flush=True)


def load_torch():
    """Returns torch and its cpp_extension, or ends the build with one sentence that says what to do."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit(
            f"fusednorm is compiled against the torch that will run it, and finds none here ({error}): install torch, "
            "then fusednorm with `python -m pip install --no-build-isolation ...`"
        )
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


def add_cuda(ops, torch, cpp_extension, nvcc, release):
    """Adds the CUDA kernels to the library; returns the architectures that they are compiled for."""
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
    return archs


class BuildLibrary(build_ext):
    """Hands the work to torch's BuildExtension when it runs, and not before: reading the metadata needs no torch."""

    def get_ext_filename(self, fullname):
        # One name for every Python: the library holds none.
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self):
        nvcc = find_nvcc()
        torch, cpp_extension = load_torch()
        cuda = decide_cuda(torch, nvcc)
        (ops,) = self.extensions
        archs = add_cuda(ops, torch, cpp_extension, nvcc, cuda) if cuda else []
        ops.include_dirs += cpp_extension.include_paths()
        ops.library_dirs += cpp_extension.library_paths()

        class Builder(cpp_extension.BuildExtension):
            get_ext_filename = BuildLibrary.get_ext_filename

        # ninja may be installed beside a python that runs from an environment that is not activated.
        os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)
        builder = Builder(self.distribution)
        vars(builder).update(vars(self))  # what the command line and pip have set
        builder.force = True  # ninja knows what is out of date
        # That of another build, copied with the sources: it would vouch for a library that was never finished.
        Path(self.build_lib, "fusednorm", "_built_for.py").unlink(missing_ok=True)
        try:
            builder.run()
        except RuntimeError as error:  # the compiler has said why; torch's traceback would push that off the screen
            sys.exit(f"fusednorm's operators do not compile: {error}")
        record = f"TORCH = {str(torch.__version__)!r}\nCUDA = {cuda!r}\nCUDA_ARCHITECTURES = {tuple(archs)!r}\n"
        for root in [self.build_lib] + ["."] * self.inplace:
            Path(root, "fusednorm", "_built_for.py").write_text(record)


def operators():
    sanitized = SANITIZED if os.environ.get("FUSEDNORM_SANITIZE") == "1" else []
    return Extension(
        "fusednorm._ops",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],  # ninja runs elsewhere
        libraries=["c10", "torch", "torch_cpu"],
        extra_compile_args=FLAGS + sanitized,
        extra_link_args=["-fopenmp"] + sanitized[:1],
        language="c++",
    )


def named_after_torch():
    """The package's version and what it requires. A wheel runs with the torch that it was built for alone: its version
    tells that one (0.1.0+torch2.13.0.cpu), so that no cache can hand it to another, and so does what it requires, so
    that pip picks among wheels."""
    any_torch = VERSION, f"torch>={'.'.join(map(str, OLDEST_TORCH))}"
    if "sdist" in sys.argv:
        return any_torch
    found = importlib.util.find_spec("torch")
    if not (found and found.origin):  # reading the metadata needs none
        return any_torch
    # torch's own file of it and not torch, which takes seconds.
    torch_version = runpy.run_path(str(Path(found.origin).with_name("version.py")))["__version__"]
    try:
        required = f"torch=={metadata.version('torch')}"  # pip's word: torch's own may have +cu130 behind it
    except metadata.PackageNotFoundError:
        required = any_torch[1]
    return f"{VERSION}+torch{torch_version.replace('+', '.')}", required


version, required = named_after_torch()
setup(
    version=version,
    install_requires=[required],
    license="MIT",
    ext_modules=[operators()],
    cmdclass={"build_ext": BuildLibrary},
    # Of Python's C interface the library uses nothing. Free-threaded Pythons take no wheel that says so.
    options={} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
