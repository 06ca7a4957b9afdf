"""Run the benchmarks and show them: `python benchmarks/run.py [--quick]`.

Drives pytest in this process, shows progress, then prints the table, and writes JSON and plots where asked. On an
AVX-512 machine one row is measured again in a second process that torch is told to treat as AVX2 (the level is read
once, at start). The exit code is not 0 when a row failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine  # noqa: E402  (found through the line above)

AVX2_ROW = "cnn_f32"
MODES = ("forward", "backward", "both", "eval", "both_cold")
TOGETHER = 24  # rows of the census in one process


def options(arguments=None):
    parser = argparse.ArgumentParser(description="Benchmarks of fusednorm against eager PyTorch and torch.compile.")
    parser.add_argument("--quick", action="store_true", help="headline rows, forward+backward: minutes")
    parser.add_argument("--family", action="store_true", help="the orders and noises only")
    parser.add_argument("--census", action="store_true", help="the layers counted in public models only")
    parser.add_argument("--cold", action="store_true", help="the headline and the census with cold caches, too")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this workload (repeatable)")
    parser.add_argument("--mode", action="append", default=[], choices=MODES, help="this mode (repeatable)")
    parser.add_argument("--own-p", action="store_true", help="leave out the rows at p = 0")
    parser.add_argument("--rivals", action="store_true", help="oneDNN beside ours at p = 0 (`make rivals` builds it)")
    parser.add_argument("--json", metavar="F", help="write the rows and the machine's facts")
    parser.add_argument("--plots", metavar="DIR", help="write speed.png and saved.png, or census.png")
    parser.add_argument("--benchmark-json", metavar="F", help="write pytest-benchmark's own file, with every round")
    parser.add_argument("--force", action="store_true", help="run although the machine is busy")
    parser.add_argument("--no-avx2", action="store_true", help="leave out the row at a forced AVX2 level")
    parser.add_argument("--show", metavar="F", help="measure nothing: show and plot an earlier --json")
    return parser.parse_args(arguments)


class Watch:
    """A pytest plugin: collects the rows as they finish and drives the progress display."""

    def __init__(self, progress):
        self.progress, self.rows, self.task = progress, [], None

    def pytest_collection_finish(self, session):
        self.task = self.progress.add_task("starting", total=len(session.items))

    def pytest_runtest_logstart(self, nodeid, location):
        self.progress.update(self.task, description=nodeid.partition("[")[2].rstrip("]"))

    def pytest_runtest_logreport(self, report):
        if report.when != "call":
            return
        row = dict(report.user_properties).get("row")
        if row is not None:
            self.rows.append(row)
            self.progress.console.print(self._line(row), highlight=False)
        self.progress.advance(self.task)

    @staticmethod
    def _line(row) -> str:
        name = f"{row['workload']} p={row['p']:g} {row['mode']}"
        if "failed" in row:
            from rich.markup import escape

            return f"  [bold red]failed[/] {name}: {escape(row['failed'])}"
        ratios = ", ".join(f"{value:.2f}x vs {peer}" for peer, value in row["ratio"].items())
        return f"  [dim]done[/] {name}: {row['providers']['fused']['median_ms']:.4g} ms, {ratios}"


def measure(args, console) -> tuple[list[dict], int]:
    import pytest
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    arguments = [str(machine.ROOT / "benchmarks"), "-s", "-q", "--no-header", "--benchmark-quiet", "--bench-force"]
    arguments += [f"--rootdir={machine.ROOT}", "-p", "no:cacheprovider"]
    arguments += ["--bench-census"] * args.census + ["--bench-cold"] * args.cold
    arguments += ["--bench-family"] * args.family + ["--bench-quick"] * args.quick + ["--bench-own-p"] * args.own_p
    arguments += ["--bench-rivals"] * args.rivals
    arguments += [f"--bench-only={name}" for name in args.only] + [f"--bench-mode={mode}" for mode in args.mode]
    if args.benchmark_json:
        arguments.append(f"--benchmark-json={args.benchmark_json}")
    columns = SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    said = io.StringIO()
    with Progress(*columns, console=console) as progress:
        watch = Watch(progress)
        # pytest's own report goes aside: the progress display has the terminal.
        with contextlib.redirect_stdout(said):
            code = int(pytest.main(arguments, plugins=[watch]))
    if code not in (0, 1):
        console.print(said.getvalue(), markup=False, highlight=False)
    return watch.rows, code


def measure_in_child(args, names: list[str], *more: str, **environment: str) -> tuple[list[dict], int]:
    """Workloads in a process of their own: the allocator keeps what it once had, and all at once would not fit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--force", "--no-avx2", f"--json={path}", *more]
        command += [f"--only={name}" for name in names]
        command += ["--quick"] * args.quick + ["--own-p"] * args.own_p + [f"--mode={mode}" for mode in args.mode]
        command += (
            ["--family"] * args.family
            + ["--census"] * args.census
            + ["--cold"] * args.cold
            + ["--rivals"] * args.rivals
        )
        environment = os.environ | environment | {"FUSEDNORM_BENCH_CHILD": "1"}
        code = subprocess.run(command, env=environment, check=False).returncode
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows, code


