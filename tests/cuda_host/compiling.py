"""Compiles the kernels' sources with g++ and runs what comes out."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"
COMPILER = shutil.which("g++")

UNITS = ("float32", "float64", "bfloat16", "float16", "state")
FLAGS = ["-std=c++17", "-g1", "-ffp-contract=off", "-fmax-errors=3", "-w"]
# -O0 where the compiler takes longer than the program.
BUILDS = {
    "plain": ["-O1"],
    "asan": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O0", "-fsanitize=thread"],
}
ENVIRONMENT = os.environ | {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # a stack that is not the thread's is none of LSan's
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
REPORTED = 3  # the exit code of scheduler.cpp's own reports


def call(command, timeout=900, **options):  # who hangs; all cases take minutes on a machine that is busy
    return subprocess.run(
        [str(word) for word in command], capture_output=True, timeout=timeout, env=ENVIRONMENT, **options
    )


def compile_or_fail(*arguments):
    child = call([COMPILER, *FLAGS, *arguments])
    assert child.returncode == 0, child.stderr.decode()[-4000:]


def copy_kernels(to):
    """What the kernels consist of."""
    for folder in ("math", "cuda"):
        shutil.copytree(SOURCES / folder, to / folder)
    shutil.copy(SOURCES / "call.h", to)
    return to


def copy_sources(to):
    """The kernels, with the tests' device.cuh in the place of the real one."""
    copy_kernels(to)
    for pattern in ("*.cpp", "*.h", "*.cuh"):
        for file in HERE.glob(pattern):
            shutil.copy(file, to / "cuda")
    return to


def plant(file, old, new):
    """Changes a line of a source file."""
    words = r"\s+".join(re.escape(word) for word in old.split())  # whatever the formatter does
    text, count = re.subn(words, lambda _: new, file.read_text())
    assert count, f"{file.name} has no longer the text that this mutation changes:\n{old}"
    file.write_text(text)


def fixed_addresses(program):
    """TSan of this age wants memory where it was before kernels spread addresses as widely as they do now."""
    return ["setarch", "-R", program] if shutil.which("setarch") else [program]


def run(build, program, *arguments, **options):
    child = call([*(fixed_addresses(program) if build == "tsan" else [program]), *arguments], **options)
    text = child.stderr.decode(errors="replace")
    if build == "tsan" and ("unexpected memory mapping" in text or "failed to set personality" in text):
        pytest.skip("ThreadSanitizer cannot start here")
    return child.returncode, child.stdout, text
