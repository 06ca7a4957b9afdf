"""Running statistics move as those of nn.BatchNorm do, over many steps and in every mode."""

import pytest
import torch
from common import FLOATS, dtype_id, lay_out
from torch import nn

import fusednorm

RANKS = {
    2: (nn.BatchNorm1d, fusednorm.FusedBatchNorm1d, (12, 5)),
    3: (nn.BatchNorm1d, fusednorm.FusedBatchNorm1d, (6, 5, 7)),
    4: (nn.BatchNorm2d, fusednorm.FusedBatchNorm2d, (4, 5, 3, 7)),
    5: (nn.BatchNorm3d, fusednorm.FusedBatchNorm3d, (3, 5, 3, 2, 2)),
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def pair(rank=4, **options):
    stock, fused, shape = RANKS[rank]
    return stock(5, **options), fused(5, **options, act="relu", drop=0.3), shape


def same_buffers(ours, theirs, rtol=1e-5, atol=1e-6):
    for name in BUFFERS:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.kernel
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, 0.0, None])
@pytest.mark.parametrize("rank", RANKS)
def test_many_steps(rank, momentum, layout):
    theirs, ours, shape = pair(rank, momentum=momentum)
    for step in range(50):
        x = lay_out(torch.randn(shape) * (1 + step % 3) + step / 10, layout)
        theirs(x)
        ours(x)
    same_buffers(ours, theirs)
    assert int(ours.num_batches_tracked) == 50
    theirs.eval()
    ours.eval()
    x = lay_out(torch.randn(shape), layout)
    torch.testing.assert_close(ours(x), theirs(x).relu())
    same_buffers(ours, theirs)


@pytest.mark.kernel
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=dtype_id)
def test_far_mean(dtype, layout):
    """Mean 1e4, standard deviation 1: the variance must survive in float32."""
    _, ours, _ = pair(momentum=0.1, dtype=dtype)
    exact = nn.BatchNorm2d(5, dtype=torch.float64)
    for _ in range(20):
        x = lay_out((torch.randn(16, 5, 9, 9) + 1e4).to(dtype), layout)
        ours(x)
        exact(x.double())
    torch.testing.assert_close(ours.running_mean.double(), exact.running_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.running_var.double(), exact.running_var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_variance_is_unbiased(count):
    _, ours, _ = pair(2, momentum=1.0)
    x = torch.randn(count, 5)
    ours(x)
    torch.testing.assert_close(ours.running_var, x.var(0, correction=1))


def test_buffers_are_updated_in_place():
    _, ours, shape = pair()
    before = {name: getattr(ours, name) for name in BUFFERS}
    addresses = {name: tensor.data_ptr() for name, tensor in before.items()}
    versions = {name: tensor._version for name, tensor in before.items()}
    ours(torch.randn(shape))
    for name, tensor in before.items():
        assert getattr(ours, name) is tensor
        assert tensor.data_ptr() == addresses[name]
        assert tensor._version > versions[name], f"autograd cannot see that {name} changed"


@pytest.mark.parametrize("training", [True, False])
def test_without_tracking(training):
    theirs, ours, shape = pair(track_running_stats=False)
    x = torch.randn(shape)
    ours.train(training)
    ours.drop.eval()
    theirs.train(training)
    torch.testing.assert_close(ours(x), theirs(x).relu())
    same_buffers(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_tracking_switched_off_later(training):
    theirs, ours, shape = pair()
    for layer in (theirs, ours):
        layer.track_running_stats = False
        layer.train(training)
    ours.drop.eval()
    x = torch.randn(shape)
    torch.testing.assert_close(ours(x), theirs(x).relu())
    same_buffers(ours, theirs)
    assert int(ours.num_batches_tracked) == 0


def test_evaluation_leaves_them():
    _, ours, shape = pair()
    ours.eval()
    ours(torch.randn(shape))
    torch.testing.assert_close(ours.running_mean, torch.zeros(5))
    torch.testing.assert_close(ours.running_var, torch.ones(5))
    assert int(ours.num_batches_tracked) == 0


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (4, 5, 0, 3)], ids=str)
def test_empty_batch(shape, momentum):
    theirs, ours, usual = pair(momentum=momentum)
    for x in (torch.randn(usual), torch.empty(shape), torch.randn(usual)):
        theirs(x)
        ours(x)
    same_buffers(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_sixteen_bit_buffers(dtype):
    """Rounded as those of nn.BatchNorm, to within a unit in the last place of each of the steps."""
    theirs, ours, shape = pair(dtype=dtype)
    for _ in range(10):
        x = torch.randn(shape).to(dtype)
        theirs(x)
        ours(x)
    same_buffers(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.kernel
def test_mixed_buffers():
    """bfloat16 input and weights beside float32 buffers, as FSDP2 leaves them."""
    _, ours, shape = pair()
    for parameter in ours.parameters():
        parameter.data = parameter.data.bfloat16()
    exact = nn.BatchNorm2d(5)
    for _ in range(10):
        x = torch.randn(shape).bfloat16()
        assert ours(x).dtype == torch.bfloat16
        exact(x.float())
    same_buffers(ours, exact)


def test_reset():
    theirs, ours, shape = pair()
    for layer in (theirs, ours):
        layer(torch.randn(shape))
        layer.reset_running_stats()
    same_buffers(ours, theirs)


@pytest.mark.parametrize("momentum", [0.25, None])
def test_update_operator(momentum):
    """The operator alone, count and factor included."""
    mean, var, tracked = torch.full((3,), 2.0), torch.full((3,), 4.0), torch.tensor(3)
    torch.ops.fusednorm.update_stats_(mean, var, tracked, torch.full((3,), 6.0), torch.full((3,), 8.0), 5, 5, momentum)
    factor = 0.25 if momentum is not None else 1 / 4
    torch.testing.assert_close(mean, torch.full((3,), 2 + factor * 4.0))
    torch.testing.assert_close(var, torch.full((3,), 4 + factor * (8.0 * 5 / 4 - 4)))
    assert int(tracked) == 4


def test_update_operator_without_a_counter():
    mean, var = torch.zeros(3), torch.ones(3)
    torch.ops.fusednorm.update_stats_(mean, var, None, torch.ones(3), torch.ones(3), 2, 2, 0.5)
    torch.testing.assert_close(mean, torch.full((3,), 0.5))
    torch.testing.assert_close(var, torch.full((3,), 1.5))
