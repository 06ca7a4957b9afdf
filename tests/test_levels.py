"""One library for every x86-64: each level gives the same masks and right results, and none leaks into plain code."""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusednorm
from fusednorm import _library

TESTS = Path(__file__).parent
LEVELS = ("default", "avx2", "avx512")
NATIVE = {"DEFAULT": "default", "AVX2": "avx2", "AVX512": "avx512"}.get(torch.backends.cpu.get_cpu_capability())

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64") or NATIVE is None, reason="only x86-64 has levels"
    ),
]


def environment(level):
    """For a child at another level, which finds the same package as this process."""
    package = str(Path(fusednorm.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return os.environ | {"ATEN_CPU_CAPABILITY": level, "PYTHONPATH": path}


def lower_levels():
    return LEVELS[: LEVELS.index(NATIVE)] if NATIVE else ()


PROBE = """
import hashlib, sys
import torch, fusednorm
from fusednorm import _hooks, functional

masks, values = hashlib.sha256(), []
for shape in ((5, 33), (3, 7, 49), (2, 100, 3, 3), (4001, 3), (2, 2, 30000)):
    for granularity in ("element", "channel"):
        m = fusednorm.noise(shape, 0.3, seed=-17, granularity=granularity)
        masks.update(m.numpy().tobytes())
        for kind in ("uniform", "gaussian"):
            m = fusednorm.noise(shape, 0.3, seed=-17, kind=kind, granularity=granularity)
            masks.update(m.numpy().tobytes())
        for last in (False, True):
            x = torch.sin(torch.arange(m.numel(), dtype=torch.float32)).reshape(shape)
            x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
            y = functional.batch_norm_act_drop(x, None, None, training=True, p=0.3, granularity=granularity, seed=-17)
            masks.update((y != 0).numpy().tobytes())
            for act in functional.activations():
                for dtype in (torch.float32, torch.bfloat16):
                    y = functional.batch_norm_act_drop(
                        x.to(dtype), None, None, training=True, act=act, p=0.3, granularity=granularity, seed=-17
                    )
                    values.append(y.float().reshape(-1))
torch.save((_hooks.level(), masks.hexdigest(), torch.cat(values)), sys.argv[1])
"""


@functools.cache
def probe(level, folder):
    """The level in use, a hash of masks, and results of every activation, from a child process."""
    file = folder / f"{level}.pt"
    subprocess.run([sys.executable, "-c", PROBE, str(file)], check=True, env=environment(level), timeout=300)
    return torch.load(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("levels")


@pytest.mark.parametrize("level", LEVELS)
def test_level_follows_torch(level, folder):
    """ATEN_CPU_CAPABILITY is obeyed downwards and clamped to what the processor has: more must not crash."""
    used = probe(level, folder)[0]
    assert used == LEVELS[min(LEVELS.index(level), LEVELS.index(NATIVE))] or os.environ.get("ATEN_CPU_CAPABILITY")


@pytest.mark.parametrize("level", lower_levels())
def test_levels_agree(level, folder):
    """The noise to the last bit, Gaussian draws too; the values to a few units in the last place: not all have FMA."""
    _, masks, values = probe(level, folder)
    _, native_masks, native_values = probe(NATIVE, folder)
    assert masks == native_masks
    torch.testing.assert_close(values, native_values, rtol=1e-2, atol=1e-2)
    close = (values - native_values).abs() <= 1e-5 * (1 + native_values.abs())
    # The bfloat16 half may round to the neighbour now and then.
    assert close.float().mean() > 0.99


KERNEL_TESTS = sorted(path.name for path in TESTS.glob("test_*.py") if "mark.kernel" in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("file", [name for name in KERNEL_TESTS if name != Path(__file__).name])
@pytest.mark.parametrize("level", lower_levels())
def test_kernels_at_lower_levels(level, file):
    """The tests marked `kernel`, once more."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "kernel", "-p", "no:cacheprovider", str(TESTS / file)]
    child = subprocess.run(command, env=environment(level), capture_output=True, text=True, timeout=900)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]


# Instructions that a plain x86-64 lacks: everything VEX- or EVEX-encoded (a mnemonic with v, and the mask registers'
# with k), FMA among them, and the bit manipulation sets that compilers use of their own accord.
BEYOND_BASELINE = re.compile(
    r"v(?!err|erw|mcall|mlaunch|mxoff|mxon|mread|mwrite)[a-z0-9]+|k(?:mov|and|or|xor|not|test|shift|unpck|add|xnor)[a-z]*"
    r"|(?:shlx|shrx|sarx|rorx|mulx|pdep|pext|bzhi|andn|bextr|blsr|blsi|blsmsk)[lq]?"
)
OWN_LEVEL = re.compile(r"4avx2|6avx512")


def instructions(library):
    """(symbol, mnemonic) of every instruction in the library."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)], check=True, capture_output=True, text=True
    ).stdout
    symbol = None
    for line in text.splitlines():
        if line.endswith(">:"):
            symbol = line.split("<", 1)[1][:-2]
        elif "\t" in line:
            words = line.split("\t", 1)[1].split()
            # Prefixes stand before the mnemonic.
            while words and words[0] in ("lock", "rep", "repz", "repnz", "notrack", "bnd", "data16", "cs", "ds"):
                words.pop(0)
            if words:
                yield symbol, words[0]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_no_leak_into_plain_code():
    """An inline function of torch's or of the standard library that was compiled for a level is one symbol for the
    whole process: the linker may keep that copy, and an older processor dies of it. So every instruction beyond x86-64
    must belong to a function whose name carries its level's namespace."""
    leaks, levelled = {}, set()
    for symbol, mnemonic in instructions(_library.ops_path):
        if BEYOND_BASELINE.fullmatch(mnemonic):
            if OWN_LEVEL.search(symbol or ""):
                levelled.add(symbol)
            else:
                leaks.setdefault(symbol, mnemonic)
    assert not leaks, f"{len(leaks)} functions: {dict(list(leaks.items())[:20])}"
    assert levelled, "no function of any level: the library is stripped, or this test reads it wrong"


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-user")
@pytest.mark.parametrize("processor", ["Nehalem", "Haswell"])
def test_old_processors(processor, tmp_path):
    file = tmp_path / "probe.pt"
    subprocess.run(
        ["qemu-x86_64", "-cpu", processor, sys.executable, "-c", PROBE, str(file)],
        check=True,
        env=environment("default"),
        timeout=600,
    )
    assert torch.load(file)[1]
