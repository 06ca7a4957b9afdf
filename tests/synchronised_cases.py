"""What test_synchronised.py runs in several processes: layers that share statistics, against one on the whole batch.

`main` is one of the processes: it runs the cases and writes RANK.json: case -> None, or what went wrong.
"""

import datetime
import itertools
import json
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, convert_sync_batchnorm, reference

EXACT = {"rtol": 1e-9, "atol": 1e-10}
SIZES = (3, 5, 1, 2)  # of the batches of ranks 0, 1, ...


def cut(t, sizes=SIZES):
    """This process's part of a batch."""
    sizes = sizes[: dist.get_world_size()]
    return t[: sum(sizes)].split(list(sizes))[dist.get_rank()]


def whole(t, sizes=SIZES):
    return t[: sum(sizes[: dist.get_world_size()])]


def tensors(*shape, count=2):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) + 0.5 for _ in range(count)]


def summed(grads):
    grads = [g.clone() for g in grads]
    for g in grads:
        dist.all_reduce(g)
    return grads


def agree(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda said, i=i: f"value {i}: {said}")


def compare(make, x, g, sizes=SIZES, residual=None, steps=2):
    """Some steps of `make()` in one process on the whole batch, and in this one on its part."""
    alone, shared = make(), make()
    shared.load_state_dict(alone.state_dict())
    shared.process_group = "world"
    for _ in range(steps):
        results = []
        for layer, of in ((alone, whole), (shared, cut)):
            leaf = of(x, sizes).clone().requires_grad_()
            more = None if residual is None else of(residual, sizes).clone().requires_grad_()
            layer.zero_grad()
            y = layer(leaf) if more is None else layer(leaf, more)
            y.backward(of(g, sizes))
            leaves = [y.detach(), leaf.grad] + ([] if more is None else [more.grad])
            results.append((leaves, [p.grad for p in layer.parameters()], list(layer.buffers())))
        (wholes, parameters, buffers), (parts, own, mine) = results
        agree(parts, [cut(t, sizes) for t in wholes])
        agree(summed(own), parameters)
        agree([b.double() for b in mine], [b.double() for b in buffers])
    shared.eval()
    alone.eval()
    inputs = (x,) if residual is None else (x, residual)
    agree([shared(*inputs)], [alone(*inputs)])


# ---- without noise, as one layer -------------------------------------------------------------------------------------
def orders():
    x, g, r = tensors(12, 4, 3, 5, count=3)
    for order in ("norm-act-drop", "act-norm-drop", "norm-add-act", "norm-act-add", "act-drop-norm-add"):
        for act in ("silu", nn.PReLU(4)):
            options = {"act": act if "act" in order else None, "order": order}
            compare(lambda o=options: FusedBatchNorm2d(4, **o).double(), x, g, residual=r if "add" in order else None)


def momentum():
    x, g = tensors(12, 4)
    for value in (None, 0.0, 0.3):
        compare(lambda v=value: FusedBatchNorm1d(4, momentum=v, act="relu").double(), x, g, steps=3)
    compare(lambda: FusedBatchNorm1d(4, track_running_stats=False).double(), x, g)
    compare(lambda: FusedBatchNorm1d(4, affine=False).double(), x, g)


def empty_and_single_batches():
    x, g = tensors(12, 4)
    for sizes in ((0, 5, 0, 2), (5, 0, 1, 0), (1, 1, 1, 1)):
        compare(lambda: FusedBatchNorm1d(4, act="relu").double(), x, g, sizes)


def residuals_that_are_fused_in_some():
    """One that is learned, of one sample: fused where the batch has one too, and added by torch elsewhere."""
    for act in ("gelu", "relu", nn.PReLU(4)):
        torch.manual_seed(0)
        layer = FusedBatchNorm2d(4, act=act, order="norm-add-act", process_group="world").double()
        learned = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        alone = FusedBatchNorm2d(4, act=act, order="norm-add-act").double()
        sizes = (1, 3, 1, 2)
        x, g = tensors(12, 4, 3, 3)
        layer(cut(x, sizes), learned).backward(cut(g, sizes))
        (found,) = summed([learned.grad])
        learned.grad = None
        alone(whole(x, sizes), learned).backward(whole(g, sizes))
        agree([found], [learned.grad])


def called_children():
    class Own(nn.Tanh):
        pass

    x, g = tensors(12, 4)
    compare(lambda: FusedBatchNorm1d(4, act=Own(), order="act-norm").double(), x, g)


