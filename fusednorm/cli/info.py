"""`info`: what is installed, what is in use and why, what is missing and how to get it."""

import argparse
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from .. import __version__, _hooks, _library
from .output import Line, Outcome

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


def level() -> dict[str, Any]:
    """The level in use and the three things that decide it; of a library that is loaded."""
    flags = cpu_facts()[1]
    return {
        "in_use": _hooks.level(),
        "supported": ["default"] + [name for name, needs in LEVEL_NEEDS.items() if needs <= flags],
        "compiled": _hooks.build_info()["levels"],
        "asked": os.environ.get("ATEN_CPU_CAPABILITY"),
    }


def level_line(facts: dict[str, Any]) -> str:
    asked = facts["asked"]
    return (
        f"{facts['in_use']} (the CPU supports {', '.join(facts['supported'])}; ATEN_CPU_CAPABILITY "
        + (f"asks for {asked}" if asked else "is not set")
        + f"; compiled: {', '.join(facts['compiled'])})"
    )


def cuda(torch: Any) -> dict[str, Any]:
    """Whether the loaded library has CUDA kernels, by what and for what, and which GPU there is to run them."""
    kernels = bool(torch._C._dispatch_has_kernel_for_dispatch_key("fusednorm::forward", "CUDA"))
    told, gpu = _hooks.build_info() if kernels else {}, torch.cuda.is_available()
    return {
        "kernels": kernels,
        "nvcc": told.get("cuda"),
        "architectures": told.get("cuda_architectures"),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
    }


def cuda_line(facts: dict[str, Any], torch: Any) -> str:
    if not facts["kernels"]:
        return "no: built for the CPU only" + ("" if torch.version.cuda else ", as this torch is")
    by = f", by nvcc {facts['nvcc']} for {', '.join(facts['architectures'])}" if facts["nvcc"] else ""
    return f"yes{by}; " + (f"GPU: {facts['gpu']}, {facts['capability']}" if facts["gpu"] else "no GPU is visible")


def cuda_missing(facts: dict[str, Any], torch: Any) -> str | None:
    """What a GPU that is here lacks to be used."""
    if facts["kernels"] or not facts["gpu"]:
        return None
    return f"the CUDA kernels: nvcc of CUDA {torch.version.cuda}, then `FUSEDNORM_CUDA=1 {_library.BUILD}`"


def compiling() -> dict[str, Any]:
    """What torch.compile needs: it compiles C++ that includes Python.h, whatever fusednorm was built with."""
    compiler = shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0])
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return {"usable": bool(compiler and headers), "compiler": compiler, "headers": headers}


def compiling_missing(facts: dict[str, Any]) -> list[str]:
    missing = []
    if not facts["compiler"]:
        missing.append("a C++ compiler, for torch.compile and for building: apt-get install g++")
    if not facts["headers"]:
        missing.append("Python.h, for torch.compile on the CPU: apt-get install python3-dev")
    return missing


def run(_: argparse.Namespace) -> Outcome:
    missing = []
    try:
        _library.load()
        usable = True
    except ImportError as error:
        usable = False
        missing.append(str(error))
    try:
        import torch
    except Exception:  # said above
        torch = None  # type: ignore[assignment]
    facts: dict[str, Any] = {
        "usable": usable,
        "fusednorm": __version__,
        "path": str(_library.ops_path.parent),
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": str(torch.__version__) if torch else None,
        "torch_built_for": _library.built_for(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_facts()[0],
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "cuda": cuda(torch) if usable else None,
        "level": level() if usable else None,
        "built_with": _hooks.build_info() if usable else None,
        "torch_compile": compiling(),
    }
    if usable:
        missing += filter(None, [cuda_missing(facts["cuda"], torch)])
    facts["missing"] = missing + compiling_missing(facts["torch_compile"])
    return Outcome(0 if usable else 1, facts, _lines(facts, torch))


def _lines(facts: dict[str, Any], torch: Any) -> list[Line]:
    usable, compiler = facts["usable"], facts["torch_compile"]
    told = {
        "fusednorm": f"{facts['fusednorm']} ({facts['path']})",
        "Python": f"{facts['python']} ({facts['executable']})",
        "torch": f"running {facts['torch'] or 'not installed'}, "
        f"built for {facts['torch_built_for'] or 'unknown (not built)'}",
        "machine": f"{facts['system']}, {facts['cpu']}, {facts['logical_cpus']} logical CPUs",
    }
    if torch:
        told["threads"] = str(facts["threads"])
    told["backend CPU"] = "yes" if usable else "no, see below"
    told["backend CUDA"] = cuda_line(facts["cuda"], torch) if usable else "no, see below"
    if usable:
        told["CPU level"] = level_line(facts["level"])
    if facts["built_with"]:
        told["built with"] = "{compiler}, C++{cxx_standard}, OpenMP {openmp}".format(**facts["built_with"])
    told["torch.compile"] = (
        f"usable ({compiler['compiler']})" if compiler["usable"] else "not usable on the CPU, see below"
    )
    first, *others = facts["missing"] or ["nothing"]
    return [(f"{name:<14} ", text) for name, text in (told | {"missing": first}).items()] + [
        (" " * 15, text) for text in others
    ]
