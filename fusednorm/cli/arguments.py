"""The commands' arguments and what `--help` says of them. Knows nothing of torch, which takes a second to import."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__

DTYPES = ("float32", "float64", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line that begins with the argument as it was written."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message.removeprefix('argument ')}\n")


def _integers(least: int, most: int, words: str) -> Callable[[str], tuple[int, ...]]:
    def read(text: str) -> tuple[int, ...]:
        parts = text.split(",")
        # isdecimal and not int(), which takes "1_0" and " 1" as well; ten digits are more than any size.
        if not least <= len(parts) <= most or not all(p.isascii() and p.isdecimal() and len(p) < 10 for p in parts):
            raise argparse.ArgumentTypeError(f"expected {words}, but got {text!r}")
        if any(int(part) == 0 for part in parts):
            raise argparse.ArgumentTypeError(f"expected sizes of 1 and more, but got {text!r}")
        return tuple(int(part) for part in parts)

    return read


def _number(least: float, most: float, words: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:  # nor is NaN
            raise argparse.ArgumentTypeError(f"expected {words}, but got {text!r}")
        return value

    return read


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"expected an integer between 1 and 4096, but got {text!r}")
    return int(text)


def _name(text: str) -> str:
    module, colon, name = text.partition(":")
    if not (module and colon and name) or not all(part.isidentifier() for part in f"{module}.{name}".split(".")):
        raise argparse.ArgumentTypeError(f"expected package.module:factory, but got {text!r}")
    return text


INFO = """\
examples:
  %(prog)s
  %(prog)s --json | python -m json.tool

exit status: 0 if the operators are usable, 1 if not

--json gives usable, fusednorm, path, python, executable, torch,
torch_built_for, system, cpu, logical_cpus, threads, cuda (kernels, nvcc,
architectures, gpu, capability), level (in_use, supported, compiled, asked),
built_with, torch_compile (usable, compiler, headers) and missing; null stands
for what is not known.
"""

DOCTOR = """\
Each check says what was expected, what was found, and what to do if that is
not the same. "absent" is what this machine has not, and fusednorm can do
without; it is no failure. Where there is a GPU, and the library has CUDA
kernels, the same answers are asked of it; those who made these kernels have
not run them on one.

examples:
  %(prog)s
  %(prog)s --json
  OMP_NUM_THREADS=1 %(prog)s    # as a worker of yours runs

exit status: 0 if nothing FAILED, 1 if something did

--json gives healthy and checks, a list of name, status (ok, FAILED, absent),
expected, got and advice ("" if there is none).
"""

BENCH = """\
The layer is timed against the stock modules, called one by one and under
torch.compile. They take turns, round by round; a time is the median of the
rounds, with the 20th and 80th percentile, and a ratio is that of times of the
same round. Before, results and gradients are compared with eager's, the noise
off. The verdict compares the fused layer with the fastest of the others: "no
difference beyond noise" where the ratio is below 1 at the one percentile and
above 1 at the other.

The allocator is left as your environment has it. The tables of this project
were measured with GLIBC_TUNABLES set to glibc.malloc.mmap_threshold=4294967296
and glibc.malloc.trim_threshold=17179869184, joined by a colon.

examples:
  %(prog)s --shape 64,64,56,56 --act relu --p 0.1
  %(prog)s --shape 8192,1024 --act gelu,tanh --no-compile
  %(prog)s --shape 8,64,56,56 --order norm-add --eval
  %(prog)s --shape 32,256,800 --p 0.1 --plot layer.png

exit status: 0, or 1 if results are not eager's, or 2 for wrong arguments

--json gives layer, shape, dtype, layout, order, mode, device, cpu, level,
threads, torch, load_average, busy, glibc_tunables, rounds, contestants (of
each name: median_ms, p20_ms, p80_ms, rounds, kept_bytes_per_element), ratio
(of each other name: median, p20, p80 of its time over ours), missing (name:
why it could not run), decision (fuse, leave, even) and verdict.
"""

REPORT = """\
The factory is a function or class that gives a torch.nn.Module without
arguments, or such a module itself. It is looked up from the folder you are in.
With --example a forward is watched, and modules that the model's own code
calls are found; without, only those in an nn.Sequential are. Nothing of yours
is changed: a copy is fused.

