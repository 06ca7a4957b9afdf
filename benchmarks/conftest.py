"""Options of `pytest benchmarks`, and what a benchmark needs to run: a quiet machine and a tuned allocator."""

from __future__ import annotations

import pytest

from benchmarks import machine
from benchmarks.workloads import COLD, MODES, rows


def pytest_addoption(parser):
    group = parser.getgroup("fusednorm benchmarks")
    group.addoption("--bench-quick", action="store_true", help="the headline rows only, few rounds")
    group.addoption("--bench-family", action="store_true", help="the orders and noises only")
    group.addoption("--bench-census", action="store_true", help="the layers counted in public models only")
    group.addoption("--bench-cold", action="store_true", help="headline and census rows with cold caches, too")
    group.addoption("--bench-only", action="append", default=[], metavar="NAME", help="this workload (repeatable)")
    group.addoption("--bench-mode", action="append", default=[], choices=(*MODES, COLD), help="this mode (repeatable)")
    group.addoption("--bench-own-p", action="store_true", help="leave out the rows at p = 0")
    group.addoption("--bench-rivals", action="store_true", help="another library beside ours where it can do the row")
    group.addoption("--bench-force", action="store_true", help="run although the machine is busy")


def pytest_configure(config):
    if config.getoption("collectonly") or config.getoption("benchmark_disable"):
        return
    if not machine.tuned():
        # Output is captured through the very descriptors that the new process inherits: give them back first.
        capture = config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture(in_=True)
        machine.restart_tuned(["-m", "pytest", *config.invocation_params.args])
    reason = machine.busy()
    if reason and not config.getoption("bench_force", True):
        pytest.exit(reason.replace("--force", "--bench-force"), returncode=pytest.ExitCode.USAGE_ERROR)


def pytest_generate_tests(metafunc):
    if "bench_row" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    try:
        picked = rows(
            only=option("bench_only", []),
            modes=option("bench_mode", []),
            quick=option("bench_quick", False),
            own_p=option("bench_own_p", False),
            family=option("bench_family", False),
            census=option("bench_census", False),
            cold=option("bench_cold", False),
        )
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    names = [f"{workload.name}-p{p:g}-{mode}" for workload, p, mode in picked]
    metafunc.parametrize("bench_row", picked, ids=names)


@pytest.fixture(scope="session")
def budget(request):
    """Seconds to spend on the timed rounds of one row: most of them go to the peers, some of which are 20 times slower,
    and the orders are told apart by small ratios."""
    option = request.config.getoption
    if option("bench_census", False):
        return 0.8  # there are hundreds, and two contestants each
    return 2.0 if option("bench_quick", False) else 8.0 if option("bench_family", False) else 3.0


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fusednorm"] = machine.facts()
