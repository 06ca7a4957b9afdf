"""Cases of distributed_cases.py: on DTensors a fused layer gives what it gives in one process, and what stock gives.

Noise is that of one process where all ranks have one seed.
"""

import copy
import functools
import sys

import torch
import torch.distributed as dist
from distributed_cases import SameNoise, agree, whole
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

import fusednorm
from fusednorm import functional

SHAPE = (5, 4, 3, 3)  # a batch that two ranks cannot share evenly

# Layer -> which placements of its input its output keeps in training and in evaluation: those where neither statistics,
# nor noise, nor the bits that forward saves are of the whole tensor. Of any other it makes whole tensors.
BOTH = {"batch", "channels"}
LAYERS = {
    "silu": (dict(act="silu"), {"channels"}, BOTH),
    "noise": (dict(act="silu", drop=0.4), set(), BOTH),
    "noise before": (dict(act="silu", drop=0.4, order="drop-act-norm", eval_matched_stats=True), set(), BOTH),
    "channels dropped": (dict(drop=nn.Dropout2d(0.4)), set(), BOTH),
    "all dropped": (dict(drop=1.0), set(), BOTH),
    "addition": (dict(act="tanh", order="norm-add-act"), {"channels"}, BOTH),
    "addition, bits": (dict(act="relu", order="norm-add-act"), set(), set()),
    "addition, noise": (dict(act="tanh", drop=0.4, order="norm-drop-add-act"), set(), BOTH),
    "ghosts": (dict(act="relu", ghost_batch_size=2), set(), BOTH),
    "prelu": (dict(act="prelu"), {"channels"}, BOTH),
    "prelu by channel": (dict(act=nn.PReLU(4)), {"channels"}, BOTH),
    "cumulative": (dict(momentum=None), {"channels"}, BOTH),
    "no statistics": (dict(affine=False, track_running_stats=False, act="tanh"), {"channels"}, {"channels"}),
}
PLACEMENTS = ("replicated", "batch", "channels", "rows", "partial")


@functools.cache
def mesh(*shape):
    return dist.init_device_mesh("cpu", shape or (dist.get_world_size(),))