examples:
  %(prog)s torchvision.models:vgg11_bn --example 1,3,64,64
  %(prog)s my.nets:make --example 8,1,128 --small always
  %(prog)s my.nets:siamese --example 4,9 --example 4,9

exit status: 0, or 1 if the model fails, or 2 for wrong arguments

--json gives model, norms, fused, rows (name, order, taken, reason), orders
(order: how many), reasons (why not, or no more: how many), dropouts,
kept_bytes (stock, fused; null without --example, or if a training forward
fails) and summary.
"""


def parser() -> argparse.ArgumentParser:
    """Of all commands; what it parses has `command`, None if there is none, and the arguments of that one."""
    started = Path(sys.argv[0]).name if sys.argv else ""
    prog = "fusednorm" if started == "fusednorm" else "python -m fusednorm"
    top = _Parser(
        prog=prog,
        description="BatchNorm, activation and dropout as one operator: what it is and does on this machine.",
        epilog="`COMMAND --help` has examples. Each command takes --json: one object on stdout, and nothing else.",
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    def add(name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        # Options in full: an abbreviation would mean something else once there is another option like it.
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
        return command

    add("info", "versions, backends, CPU level and why, what is missing", INFO)
    add("doctor", "checks that the library computes on this machine what it should", DOCTOR)
    _bench(add("bench", "times a layer of yours against the stock modules", BENCH).add_argument)
    _report(add("report", "says what fuse would do to a model of yours", REPORT).add_argument)
    return top


def _bench(add: Callable[..., Any]) -> None:
    sizes = _integers(2, 5, "two to five integers")
    add("--shape", type=sizes, required=True, metavar="N,C,...", help="of the input: two to five integers")
    add("--act", default="none", metavar="NAME[,PARAMETER...]", help="activation, as relu or leaky_relu,0.2 (none)")
    strength = _number(0, 1e6, "a number of 0 or more")
    add("--p", type=strength, default=0.0, help="of the dropout; beta or alpha of another --noise (0: no noise)")
    add("--noise", choices=("bernoulli", "uniform", "gaussian"), default="bernoulli", help="(bernoulli)")
    add("--granularity", choices=("element", "channel", "sample"), default="element", help="of the noise (element)")
    add("--order", default="norm-act-drop", help="of norm, act, drop and add (norm-act-drop)")
    add("--dtype", choices=DTYPES, default="float32", metavar="TYPE", help=f"{', '.join(DTYPES)} (float32)")
    add("--channels-last", action="store_true", help="channels innermost in memory")
    add("--eval", action="store_true", help="evaluation forwards, not training steps")
    add("--device", default="cpu", help="cpu, cuda or cuda:1 (cpu); the CUDA kernels were not run on a GPU yet")
    add("--threads", type=_count, help="of the CPU (as torch has them)")
    add("--seconds", type=_number(0.1, 3600, "a number between 0.1 and 3600"), default=5.0, help="to measure for (5)")
    add("--no-compile", action="store_true", help="without torch.compile, which takes some seconds to compile")
    add("--plot", type=Path, metavar="FILE", help="draw the times into a .png, .svg or .pdf; needs matplotlib")


def _report(add: Callable[..., Any]) -> None:
    sizes = _integers(1, 8, "one to eight integers")
    add("factory", type=_name, metavar="package.module:factory", help="what gives the model")
    text = "shape of an input, of random values; once for each argument of the model"
    add("--example", type=sizes, action="append", metavar="N,C,...", help=text)
    text = f"of the examples, and unless it is int64 of the model: {', '.join(DTYPES)}, int64 (float32)"
    add("--dtype", choices=(*DTYPES, "int64"), metavar="TYPE", help=text)
    text = "small tensors: time them, fuse always, or never (measure)"
    add("--small", choices=("measure", "always", "never"), default="measure", help=text)
