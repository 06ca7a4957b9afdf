"""`make gpu OUT=dir`: build if need be, test and measure on this machine's GPU, in under nine minutes, with no network.

The essential comes first, each part is a process of its own with a time limit, and all that a part finds is in `dir`
as soon as it is found: a run that is cut off, or a part that fails, costs only what it had not done. A measuring
process that hangs or dies is followed by another, which goes on without the row or the contestant that it was at. The
exit status is 0 when every part passed. Nothing outside the standard library is imported here.

    report.txt   the parts and how they went, the table of figures with their targets
    results.json all figures; speed.png a picture of them
    check.txt    the quick check;  tests.txt  pytest on the GPU;  sanitizer.txt  compute-sanitizer
    build.txt    the compiler's output, if it ran;  bench.txt  what the measuring said
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_process, gpu_results  # noqa: E402
from benchmarks.gpu_process import HUNG, KILLED, OUT_OF_TIME  # noqa: E402

TOTAL = 510.0  # seconds, all parts
LEAST = 15.0  # seconds that a measuring process is worth starting for
LAST_ROW = 8.0  # seconds before its end a stage begins no further row
# Seconds of each part, in order: what a run that is cut off should have comes first. All are scaled to the time that is
# left, so that a build shortens every part and none gets nothing. README.md says what they are spent on, by estimate.
BUDGET = {"check": 40, "main": 150, "small": 35, "tests": 125, "sanitizer": 35, "rest": 60, "orders": 40}

# Prints what the driver needs to know, or fails with the reason: does this library run on this GPU?
PROBE = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
import fusednorm
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((6, 8, 7, 7), (33, 40)):
        x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
        layer = (fusednorm.FusedBatchNorm1d if x.dim() == 2 else fusednorm.FusedBatchNorm2d)
        layer(shape[1], act="relu", drop=0.5, device="cuda")(x).sum().backward()
torch.cuda.synchronize()
print(fusednorm.__file__)
"""
DEVICE = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU here")
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}")
print(torch.cuda.get_device_name())
"""

CLEAN = ("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards")


@dataclass
class Part:
    name: str
    status: str = "not run"  # ok, FAILED, skipped, cut off (no failure seen), not run
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        notes = "".join(f"\n    {note}" for note in self.notes)
        return f"{self.status:8} {self.name}, {self.seconds:.0f} s{notes}"


class Driver:
    def __init__(self, args):
        self.out = Path(args.out).resolve()
        self.dry, self.start, self.total = args.dry_run, time.monotonic(), args.seconds
        self.parts: list[Part] = []
        self.packages = ROOT  # whose fusednorm is used
        self.out.mkdir(parents=True, exist_ok=True)

    # ---- processes ----
    def left(self) -> float:
        return self.total - (time.monotonic() - self.start)

    def environment(self, **more: str) -> dict:
        path = [str(self.packages), str(ROOT), os.environ.get("PYTHONPATH", "")]
        dry = {"OMP_NUM_THREADS": "1"} if self.dry else {}
        fixed = {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(p for p in path if p)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONHASHSEED": "0",  # the workers of pytest must agree on the order of sets
        }
        return os.environ | fixed | dry | more

    def python(self, *arguments: str) -> list[str]:
        # -P: not the current folder first, but the package that was chosen.
        return [sys.executable, "-P", *arguments]

    def run(self, command: list[str], log: Path, limit: float, overdue=None, **environment: str) -> int:
        return gpu_process.run(command, log, limit, overdue, cwd=ROOT, env=self.environment(**environment))

    @staticmethod
    def last(log: Path, count: int = 1, having: str = "") -> list[str]:
        if not log.exists():
            return []
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip() and having in line]
        return lines[-count:]

    # ---- parts ----
    @contextlib.contextmanager
    def part(self, name: str):
        part = Part(name)
        self.parts.append(part)
        print(f"==> {name} ({self.left():.0f} s left)", flush=True)
        start = time.monotonic()
        try:
            yield part
        except Exception as error:
            part.status = "FAILED"
            part.notes.append(f"{type(error).__name__}: {error}")
        part.seconds = time.monotonic() - start
        print(part, flush=True)
        self.report()

    def judge(self, part: Part, code: int, log: Path, having: str = "") -> None:
        part.status = "ok" if code == 0 else "cut off" if code == OUT_OF_TIME else "FAILED"
        if code:
            part.notes.append(f"exit status {code}, see {log.name}")
        part.notes += self.last(log, 1, having)

    def library(self) -> bool:
        """A library that runs on this GPU: one that is here, else built for it."""
        log = self.out / "build.txt"
        if self.dry:
            with self.part("library") as part:
                self.judge(
                    part, self.run(self.python("-c", "import fusednorm; print(fusednorm.__file__)"), log, 60), log
                )
            return part.status == "ok"
        with self.part("library") as part:
            asked = subprocess.run(
                self.python("-c", DEVICE), capture_output=True, text=True, env=self.environment(), timeout=120
            )
            if asked.returncode:
                part.status = "FAILED"
                part.notes.append(asked.stderr.strip().splitlines()[-1] if asked.stderr.strip() else "no torch")
                return False
            capability, name = asked.stdout.split("\n")[:2]
            part.notes.append(f"{name}, compute capability {capability}")
            libraries = [ROOT / "fusednorm" / "_ops.so", *sorted(ROOT.glob("build/cuda*/**/fusednorm/_ops.so"))]
            for library in filter(Path.exists, libraries):
                self.packages = library.parent.parent
                if self.run(self.python("-c", PROBE), log, 60) == 0:
                    part.status = "ok"
                    part.notes.append(f"uses {library.relative_to(ROOT)} as it is")
                    part.notes += [f"its {name} is not this tree's" for name in self.differing()]
                    return True
                part.notes.append(f"{library.relative_to(ROOT)} does not run here: {self.last(log)[0][:300]}")
            self.packages = ROOT
            cores = len(os.sched_getaffinity(0))
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            known = {"FUSEDNORM_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": str(cores)}
            code = self.run(build, log, min(330.0, self.left() - 60), **known)
            if code == 0:
                code = self.run(self.python("-c", PROBE), log, 60)
            self.judge(part, code, log)
            part.notes.append(f"built here for {capability} with {cores} jobs")
            return code == 0

    def differing(self) -> list[str]:
        """Python files of the package in use that are not those of the tree."""
        files = sorted((ROOT / "fusednorm").glob("*.py"))
        files = [file for file in files if file.name != "_built_for.py"]
        theirs = [self.packages / "fusednorm" / file.name for file in files]
        return [
            b.name for a, b in zip(files, theirs, strict=True) if not b.exists() or a.read_bytes() != b.read_bytes()
        ]

    def check(self, seconds: float) -> None:
        log = self.out / "check.txt"
        command = self.python("-m", "benchmarks.gpu_check", f"--seconds={2 if self.dry else seconds:.0f}")
        with self.part("quick check") as part:
            code = self.run(command + ["--dry-run"] * self.dry, log, min(seconds + 25, self.left()))
            self.judge(part, code, log, "calls,")

    def measure(self, stage: str, seconds: float) -> None:
        """A stage of the benchmark. A process that hangs or dies is followed by another one, which goes on without the
        row or the contestant that it was at."""
        log, results = self.out / "bench.txt", self.out / "results.json"
        with self.part(f"benchmark, {stage} rows") as part:
            end = time.monotonic() + min(seconds, self.left() - 5)
            code, barren = None, 0
            while barren < 2:
                remaining = end - time.monotonic()
                if remaining < LEAST:
                    part.notes.append("no time left")
                    break
                watch = gpu_process.Watch(results)
                # The last row may run over: it is stopped with the time that the whole run has.
                limit = min(remaining + 20, self.left())
                code = self.run(self.measuring(stage, remaining - LAST_ROW), log, limit, watch.overdue)
                if code in (0, gpu_results.ROWS_FAILED, OUT_OF_TIME, KILLED):
                    break
                barren = 0 if self.went_on(part, code, watch, results) else barren + 1
            gpu_results.Place(results).forget()
            if code is not None and part.status == "not run":
                part.status = {0: "ok", OUT_OF_TIME: "cut off"}.get(code, "FAILED")
            if part.status == "FAILED":
                part.notes += self.last(log, 3, "FAILED") or self.last(log, 1)
            part.notes += self.last(log, 1, "not reached")
            self.show(part)

    def measuring(self, stage: str, seconds: float) -> list[str]:
        options = [f"--stage={stage}", f"--json={self.out / 'results.json'}", f"--seconds={seconds:.0f}"]
        return self.python("-m", "benchmarks.gpu_measure", *options, *["--dry-run"] * self.dry)

    def went_on(self, part: Part, code: int, watch: gpu_process.Watch, results: Path) -> bool:
        """Notes how a measuring process ended; whether it had come to a row that the next one need not meet."""
        part.status = "FAILED"
        if code == gpu_results.LOST:  # it has written down why itself
            part.notes += self.last(self.out / "bench.txt", 1, "lost")
            return True
        why = watch.why if code == HUNG else f"the process ended with status {code}"
        said = gpu_results.ended(results, why, code == HUNG)
        part.notes.append(said or f"{why}, at no row")
        return said is not None

    def show(self, part: Part) -> None:
        """The report's table and the picture, from what there is."""
        results = self.out / "results.json"
        if not results.exists():
            return
        command = self.python("-m", "benchmarks.gpu_report", str(results))
        if importlib.util.find_spec("matplotlib") is None:
            part.notes.append("no picture: matplotlib is missing")
        else:
            command.append(f"--png={self.out / 'speed.png'}")
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=self.environment(), check=False, timeout=60
        )
        self.table = done.stdout  # all of it, before the picture is begun
        if done.returncode:
            part.notes.append(f"the report ended with {done.stderr.strip().splitlines()[-1:]}")

    def tests(self, seconds: float) -> None:
        log = self.out / "tests.txt"
        if importlib.util.find_spec("pytest") is None:
            with self.part("tests") as part:
                part.status = "skipped"
                part.notes.append("pytest is missing; the quick check has run")
            return
        pytest = self.python("-m", "pytest", "-q", "--tb=short", "-rfE", "-p", "no:cacheprovider", "--maxfail=60")
        # Most tests wait for small launches, so several processes share the GPU where pytest can do that.
        spread = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        end = time.monotonic() + min(seconds, self.left())
        where = str(ROOT / "tests")
        no_gpu = [f"--ignore-glob={where}/test_{name}*" for name in ("build", "cuda_host", "gpu_benchmark")]
        runs = (
            ("CPU and GPU side by side", [f"{where}/test_cuda.py", "-m", "not slow", *spread], {}),
            ("the large and the compiled", [f"{where}/test_cuda.py", "-m", "slow"], {}),
            ("the suite on the GPU", [where, *no_gpu, *spread], {"FUSEDNORM_TEST_DEVICE": "cuda"}),
        )
        if self.dry:
            runs = (("a sample", [f"{where}/test_noise.py", "-k", "test_draw_seed"], {}),)
        for name, arguments, environment in runs:
            with self.part(f"tests: {name}") as part:
                remaining = end - time.monotonic()
                if remaining < 10:
                    part.notes.append("no time left")
                    continue
                code = self.run(pytest + arguments, log, remaining, **environment)
                summary = self.last(log, 1, " passed") or self.last(log, 1)
                whole = code != OUT_OF_TIME or " failed" in summary[0]
                part.status = "ok" if code == 0 else "FAILED" if whole else "cut off"
                part.notes += summary
                part.notes += self.last(log, 8, "FAILED ") if part.status == "FAILED" else []

    def sanitizer(self, seconds: float) -> None:
        log = self.out / "sanitizer.txt"
        tool = shutil.which("compute-sanitizer") or next(
            (str(p) for p in map(Path, ("/usr/local/cuda/bin/compute-sanitizer",)) if p.exists()), None
        )
        end = time.monotonic() + min(seconds, self.left())
        script = self.python("-m", "benchmarks.gpu_check", "--short", *["--dry-run"] * self.dry)
        for check in ("memcheck", "racecheck"):
            with self.part(f"compute-sanitizer {check}") as part:
                if tool is None:
                    part.status = "skipped"
                    part.notes.append("compute-sanitizer is not here")
                    continue
                # Only this library's kernels; the option's spelling has changed between releases.
                for only in (["--kernel-name", "kns=fusednorm"], ["--kernel-regex", "kns=fusednorm"], []):
                    remaining = (end - time.monotonic()) / (2 if check == "memcheck" else 1)
                    if remaining < 10:
                        part.notes.append("no time left")
                        break
                    mark = log.stat().st_size if log.exists() else 0
                    command = [tool, "--tool", check, *only, "--print-limit", "20", "--error-exitcode", "9"]
                    command += ["--report-api-errors", "no"] if check == "memcheck" else []
                    code = self.run(command + script, log, remaining, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
                    said = log.read_bytes()[mark:].decode(errors="replace")
                    if "SUMMARY" in said or code in (OUT_OF_TIME, KILLED):
                        break
                else:
                    part.status = "skipped"
                    part.notes.append(f"the tool does not work here: {self.last(log)}")
                    continue
                if part.notes:
                    continue
                clean = any(text in said for text in CLEAN)
                cut = code in (OUT_OF_TIME, KILLED) and (clean or "SUMMARY" not in said)
                part.status = "ok" if clean and code == 0 else "cut off" if cut else "FAILED"
                part.notes += [line for line in said.splitlines() if "SUMMARY" in line or "calls," in line][-2:]

    # ---- the report ----
    table = ""

    def report(self) -> None:
        spent = time.monotonic() - self.start
        lines = [f"make gpu: {spent:.0f} s so far", *map(str, self.parts), "", self.table]
        (self.out / "report.txt").write_text("\n".join(lines))


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the results, made if it is not there")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all parts together")
    parser.add_argument("--only", action="append", default=[], metavar="PART", choices=BUDGET, help="/".join(BUDGET))
    parser.add_argument("--dry-run", action="store_true", help="every part on the CPU with tiny sizes: no figures")
    args = parser.parse_args(arguments)
    driver = Driver(args)
    for old in ("results.json", "report.txt", "tests.txt", "check.txt", "sanitizer.txt", "build.txt", "bench.txt"):
        (driver.out / old).unlink(missing_ok=True)

    if driver.library():
        steps = {"check": driver.check, "tests": driver.tests, "sanitizer": driver.sanitizer}
        wanted = [name for name in BUDGET if name in (args.only or BUDGET)]
        for i, name in enumerate(wanted):
            share = BUDGET[name] / sum(BUDGET[other] for other in wanted[i:])
            steps.get(name, functools.partial(driver.measure, name))(share * driver.left())
    driver.report()
    print(f"\n{driver.table[:9000]}" if driver.table else "\nno figures")
    print("\n".join(map(str, driver.parts)))
    print(f"{time.monotonic() - driver.start:.0f} s in all; results in {driver.out}")
    return 0 if all(part.status in ("ok", "skipped", "cut off") for part in driver.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
