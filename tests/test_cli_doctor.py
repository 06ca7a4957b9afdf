"""`doctor` finds nothing where nothing is wrong, and what is planted; its answers are those of the definition."""

import math
import os

import definition
import numpy as np
import pytest
import torch
from terminal import environment, facts_of, run

from fusednorm.cli import answers, threads

pytestmark = pytest.mark.cpu


def test_the_known_answers_are_those_of_the_definition():
    kept = definition.bernoulli((16, 4), 0.5, answers.SEED, "element").reshape(-1) != 0
    assert int("".join(map(str, kept.astype(int))), 2) == answers.KEPT
    draws = definition.draw16(answers.SEED, np.arange(9)[:, None], np.arange(2)[None, :])
    assert list(answers.DRAWS) == draws.reshape(-1).tolist()
    normal = definition.gaussian((9, 2), 1.0, answers.SEED, "element").reshape(-1)
    np.testing.assert_allclose(answers.NORMAL, normal, rtol=0, atol=1e-7)


def test_doctor_finds_nothing_where_nothing_is_wrong():
    status, facts = facts_of(run("doctor --json"))
    assert status == 0 and facts["healthy"] is True
    found = {check["name"]: check["status"] for check in facts["checks"]}
    wanted = {"library", "CPU level", "Bernoulli noise", "uniform noise", "Gaussian noise"}
    assert all(found[name] == "ok" for name in wanted | {"gradients, NCHW", "gradients, NHWC"})
    assert found["GPU"] == ("ok" if torch.cuda.is_available() else "absent")


def broken(result):
    """{name: check} of those that have failed, of which there are some."""
    status, facts = facts_of(result)
    assert status == 1 and facts["healthy"] is False
    return {check["name"]: check for check in facts["checks"] if check["status"] == "FAILED"}


@pytest.mark.parametrize(
    ("constant", "value", "name"),
    [
        ("KEPT", answers.KEPT ^ 1 << 20, "Bernoulli noise"),
        ("DRAWS", (*answers.DRAWS[:-1], answers.DRAWS[-1] ^ 1), "uniform noise"),
        ("NORMAL", (answers.NORMAL[0] + 1e-5, *answers.NORMAL[1:]), "Gaussian noise"),
    ],
)
def test_doctor_finds_a_wrong_number(called, monkeypatch, constant, value, name):
    monkeypatch.setattr(answers, constant, value)
    found = broken(called("doctor --json"))
    assert list(found) == [name]
    assert "build it again" in found[name]["advice"]


@pytest.mark.parametrize("channels_last", [False, True])
def test_doctor_finds_a_wrong_gradient(called, monkeypatch, channels_last):
    """Of one element, in one layout."""
    grad = torch.autograd.grad

    def wrong(y, leaves, grad_output):
        gradients = grad(y, leaves, grad_output)
        if y.dtype == torch.float32 and leaves[0].is_contiguous() != channels_last:
            gradients[0][2, 3, 4, 5] += 1e-3
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", wrong)
    found = broken(called("doctor --json"))
    assert list(found) == ["gradients, NHWC" if channels_last else "gradients, NCHW"]


@pytest.mark.parametrize("error", [math.nan, math.inf, 2 * answers.GRADIENT_ERROR])
def test_what_is_no_number_is_wrong_too(called, monkeypatch, error):
    monkeypatch.setattr(answers, "gradients", lambda device, channels_last: error)
    assert list(broken(called("doctor --json"))) == ["gradients, NCHW", "gradients, NHWC"]


def test_a_check_that_raises_has_failed(called, monkeypatch):
    def raises(device):
        raise RuntimeError("an illegal instruction\nand more")

    monkeypatch.setattr(answers, "bernoulli", raises)
    status, out, _ = called("doctor")
    assert status == 1
    assert "expected 64 known values to the last bit; got RuntimeError: an illegal instruction\n" in out
    assert "1 of" in out.splitlines()[-1]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="torch starts no second thread")
def test_doctor_counts_the_threads_that_work():
    """torch says two, and OpenMP starts one."""
    found = broken(run("doctor --json", env=environment(OMP_NUM_THREADS="2", OMP_THREAD_LIMIT="1")))
    assert found["threads at work"]["got"].startswith("1, ")
    assert "OMP_THREAD_LIMIT" in found["threads at work"]["advice"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs the threads of /proc")
def test_one_thread_is_one_thread():
    _, facts = facts_of(run("doctor --json"))
    check = next(c for c in facts["checks"] if c["name"] == "threads at work")
    assert check["status"] == "ok" and check["got"].startswith("1, ")
    assert ("could give it" in check["advice"]) == (threads.processors() >= 2)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "25000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.25),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
    ids=["v2", "v2-unlimited", "v1", "v1-unlimited", "none"],
)
def test_the_share_of_a_container(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    everything = threads.processors(tmp_path / "nothing")
    assert everything >= 1
    assert threads.processors(tmp_path) == (everything if quota is None else quota)


def test_a_compiler_that_is_not_here_is_no_failure():
    done = run("doctor", env=environment(CXX="/nowhere/g++"))
    assert done.returncode == 0
    assert "absent  torch.compile" in done.stdout and "apt-get install g++" in done.stdout
