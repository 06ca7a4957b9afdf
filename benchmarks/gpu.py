"""`make gpu OUT=dir`: build if need be, test and measure on this machine's GPU, in under nine minutes, with no network.

The essential comes first, each part is a process of its own with a time limit, and all that a part finds is in `dir`
as soon as it is found: a run that is cut off, or a part that fails, costs only what it had not done. The exit status is
0 when every part passed. Nothing outside the standard library is imported here.

    report.txt   the parts and how they went, the table of figures with their targets
    results.json all figures; speed.png a picture of them
    check.txt    the quick check;  tests.txt  pytest on the GPU;  sanitizer.txt  compute-sanitizer
    build.txt    the compiler's output, if it ran;  bench.txt  what the measuring said
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 510.0  # seconds, all parts
GRACE = 10.0  # seconds from the interrupt to the kill
MOST_TEXT = 8 << 20  # bytes of one log

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

    def run(self, command: list[str], log: Path, limit: float, **environment: str) -> int:
        """Runs with its output appended to `log`. 124: it was out of time; 137: it hung, too, and had to be killed."""
        with open(log, "ab") as sink:
            sink.write(f"\n$ {' '.join(command)[:2000]}\n".encode())
            sink.flush()
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment(**environment),
                start_new_session=True,
            )
            try:
                return child.wait(timeout=max(1.0, limit))
            except subprocess.TimeoutExpired:
                # pytest ends with its summary on an interrupt. The whole group: a test runner has workers.
                code = 137
                for sent, grace in ((signal.SIGINT, GRACE), (signal.SIGKILL, 10)):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, sent)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(timeout=grace)
                        code = 124 if sent == signal.SIGINT else 137
                        break
                with contextlib.suppress(ProcessLookupError):  # what it may have left behind
                    os.killpg(child.pid, signal.SIGKILL)
                sink.write(f"\nstopped after {limit:.0f} s\n".encode())
                return code
            finally:
                self.shorten(log)

    @staticmethod
    def shorten(log: Path) -> None:
        size = log.stat().st_size
        if size > MOST_TEXT:
            with open(log, "rb") as source:
                head = source.read(MOST_TEXT // 4)
                source.seek(size - MOST_TEXT // 2)
                tail = source.read()
            log.write_bytes(head + b"\n... cut here ...\n" + tail)

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
        part.status = "ok" if code == 0 else "cut off" if code == 124 else "FAILED"
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

    def check(self) -> None:
        log = self.out / "check.txt"
        seconds = 2 if self.dry else 45
        command = self.python("-m", "benchmarks.gpu_check", f"--seconds={seconds}", *["--dry-run"] * self.dry)
        with self.part("quick check") as part:
            self.judge(part, self.run(command, log, min(90.0, self.left())), log, "calls,")

    def measure(self, stage: str, seconds: float) -> None:
        """A stage of the benchmark. A process that dies is started again, behind the row that it died at."""
        log, results = self.out / "bench.txt", self.out / "results.json"
        with self.part(f"benchmark, {stage} rows") as part:
            end = time.monotonic() + min(seconds, self.left() - 5)
            part.status, code = "ok", 1
            for attempt in range(4):
                remaining = end - time.monotonic()
                if remaining < 15:
                    if attempt == 0:
                        part.status = "not run"
                    part.notes.append("no time left")
                    break
                command = self.python("-m", "benchmarks.gpu_measure", f"--stage={stage}", f"--json={results}")
                command += [f"--seconds={remaining - 12:.0f}", *["--dry-run"] * self.dry]
                # The last row may run over: it is stopped with the time that the whole run has.
                code = self.run(command, log, min(remaining + 20, self.left()))
                if code in (0, 1, 124, 137):
                    break
                part.notes.append(f"the process ended with status {code}; going on behind the row it was at")
                part.status = "FAILED"
            if code == 124 and part.status == "ok":
                part.status = "cut off"
            elif code:
                part.status = "FAILED" if part.status == "ok" else part.status
                part.notes += self.last(log, 3, "FAILED") or self.last(log, 1)
            part.notes += self.last(log, 1, "not reached")
            self.show(part)

    def show(self, part: Part) -> None:
        """The report's table and the picture, from what there is."""
        results = self.out / "results.json"
        if not results.exists():
            return
        table = self.out / "report.txt"
        command = self.python("-m", "benchmarks.gpu_report", str(results))
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=self.environment(), check=False, timeout=60
        )
        self.table = done.stdout if done.returncode == 0 else ""
        if done.returncode:
            part.notes.append(f"no table: {done.stderr.strip().splitlines()[-1:]}")
        self.report()
        assert table.exists()
        if importlib.util.find_spec("matplotlib") is None:
            part.notes.append("no picture: matplotlib is missing")
            return
        command.append(f"--png={self.out / 'speed.png'}")
        code = self.run(command, self.out / "bench.txt", 60) if self.left() > 10 or self.dry else 0
        if code:
            part.notes.append("no picture, see bench.txt")

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
                whole = code != 124 or " failed" in summary[0]
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
                    if "SUMMARY" in said or code in (124, 137):
                        break
                else:
                    part.status = "skipped"
                    part.notes.append(f"the tool does not work here: {self.last(log)}")
                    continue
                if part.notes:
                    continue
                clean = any(text in said for text in CLEAN)
                cut = code in (124, 137) and (clean or "SUMMARY" not in said)
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
    parser.add_argument("--only", action="append", default=[], metavar="PART", choices=PARTS, help="/".join(PARTS))
    parser.add_argument("--dry-run", action="store_true", help="every part on the CPU with tiny sizes: no figures")
    args = parser.parse_args(arguments)
    driver = Driver(args)
    for old in ("results.json", "report.txt", "tests.txt", "check.txt", "sanitizer.txt", "build.txt", "bench.txt"):
        (driver.out / old).unlink(missing_ok=True)

    if driver.library():
        wanted = set(args.only or PARTS)
        # In this order: what a run that is cut off should have.
        steps = (
            ("check", driver.check),
            ("main", lambda: driver.measure("main", 165)),
            ("small", lambda: driver.measure("small", 45)),
            ("tests", lambda: driver.tests(160)),
            ("sanitizer", lambda: driver.sanitizer(60)),
            ("rest", lambda: driver.measure("rest", driver.left() - 8)),
            ("orders", lambda: driver.measure("orders", driver.left() - 8)),
        )
        for name, step in steps:
            if name in wanted:
                step()
    driver.report()
    print(f"\n{driver.table[:9000]}" if driver.table else "\nno figures")
    print("\n".join(map(str, driver.parts)))
    print(f"{time.monotonic() - driver.start:.0f} s in all; results in {driver.out}")
    return 0 if all(part.status in ("ok", "skipped", "cut off") for part in driver.parts) else 1


PARTS = ("check", "main", "small", "tests", "sanitizer", "rest", "orders")

if __name__ == "__main__":
    sys.exit(main())
