"""The same bits on every run and for every number of threads, and more than one thread at work."""

import os
import time
from pathlib import Path

import pytest
import torch
from common import Problem, dtype_id, lay_out, same_bits

from fusednorm import functional
from fusednorm.cli.threads import clock_of_threads

pytestmark = pytest.mark.kernel

SHAPES = ((16, 1, 64, 64), (8, 3, 40, 40), (32, 64, 14, 14), (4096, 33), (60_000, 1), (3, 5000), (2, 200, 7, 7))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [*SHAPES, (700, 3, 19, 19), (600, 40, 5)], ids=str)
def test_same_bits(shape, p, dtype, layout, training, threads):
    """Also for three threads, which split most of these shapes unevenly."""
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        problem = Problem(shape, dtype, layout, "tanh", p, training=training)
        results.append(problem.fused() | {"mean": problem.running_mean, "var": problem.running_var})
    for other in results[1:]:
        for name, value in results[0].items():
            assert same_bits(value, other[name]), name


@pytest.mark.cpu
@pytest.mark.parametrize("layout", ["first", "last"])
def test_uneven_threads_are_right_too(layout, threads):
    threads(3)
    Problem((5, 2, 31, 33), torch.float32, layout, "relu", 0.5).check()


@pytest.mark.cpu
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs the threads of /proc")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("channels", [1, 64])
def test_two_threads_work(channels, layout, threads):
    """The second thread carries its part. How much of the wall time that saves is for the benchmarks: here only the
    share of the work counts, which a busy machine does not change."""
    threads(2)
    shape = (64, channels, 512 // (8 if channels > 1 else 1), 128 // (8 if channels > 1 else 1))
    x = lay_out(torch.randn(shape), layout).requires_grad_()
    g = lay_out(torch.randn(shape), layout)

    def step():
        y = functional.batch_norm_act_drop(x, None, None, training=True, act="tanh", p=0.3, seed=1)
        torch.autograd.grad(y, x, g)

    step()
    before = clock_of_threads()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        step()
    spent = sorted(now - before.get(tid, 0.0) for tid, now in clock_of_threads().items())
    # Waiting in the thread pool also costs time, but waiting threads go to sleep: a fifth is more than that.
    assert spent[-2] > 0.2 * spent[-1], spent
