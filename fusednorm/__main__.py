"""`python -m fusednorm info`: what is installed, what is in use and why, what is missing and how to get it."""

import argparse
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from . import __version__, _hooks, _library

# What a level asks of the processor: the features that torch checks before it picks the level of the same name.
LEVEL_NEEDS = {"avx2": {"avx2", "fma"}, "avx512": {"avx2", "fma", "avx512f", "avx512vl", "avx512bw", "avx512dq"}}


def cpu_facts() -> tuple[str, set[str]]:
    """The processor's name and its feature flags, as far as the system tells."""
    facts = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
    name = facts.get("model name") or platform.processor() or "unknown processor"
    return name, set(facts.get("flags", "").split())


def level_line(flags: set[str]) -> str:
    """The level in use and the three things that decide it."""
    supported = ["default"] + [level for level, needs in LEVEL_NEEDS.items() if needs <= flags]
    override = os.environ.get("ATEN_CPU_CAPABILITY")
    return (
        f"{_hooks.level()} (the CPU supports {', '.join(supported)}; ATEN_CPU_CAPABILITY "
        + (f"asks for {override}" if override else "is not set")
        + f"; compiled: {', '.join(_hooks.build_info()['levels'])})"
    )


def has_cuda_kernels(torch: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("fusednorm::forward", "CUDA"))


def cuda_line(torch: Any) -> str:
    """Whether the loaded library has CUDA kernels, for what, and which GPU there is to run them."""
    if not has_cuda_kernels(torch):
        return "no: built for the CPU only" + ("" if torch.version.cuda else ", as this torch is")
    facts = _hooks.build_info()
    build = f"yes, by nvcc {facts['cuda']} for {', '.join(facts['cuda_architectures'])}"
    if not torch.cuda.is_available():
        return f"{build}; no GPU is visible"
    return "{}; GPU: {}, {}.{}".format(build, torch.cuda.get_device_name(), *torch.cuda.get_device_capability())


def info() -> int:
    """Prints the report; returns 0 if the operators are usable and 1 otherwise."""
    missing = []

    def line(name: str, value: str) -> None:
        print(f"{name:<14} {value}")

    try:
        _library.load()
        failure = None
    except ImportError as error:
        failure = str(error)
        missing.append(failure)
    try:
        import torch
    except ImportError:
        torch = None  # type: ignore[assignment]

    cpu, flags = cpu_facts()
    running = torch.__version__ if torch else "not installed"
    line("fusednorm", f"{__version__} ({Path(__file__).parent})")
    line("Python", f"{platform.python_version()} ({sys.executable})")
    line("torch", f"running {running}, built for {_library.built_for() or 'unknown (not built)'}")
    line("machine", f"{platform.system()} {platform.machine()}, {cpu}, {os.cpu_count()} logical CPUs")
    if torch:
        line("threads", str(torch.get_num_threads()))
    line("backend CPU", "no, see below" if failure else "yes")
    line("backend CUDA", "no, see below" if failure else cuda_line(torch))
    if not failure:
        line("CPU level", level_line(flags))
        line("built with", "{compiler}, C++{cxx_standard}, OpenMP {openmp}".format(**_hooks.build_info()))

    if not failure and torch.cuda.is_available() and not has_cuda_kernels(torch):
        missing.append(f"the CUDA kernels: nvcc of CUDA {torch.version.cuda}, then `FUSEDNORM_CUDA=1 {_library.BUILD}`")
    # torch.compile compiles C++ that includes Python.h, whatever fusednorm was built with.
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if not compiler:
        missing.append("a C++ compiler, for torch.compile and for building: apt-get install g++")
    if not headers:
        missing.append("Python.h, for torch.compile on the CPU: apt-get install python3-dev")
    line("torch.compile", f"usable ({compiler})" if compiler and headers else "not usable on the CPU, see below")
    line("missing", "\n               ".join(missing) or "nothing")
    return 1 if failure else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fusednorm", description="Reports on this installation.")
    commands = parser.add_subparsers(title="commands")
    command = commands.add_parser("info", help="versions, backends, CPU level and why, what is missing")
    command.set_defaults(run=info)
    arguments = parser.parse_args()
    if "run" not in arguments:
        parser.print_help()
        return 0
    return int(arguments.run())


if __name__ == "__main__":
    sys.exit(main())