def spread(t, *names, on=None):
    """A DTensor of the values of `t`, to be differentiated; a name for each dimension of the mesh."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    if "partial" in names:
        x = DTensor.from_local(t / dist.get_world_size(), mesh(), [Partial()])
    else:
        placements = {"replicated": Replicate(), "batch": Shard(0), "channels": Shard(1), "rows": Shard(2)}
        placements["vectors"] = Shard(0)  # of channels
        x = distribute_tensor(t, on or mesh(), [placements[name] for name in names or ("replicated",)])
    return x.requires_grad_(t.is_floating_point())


def replicated(layer, on=None):
    from torch.distributed.tensor import distribute_module

    return distribute_module(copy.deepcopy(layer), on or mesh())


def values(count):
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(SHAPE, generator=draw, dtype=torch.float64) for _ in range(count)]


def make(**options):
    torch.manual_seed(3)
    layer = fusednorm.FusedBatchNorm2d(4, dtype=torch.float64, **copy.deepcopy(options))
    for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
        if t is not None:
            t.data.uniform_(0.5, 1.5)
    return layer


def stock_twin(layer):
    twin = copy.deepcopy(layer).to_torch()
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _DropoutNd):
                setattr(parent, name, SameNoise(child.p, "channel" if type(child) is nn.Dropout2d else "element"))
    return twin.train(layer.training)


def run(layer, *inputs, **options):
    """Output, gradients and statistics as whole tensors by name; and the output itself."""
    torch.manual_seed(9)
    y = layer(*inputs, **options)
    loss = y.sin().sum()
    getattr(loss, "full_tensor", lambda: loss)().backward()
    got = {"output": whole(y)} | {f"gradient of input {i}": whole(x.grad) for i, x in enumerate(inputs)}
    got |= {f"gradient {i}": whole(p.grad) for i, p in enumerate(layer.parameters())}
    return got | {f"buffer {i}": whole(b) for i, b in enumerate(layer.buffers())}, y


def alone(layer, *inputs, **options):
    return run(copy.deepcopy(layer), *(t.clone().requires_grad_() for t in inputs), **options)[0]


# ---- every layer, however its input is placed ------------------------------------------------------------------------
def layer_case(options, keeps, training, place, folder):
    layer = make(**options).train(training)
    inputs = values(2 if "add" in layer.order else 1)
    expected = alone(layer, *inputs)
    spreads = [spread(t, place) for t in inputs]
    got, y = run(replicated(layer), *spreads)
    agree(got, expected)
    if place in ("replicated", *BOTH):  # else torch has to move something, and may choose what
        kept = (spreads[0] if place in keeps else spread(inputs[0])).placements
        assert y.placements == kept == spreads[0].grad.placements, f"{y.placements}, {spreads[0].grad.placements}"
    if not any(isinstance(child, nn.PReLU) for child in layer.children()):  # torch has no rule for prelu's backward
        twin, _ = run(replicated(stock_twin(layer)), *(spread(t, place) for t in inputs))
        if place == "channels":  # and moves only a rank's own channels of replicated statistics
            twin |= {name: t for name, t in expected.items() if "buffer" in name}
        agree(got, twin)


def layer_cases():
    for name, (options, *keeps) in LAYERS.items():
        for place in PLACEMENTS:
            for training, kept in zip((True, False), keeps, strict=True):
                mode = "training" if training else "evaluation"
                yield f"{name}, {place}, {mode}", functools.partial(layer_case, options, kept, training, place)


# ---- and the rest ----------------------------------------------------------------------------------------------------
def is_imported_late(folder):
    """With the first DTensor. The case that runs first."""
    make(act="silu")(values(1)[0])
    assert "fusednorm._sharding" not in sys.modules
    assert "torch.distributed.tensor" not in sys.modules
    inputs = values(1)
    agree(run(replicated(make(act="silu")), spread(*inputs))[0], alone(make(act="silu"), *inputs))
    assert "fusednorm._sharding" in sys.modules


def takes_a_seed(folder):
    layer, inputs = make(act="silu", drop=0.4), values(1)
    expected = alone(layer, *inputs, seed=5)
    for seed in (5, torch.tensor(5), spread(torch.tensor(5))):
        agree(run(replicated(layer), spread(*inputs), seed=seed)[0], expected)


def ranks_of_several_seeds(folder):
    """Every rank draws from its own generator, as torch's dropout on the CPU does: agreeing is up to the user."""
    (t,) = values(1)
    for layer in (make(act="silu", drop=0.4), nn.Dropout(0.4)):
        outputs = []
        for x, call in ((spread(t), replicated(layer)), (t, copy.deepcopy(layer))):
            torch.manual_seed(dist.get_rank())
            outputs.append({"output": whole(call(x))})
        agree(*outputs)


def residual_to_broadcast(folder):
    layer, inputs = make(act="relu", drop=0.4, order="norm-drop-add-act"), values(2)
    inputs[1] = inputs[1][0, :, :1, :1].contiguous()
    agree(run(replicated(layer), *map(spread, inputs))[0], alone(layer, *inputs))


def noise_alone(folder):
    for layer in (fusednorm.GaussianDropout(0.4), fusednorm.UniformDropout(0.4), fusednorm.DropPath(0.4)):
        for place in ("replicated", "batch"):
            agree(run(layer, spread(*values(1), place))[0], alone(layer, *values(1)))


def no_communication(folder):
    """In evaluation of a sharded batch, in training of sharded channels, and for a seed."""
    from torch.distributed.tensor.debug import CommDebugMode

    for place, vectors, training in (("batch", "replicated", False), ("channels", "vectors", True)):
        x = spread(*values(1), place)
        mean, var, weight, bias = (spread(torch.ones(4, dtype=torch.float64), vectors) for _ in range(4))
        with CommDebugMode() as communication:
            y = functional.batch_norm_act_drop(x, mean.detach(), var.detach(), weight, bias, training, act="silu")
            y.to_local().sum().backward()
        assert x.grad.placements == x.placements
        assert communication.get_total_counts() == 0, communication.get_comm_counts()
    for place in PLACEMENTS:
        x = spread(*values(1), place)
        with CommDebugMode() as communication:
            torch.ops.fusednorm.draw_seed(x)
        assert communication.get_total_counts() == 0, f"{place}: {communication.get_comm_counts()}"