def measure_avx2(args, console) -> tuple[list[dict], int]:
    """The same row with torch, and with it this library, held to AVX2."""
    console.print(f"\n{AVX2_ROW} again under ATEN_CPU_CAPABILITY=avx2")
    return measure_in_child(
        args,
        [AVX2_ROW],
        "--mode=both",
        "--own-p",
        ATEN_CPU_CAPABILITY="avx2",
        # torch.compile's cache does not tell the levels apart: it would run AVX-512 code here, and abort.
        TORCHINDUCTOR_CACHE_DIR=str(Path(tempfile.gettempdir()) / f"torchinductor_avx2_{os.getuid()}"),
    )


def portions(picked: list) -> list[list[str]]:
    """Names of workloads, as they share a process: those of the census by size, all others alone."""
    from benchmarks.workloads import CENSUS

    alone = [[workload.name] for workload in picked if workload not in CENSUS]
    counted = sorted((workload for workload in picked if workload in CENSUS), key=lambda workload: workload.numel)
    names = [workload.name for workload in counted]
    return alone + [names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)]


def main() -> int:
    args = options()
    if args.show:
        from benchmarks import plot, table

        found = json.loads(Path(args.show).read_text())
        table.show(found["rows"], found["machine"], table.console())
        if args.plots:
            plot.draw(found["rows"], found["machine"], args.plots)
        return 0
    if not machine.tuned():
        machine.restart_tuned(sys.argv)
    child = "FUSEDNORM_BENCH_CHILD" in os.environ
    reason = None if args.force else machine.busy()
    if reason:
        print(f"Not measured: {reason}", file=sys.stderr)
        return 2

    from benchmarks import plot, table, workloads

    try:
        which = {"quick": args.quick, "family": args.family, "census": args.census}
        parts = portions(list(dict.fromkeys(row[0] for row in workloads.rows(args.only, **which))))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    console = table.console()
    facts = machine.facts()
    if len(parts) == 1 or child or args.benchmark_json:
        rows, code = measure(args, console)
    else:
        rows, code = [], 0
        for i, names in enumerate(parts):
            what = names[0] if len(names) == 1 else f"{len(names)} rows from {names[0]}"
            console.print(f"[bold]{what}[/] ({i + 1} of {len(parts)})")
            more, second = measure_in_child(args, names)
            rows, code = rows + more, code or second
    wanted = (
        not args.no_avx2
        and not args.family
        and not args.census
        and (not args.only or AVX2_ROW in args.only)
        and (not args.mode or "both" in args.mode)
    )
    if wanted and facts["level"] == "avx512" and code in (0, 1):
        more, second = measure_avx2(args, console)
        rows, code = rows + more, code or second
    if not rows:
        return code or 1

    result = {"machine": facts, "rows": rows}
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if not child:
        table.show(rows, facts, console)
        for path in plot.draw(rows, facts, args.plots) if args.plots else ():
            console.print(f"wrote {path}", highlight=False)
        if args.json:
            console.print(f"wrote {args.json}", highlight=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