# ---- with noise of each process --------------------------------------------------------------------------------------
def noise():
    x, g = tensors(12, 4, 3, 3)
    for order, act in (("norm-act-drop", "relu"), ("drop-norm-act", "gelu"), ("act-drop-norm", "relu")):
        layer = FusedBatchNorm2d(4, act=act, drop=0.4, order=order, process_group="world").double()
        ms = [
            fusednorm.noise(p.shape, 0.4, seed=i, dtype=x.dtype)
            for i, p in enumerate(whole(x).split(list(SIZES[: dist.get_world_size()])))
        ]
        leaf, mine = whole(x).clone().requires_grad_(), cut(x).clone().requires_grad_()
        weight, bias = torch.ones(4, dtype=x.dtype).requires_grad_(), torch.zeros(4, dtype=x.dtype).requires_grad_()
        y = reference.batch_norm_act_drop(
            leaf, None, None, weight, bias, True, act=act, order=order, noise=torch.cat(ms)
        )
        y.backward(whole(g))
        found = layer(mine, seed=dist.get_rank())
        found.backward(cut(g))
        agree([found, mine.grad], [cut(y), cut(leaf.grad)])
        agree(summed([layer.weight.grad, layer.bias.grad]), [weight.grad, bias.grad])


def noise_differs_by_process():
    torch.manual_seed(dist.get_rank())
    layer = FusedBatchNorm1d(4, drop=0.5, process_group="world")
    own = layer(torch.ones(8, 4) * torch.arange(8.0)[:, None]) == 0
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    assert not torch.equal(everyone[0], everyone[1])


def one_noise_for_all():
    """At one seed any number of processes draw what one would draw; and the first one's where seeds differ."""
    x, g = tensors(12, 4, 3, 3)
    for order, noise in itertools.product(
        ("norm-act-drop", "drop-norm-act"),
        (0.4, fusednorm.UniformDropout(0.5, "channel"), fusednorm.GaussianDropout(0.3), fusednorm.DropPath(0.4)),
    ):
        for last in (False, True):
            layer = FusedBatchNorm2d(
                4, act="relu", drop=noise, order=order, process_group="world", global_noise=True
            ).double()
            alone = FusedBatchNorm2d(4, act="relu", drop=noise, order=order).double()
            lay = (lambda t: t.contiguous(memory_format=torch.channels_last)) if last else (lambda t: t)
            leaf, mine = lay(whole(x)).clone().requires_grad_(), lay(cut(x)).clone().requires_grad_()
            y = alone(leaf, seed=7)
            y.backward(whole(g))
            found = layer(mine, seed=7 + dist.get_rank())
            found.backward(cut(g))
            agree([found, mine.grad], [cut(y), cut(leaf.grad)])


def rows_that_count():
    """Padding in some processes, all of it in one."""
    x, g = tensors(12, 4, 7)
    lengths = torch.arange(len(whole(x))) * 5 % 8
    lengths[: SIZES[0]] = 0
    for order, act in (("norm-act", "tanh"), ("act-norm-add", "relu")):
        layer = FusedBatchNorm1d(4, act=act, order=order, process_group="world").double()
        alone = FusedBatchNorm1d(4, act=act, order=order).double()
        residual = [whole(g).flip(0)] if "add" in order else []
        leaf, mine = whole(x).clone().requires_grad_(), cut(x).clone().requires_grad_()
        y = alone(leaf, *residual, lengths=lengths)
        y.backward(whole(g))
        found = layer(mine, *[cut(r) for r in residual], lengths=cut(lengths))
        found.backward(cut(g))
        agree([found, mine.grad], [cut(y), cut(leaf.grad)])
        agree(summed([layer.weight.grad, layer.bias.grad]), [alone.weight.grad, alone.bias.grad])
        agree([layer.running_mean, layer.running_var], [alone.running_mean, alone.running_var])


def renormalised():
    x, g = tensors(12, 4)
    layer = FusedBatchNorm1d(4, act="relu", process_group="world", renorm=(1.5, 0.5)).double()
    alone = FusedBatchNorm1d(4, act="relu", renorm=(1.5, 0.5)).double()
    for _ in range(2):
        leaf, mine = whole(x).clone().requires_grad_(), cut(x).clone().requires_grad_()
        y = alone(leaf)
        y.backward(whole(g))
        found = layer(mine)
        found.backward(cut(g))
        agree([found, mine.grad], [cut(y), cut(leaf.grad)])
    agree([layer.running_mean, layer.running_var], [alone.running_mean, alone.running_var])


def matched_statistics():
    x, _ = tensors(12, 4)
    layer = FusedBatchNorm1d(4, drop=0.5, order="drop-norm", eval_matched_stats=True, momentum=1.0).double()
    layer.process_group = "world"
    layer(cut(x))
    agree([layer.running_mean, layer.running_var], [whole(x).mean(0), whole(x).var(0)])


# ---- whole models ----------------------------------------------------------------------------------------------------
def model():
    torch.manual_seed(1)
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        FusedBatchNorm2d(4, act="relu"),
        nn.Flatten(),
        nn.Linear(64, 4),
        FusedBatchNorm1d(4),
    )
    return nn.Sequential(*layers).double()