def mesh_of_two_dimensions(folder):
    grid = mesh(2, 1)
    layer, inputs = make(act="silu").eval(), values(1)
    for names in (("batch", "channels"), ("channels", "batch"), ("batch", "batch"), ("replicated", "channels")):
        x = spread(*inputs, *names, on=grid)
        got, y = run(replicated(layer, grid), x)
        assert y.placements == x.placements
        agree(got, alone(layer, *inputs))


def sharded_statistics(folder):
    layer, inputs = make(act="silu"), values(1)
    for place in PLACEMENTS:
        distributed = copy.deepcopy(layer)
        for name in ("running_mean", "running_var"):
            setattr(distributed, name, spread(getattr(distributed, name), "vectors").detach())
        distributed = replicated(distributed)
        agree(run(distributed, spread(*inputs, place))[0], alone(layer, *inputs))
        assert distributed.running_var.placements == spread(layer.running_var, "vectors").placements


def noise_of_every_size(folder):
    """A rule's results are cached: by all that decides about them."""
    torch.manual_seed(9)
    seed = spread(torch.tensor(5))
    for shape in ((3, 4), (2, 4, 5)):
        for granularity in ("element", "channel"):
            got = fusednorm.noise(shape, 0.4, seed=seed, granularity=granularity)
            assert torch.equal(whole(got), fusednorm.noise(shape, 0.4, seed=5, granularity=granularity))


def double_backward(folder):
    layer, inputs = make(act="silu", drop=0.4), values(1)

    def second(layer, x, **options):
        torch.manual_seed(9)
        (grad,) = torch.autograd.grad(layer(x, **options).sin().sum(), x, create_graph=True)
        (grad,) = torch.autograd.grad(grad.sin().sum(), x)
        return {"second derivative": whole(grad)}

    for options in ({}, {"seed": 5}):
        expected = second(layer, inputs[0].clone().requires_grad_(), **options)
        agree(second(replicated(layer), spread(*inputs), **options), expected)


def compiled(folder):
    for options, place, training in (
        (dict(act="silu", drop=0.4), "replicated", True),
        (dict(act="tanh", order="norm-add-act"), "channels", True),
        (dict(act="silu"), "batch", False),
    ):
        torch._dynamo.reset()
        layer = make(**options).train(training)
        inputs = values(2 if "add" in layer.order else 1)
        program = torch.compile(replicated(layer), backend="aot_eager", fullgraph=True)
        agree(run(program, *(spread(t, place) for t in inputs))[0], alone(layer, *inputs))


def mixed(folder):
    """Plain tensors beside DTensors: refused in torch's words, before a statistic has moved."""

    def buffers_left(layer):
        distributed = replicated(layer)
        distributed._buffers.update(layer._buffers)
        return distributed

    def weight_left(layer):
        distributed = replicated(layer)
        distributed.weight = layer.weight
        return distributed

    (t,) = values(1)
    for training in (True, False):
        for make_layer, x in (
            (lambda layer: layer, spread(t)),
            (replicated, t),
            (buffers_left, spread(t)),
            (weight_left, spread(t)),
        ):
            said = []
            for layer in (make(act="silu"), nn.BatchNorm2d(4).double()):
                layer = make_layer(layer.train(training))
                before = whole(layer.running_mean)
                try:
                    layer(x)
                except RuntimeError as error:
                    said.append(str(error).split("got")[1].split("!")[0])
                assert torch.equal(whole(layer.running_mean), before)
            assert len(said) == 2 and said[0] == said[1] and "mixed torch.Tensor and DTensor" in said[0], said


CASES = {
    f.__name__.replace("_", " "): f
    for f in (
        is_imported_late,
        takes_a_seed,
        ranks_of_several_seeds,
        residual_to_broadcast,
        noise_alone,
        no_communication,
        mesh_of_two_dimensions,
        sharded_statistics,
        noise_of_every_size,
        double_backward,
        compiled,
        mixed,
    )
} | dict(layer_cases())
