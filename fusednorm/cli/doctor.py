"""`doctor`: whether the library computes on this machine what it should, and what to do where it does not."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from .. import _library
from . import info
from .output import Line, Outcome, first_line

OK, FAILED, ABSENT = "ok", "FAILED", "absent"
REBUILD = f"what the library computes here is wrong; build it again: `{_library.BUILD}`"


class Check(NamedTuple):
    """What was looked at, in words; `advice` may stand beside what is ok as well."""

    name: str
    status: str
    expected: str
    got: str
    advice: str = ""


def run(_: argparse.Namespace) -> Outcome:
    checks = list(_checks())
    failed = [check for check in checks if check.status == FAILED]
    lines = [line for check in checks for line in _lines(check)]
    done = sum(check.status == OK for check in checks)
    lines.append(
        ("", f"{len(failed)} of {done + len(failed)} checks failed" if failed else f"all {done} checks passed")
    )
    return Outcome(1 if failed else 0, {"healthy": not failed, "checks": [check._asdict() for check in checks]}, lines)


def _lines(check: Check) -> Iterator[Line]:
    front = f"{check.status:<7} {check.name:<21} "
    yield front, check.got if check.status == ABSENT else f"expected {check.expected}; got {check.got}"
    if check.advice:
        yield " " * len(front), check.advice


def _checks() -> Iterator[Check]:
    try:
        _library.load()
    except ImportError as error:
        yield Check("library", FAILED, "one that loads", first_line(error))
        return
    import torch

    yield Check("library", OK, f"one for torch {torch.__version__}", f"one for {_library.built_for() or 'unknown'}")
    yield _attempted("CPU level", "the best level", _level)
    yield _attempted("threads at work", "all that torch has", _threads)
    yield from _answers("cpu", "")
    yield _compile()
    yield from _gpu(torch)


def _attempted(name: str, expected: str, check: Callable[[], Check]) -> Check:
    """The check; one that raises has failed."""
    try:
        return check()
    except Exception as error:
        return Check(name, FAILED, expected, f"{type(error).__name__}: {first_line(error)}", REBUILD)


def _level() -> Check:
    facts = info.level()
    usable = [name for name in facts["supported"] if name in facts["compiled"]]
    asked, best = facts["asked"], usable[-1]
    if facts["in_use"] == best:
        return Check("CPU level", OK, best, info.level_line(facts))
    if asked == facts["in_use"]:
        slower = f"unset ATEN_CPU_CAPABILITY for {best}, which is faster"
        return Check("CPU level", OK, asked, info.level_line(facts), slower)
    return Check("CPU level", FAILED, best, info.level_line(facts), f"build it again: `{_library.BUILD}`")


def _threads() -> Check:
    import torch

    from . import threads

    name, wanted = "threads at work", torch.get_num_threads()
    processors = threads.processors()
    try:
        counted = threads.at_work(threads.large_call())
    except FileNotFoundError:
        return Check(name, ABSENT, str(wanted), "not counted, as there is no /proc/self/task")
    got = f"{counted}, and {processors:g} processor{'s' if processors != 1 else ''} to run on"
    if counted != wanted:
        limit = "something limits them: OMP_THREAD_LIMIT, OMP_DYNAMIC, or a second OpenMP in this process"
        return Check(name, FAILED, str(wanted), got, limit)
    if wanted < int(processors):
        more = f"OMP_NUM_THREADS or torch.set_num_threads could give it {int(processors)}"
        return Check(name, OK, str(wanted), got, more)
    if wanted > max(1, processors):
        fewer = f"they share processors, and wait for each other: OMP_NUM_THREADS={max(1, int(processors))} is faster"
        return Check(name, OK, str(wanted), got, fewer)
    return Check(name, OK, str(wanted), got)


def _answers(device: str, where: str) -> Iterator[Check]:
    """Known answers of everything that is computed, on one device; `where` goes behind their names."""
    from . import answers

    yield _exact(f"Bernoulli noise{where}", partial(answers.bernoulli, device), 64)
    yield _exact(f"uniform noise{where}", partial(answers.uniform, device), len(answers.DRAWS))
    values = f"{len(answers.NORMAL)} known values"
    yield _close(f"Gaussian noise{where}", partial(answers.gaussian, device), answers.NORMAL_ERROR, values)
    for layout, last in (("NCHW", False), ("NHWC", True)):
        error = partial(answers.gradients, device, last)
        yield _close(f"gradients, {layout}{where}", error, answers.GRADIENT_ERROR, "those of float64")


def _exact(name: str, wrong: Callable[[], int], count: int) -> Check:
    expected = f"{count} known values to the last bit"

    def check() -> Check:
        differ = wrong()
        status, advice = (FAILED, REBUILD) if differ else (OK, "")
        return Check(name, status, expected, str(count - differ), advice)

    return _attempted(name, expected, check)


def _close(name: str, error: Callable[[], float], most: float, what: str) -> Check:
    expected = f"{what} to {most:.0e}"

    def check() -> Check:
        found = error()
        status, advice = (OK, "") if found <= most else (FAILED, REBUILD)  # of a NaN, too
        return Check(name, status, expected, f"{found:.1e}", advice)

    return _attempted(name, expected, check)


def _compile() -> Check:
    facts = info.compiling()
    expected, missing = "a C++ compiler and Python.h", info.compiling_missing(facts)
    if missing:
        return Check("torch.compile", ABSENT, expected, "not usable on the CPU", "missing: " + "; ".join(missing))
    return Check("torch.compile", OK, expected, f"{facts['compiler']} and Python.h")


def _gpu(torch: Any) -> Iterator[Check]:
    facts = info.cuda(torch)
    missing = info.cuda_missing(facts, torch)
    if facts["gpu"] is None:
        yield Check("GPU", ABSENT, "a GPU", "no GPU: not checked")
    elif missing:
        yield Check("GPU", ABSENT, "CUDA kernels", f"{facts['gpu']}: not checked", f"missing: {missing}")
    else:
        yield Check("GPU", OK, "a GPU", f"{facts['gpu']}, {facts['capability']}")
        yield from _answers("cuda", ", GPU")