def trained(net, x, sizes, steps=3, scale=1.0, wrap=lambda net: net):
    wrapped = wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        y = wrapped(cut(x, sizes) if sizes else whole(x))
        (y.tanh().sum() * scale).backward()
        optimizer.step()
    return [*net.parameters(), *(b.double() for b in net.buffers())]


def data_parallel():
    (x,) = tensors(12, 3, 8, 8, count=1)
    expected = trained(model(), x, None, scale=1 / dist.get_world_size())  # DDP takes the mean over processes
    shared = convert_sync_batchnorm(model())
    assert type(shared[1]) is FusedBatchNorm2d
    agree(trained(shared, x, SIZES, wrap=DDP), expected)


def under_checkpointing():
    (x,) = tensors(12, 3, 8, 8, count=1)
    expected = trained(model(), x, None, scale=1 / dist.get_world_size())
    for reentrant in (False, True):
        shared = convert_sync_batchnorm(model())
        for layer in (shared[1], shared[4], shared[7]):
            layer.update_when_recomputed = False

        class Block(nn.Module):
            def __init__(self, net, reentrant=reentrant):
                super().__init__()
                self.net, self.reentrant = net, reentrant

            def forward(self, x):
                return checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant)

        found = trained(shared, x, SIZES, wrap=lambda net: DDP(Block(net)))
        agree(found, expected)


def fully_sharded():
    from torch.distributed.fsdp import fully_shard

    (x,) = tensors(12, 3, 8, 8, count=1)
    expected = trained(model(), x, None, scale=1 / dist.get_world_size())
    shared = convert_sync_batchnorm(model())
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))

    def wrap(net):
        return fully_shard(net, mesh=mesh)

    found = trained(shared, x, SIZES, wrap=wrap)
    full = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in found]
    agree(full, expected)


def compiled():
    x, g = tensors(12, 4)
    make = lambda: FusedBatchNorm1d(4, act="silu", process_group="world").double()  # noqa: E731
    layer, other = make(), make()
    for _ in range(2):
        results = []
        for call in (layer, torch.compile(other, backend="aot_eager")):
            leaf = cut(x).clone().requires_grad_()
            y = call(leaf)
            y.backward(cut(g))
            results.append([y, leaf.grad])
        agree(*results)
    agree(list(layer.buffers())[:2], list(other.buffers())[:2])


def group_of_some():
    group = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return
    x, _ = tensors(12, 4)
    layer = FusedBatchNorm1d(4, act="relu", process_group=group).double()
    alone = FusedBatchNorm1d(4, act="relu").double()
    mine = x[:3] if dist.get_rank() == 0 else x[3:8]
    y = alone(x[:8])
    agree([layer(mine)], [y[:3] if dist.get_rank() == 0 else y[3:8]])


def no_exchange_in_evaluation():
    """Nor with frozen layers: one process may call the layer by itself."""
    layer = FusedBatchNorm1d(4, process_group="world")
    if dist.get_rank() == 0:
        layer.eval()(torch.randn(5, 4))
        layer.freeze().train()
        layer(torch.randn(5, 4))


def what_cannot_be():
    layer = FusedBatchNorm1d(4, process_group="world", ghost_batch_size=2)
    said = []
    for call in (
        lambda: layer(torch.randn(4, 4)),
        lambda: torch.func.vmap(FusedBatchNorm1d(4, process_group="world", track_running_stats=False))(
            torch.randn(2, 4, 4)
        ),
    ):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    assert "ghost_batch_size: expected None" in said[0] and "process_group: expected none here" in said[1], said


def a_rank_that_raises():
    """Last, as it ends what the processes share: the others get an error within the group's time, and nobody hangs."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=3))
    layer = FusedBatchNorm1d(4, process_group=group)
    if dist.get_rank() == 0:
        try:
            layer(torch.randn(4, 5))
            raise AssertionError("a size that does not match is accepted")
        except (RuntimeError, ValueError) as error:
            assert "running_mean should contain 5 elements not 4" in str(error), error
        return
    try:
        layer(torch.randn(4, 4))
        raise AssertionError("the exchange ended without rank 0")
    except RuntimeError:
        pass


CASES = (
    orders, momentum, empty_and_single_batches, called_children,
    residuals_that_are_fused_in_some, noise, noise_differs_by_process, matched_statistics,
    one_noise_for_all, rows_that_count, renormalised,
    data_parallel, under_checkpointing, fully_sharded, compiled, group_of_some, no_exchange_in_evaluation,
    what_cannot_be, a_rank_that_raises,
)  # fmt: skip


def main(world, rank, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    errors = {}
    for case in CASES:
        try:
            case()
            errors[case.__name__] = None
        except Exception:
            errors[case.__name__] = traceback.format_exc()
        (Path(folder) / f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()
