"""The kernels' machine code as a listing, and the program that executes it."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_host.compiling import COMPILER, FLAGS, SOURCES, UNITS, call, copy_sources

HERE = Path(__file__).resolve().parent
ARCHITECTURE = "sm_90"
EXECUTOR = ("code", "warp", "integer", "floating", "memory", "control", "machine", "launch", "counts")
# Rounding changes while it runs, and multiply-adds are those of the listing.
EXECUTOR_FLAGS = ["-std=c++20", "-O2", "-w", "-frounding-math", "-ffp-contract=off"]


def tool(name):
    """The path of one of CUDA's tools: from the toolkit, from NVIDIA's packages, or the one that Triton brings."""
    places = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    for package, inside in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            places += map(str, sorted(Path(root).glob(inside)))
    return shutil.which(name, path=os.pathsep.join(places))


def nvcc_flags():
    """Those that the library is compiled with."""
    text = (SOURCES.parent / "setup.py").read_text()
    flags = ast.literal_eval(re.search(r"^NVCC_FLAGS = (\[.*\])$", text, re.M)[1])
    return [flag for flag in flags if not flag.startswith("-Xcompiler")]


def disassembled(cubin):
    """The listing of a file of machine code, beside it."""
    listing = cubin.with_suffix(".sass")
    with open(listing, "w") as to:
        subprocess.run([tool("nvdisasm"), str(cubin)], stdout=to, check=True)
    return listing


def compiled(source, room):
    """The listing of what nvcc makes of a source file."""
    cubin = room / f"{source.stem}.cubin"
    command = [tool("nvcc"), f"-arch={ARCHITECTURE}", "-cubin", "-std=c++17", *nvcc_flags(), "-o", cubin, source]
    child = call(command, timeout=1200)
    assert child.returncode == 0, child.stderr.decode()[-4000:]
    return disassembled(cubin)


def listings(library, room):
    """All kernels' machine code: what a library holds, or if there is none, of that architecture, what nvcc makes."""
    if library:
        command = [tool("cuobjdump"), "-xelf", ARCHITECTURE, str(Path(library).resolve())]
        subprocess.run(command, cwd=room, check=True, capture_output=True)
    with ThreadPoolExecutor(2) as pool:
        if cubins := sorted(room.glob("*.cubin")):
            return list(pool.map(disassembled, cubins))
        return list(pool.map(lambda unit: compiled(SOURCES / "cuda" / f"{unit}.cu", room), UNITS))


def symbols(listing):
    """The kernels in a listing, as the linker has them."""
    return re.findall(r"^\.text\.(\w+):$", listing.read_text(), re.MULTILINE)


def spelled(names):
    """By symbol, as the source spells them, and the executor: channels_first_apply<float,4>."""
    names = list(names)
    text = call(["c++filt"], input="\n".join(names).encode()).stdout.decode()
    words = [re.sub(r"^void |\(.*$|\s|fusednorm::cuda::", "", line) for line in text.splitlines()]
    words = [word.replace("__nv_bfloat16", "BFloat16").replace("__half", "Float16") for word in words]
    return dict(zip(names, words, strict=True))


def executor(room):
    """The program of tests/cuda_host with an executor of machine code in the place of its fibers."""
    tree = copy_sources(room / "csrc")
    for file in HERE.glob("*.[ch]*"):
        to = tree / "cuda_machine" / file.name
        to.parent.mkdir(exist_ok=True)
        shutil.copy(file, to)
    jobs = [([*FLAGS, "-O0", "-x", "c++"], tree / "cuda" / f"{unit}.cu") for unit in UNITS]
    jobs += [([*FLAGS, "-O1"], tree / "cuda" / "main.cpp")]
    jobs += [(EXECUTOR_FLAGS, tree / "cuda_machine" / f"{name}.cpp") for name in EXECUTOR]

    def compile_one(job):
        flags, source = job
        to = room / f"{source.stem}.o"
        child = call([COMPILER, *flags, "-c", source, "-o", to])
        assert child.returncode == 0, child.stderr.decode()[-4000:]
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    program = room / "cuda_machine"
    # -rdynamic: kernels are found by the names of the functions that are launched.
    child = call([COMPILER, "-rdynamic", *objects, "-ldl", "-o", program])
    assert child.returncode == 0, child.stderr.decode()[-4000:]
    return program
