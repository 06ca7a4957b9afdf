"""One test per row. pytest-benchmark's entry is the fused layer; its `extra_info` is the whole row, peers included.

The peers are timed by the same call of `benchmark.pedantic`: its set-up deals the contestants' turns out in rotation
(measure.py), and the durations are dealt back afterwards.
"""

from __future__ import annotations

import pytest

from benchmarks import rivals
from benchmarks.case import Case
from benchmarks.measure import describe, time_row
from benchmarks.providers import providers_of
from benchmarks.workloads import CENSUS

CENSUS_SAMPLE = 1 << 22  # elements of a census row that are checked

_held = {}


def _case(workload, p, against) -> Case:
    """The case of this row, kept until a row asks for another; its error is kept too, not met anew for each mode."""
    if (workload, p) not in _held:
        _held.clear()  # first: two large cases do not fit in memory at once
        try:
            sample = CENSUS_SAMPLE if workload in CENSUS else None
            _held[workload, p] = Case(workload, p, providers_of(workload), sample=sample, against=against)
        except Exception as error:
            _held[workload, p] = error
    case = _held[workload, p]
    if isinstance(case, Exception):
        raise case
    return case


@pytest.mark.benchmark(disable_gc=True)
def test_row(bench_row, budget, benchmark, record_property, request):
    workload, p, mode = bench_row
    benchmark.group = workload.name
    row = describe(workload, p, mode)
    record_property("row", row)  # updated in place, so that a row that fails is reported too
    try:
        wanted = request.config.getoption("bench_rivals", False)
        case = _case(workload, p, rivals.of(workload, p) if wanted else ())
        if benchmark.disabled:
            benchmark.pedantic(case.step, args=("fused", mode))
            return

        def pedantic(target, setup, rounds, warmup_rounds):
            benchmark.pedantic(target, setup=setup, rounds=rounds, warmup_rounds=warmup_rounds)
            return list(benchmark.stats.stats.data)

        measured, fused_seconds = time_row(case, mode, budget, pedantic)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        raise
    row.update(measured)
    benchmark.stats.stats.data[:] = fused_seconds
    benchmark.extra_info.update(row)
