"""Layers that share the statistics of several gloo processes, and the conversion of models to them.

The processes of a number run all cases (synchronised_cases.py); each case is a test here.
"""

import functools

import pytest
import synchronised_cases
import torch
import torch.distributed as dist
from processes import reports, start
from torch import nn

from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, convert_sync_batchnorm

LIMIT = 400  # seconds

gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo")
pytestmark = [pytest.mark.slow, pytest.mark.cpu]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Number of processes -> what each of them reports."""

    @functools.cache
    def run(world):
        folder = tmp_path_factory.mktemp(f"world{world}")
        code = "import sys, synchronised_cases as cases; cases.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
        ranks = [start(code, str(world), str(rank), str(folder)) for rank in range(world)]
        return reports(ranks, [folder / f"{rank}.json" for rank in range(world)], LIMIT)

    return run


@gloo
@pytest.mark.parametrize("case", [case.__name__ for case in synchronised_cases.CASES])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_case(ran, world, case):
    for rank, errors in enumerate(ran(world)):
        assert case in errors, f"rank {rank} ended before this case"
        assert errors[case] is None, f"rank {rank}: {errors[case]}"


def test_alone_it_is_an_ordinary_layer():
    x = torch.randn(6, 4)
    for group in (None, "world"):
        layer = FusedBatchNorm1d(4, act="relu", process_group=group)
        assert torch.equal(layer(x), FusedBatchNorm1d(4, act="relu")(x))
    assert "process_group" in repr(FusedBatchNorm1d(4, process_group="world"))
    with pytest.raises(ValueError, match="process_group: expected a group of torch.distributed, 'world' or None"):
        FusedBatchNorm1d(4, process_group="all")(x)


def test_conversion():
    class OwnNorm(nn.BatchNorm1d):
        pass

    shared = nn.BatchNorm1d(4)
    net = nn.ModuleDict(
        {
            "first": nn.Sequential(nn.Linear(4, 4), shared),
            "again": shared,
            "fused": FusedBatchNorm2d(4, act="relu"),
            "groups": FusedBatchNorm1d(4, ghost_batch_size=2),
            "own": OwnNorm(4),
            "lazy": nn.LazyBatchNorm1d(),
        }
    )
    before, state = dict(net.named_parameters()), net.state_dict()
    result = convert_sync_batchnorm(net)
    assert result is net and net["first"][1] is net["again"] and type(net["again"]) is FusedBatchNorm1d
    assert net["again"].process_group == net["fused"].process_group == "world"
    assert net["groups"].process_group is None
    assert type(net["own"]) is OwnNorm and type(net["lazy"]) is nn.LazyBatchNorm1d
    assert all(p is before[name] for name, p in net.named_parameters())
    assert list(net.state_dict()) == list(state)
    group = object()
    layer = convert_sync_batchnorm(nn.BatchNorm2d(3), group)
    assert type(layer) is FusedBatchNorm2d and layer.process_group is group
    with pytest.raises(TypeError, match="process_group: expected a group of torch.distributed"):
        layer(torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="'world' or None, but got 'all'"):
        convert_sync_batchnorm(net, "all")
    taken = nn.BatchNorm1d(4)
    taken.frozen = "by its owner"
    pair = nn.Sequential(nn.BatchNorm1d(4), taken)
    with pytest.raises(ValueError, match="no attribute of its own that is named frozen"):
        convert_sync_batchnorm(pair)
    assert type(pair[0]) is nn.BatchNorm1d
    with pytest.raises(TypeError, match="module: expected a torch.nn.Module"):
        convert_sync_batchnorm("model")
