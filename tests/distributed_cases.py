"""What test_distributed.py runs in two processes: every case trains a fused model and its stock twin, and compares.

`main` runs a group of cases as one of the ranks and writes GROUP-RANK.json: case -> None, or what went wrong.

Twins see the same batches and the same noise: where the fused layers draw, the stock model multiplies by that noise in
plain torch. All is float64 unless a case says otherwise, so that twins agree to about ten digits and nothing hides
behind a tolerance. DTensors have a file of their own, distributed_tensors.py.
"""

import contextlib
import datetime
import functools
import json
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fusednorm

WORLD_SIZE = 2
STRENGTHS = (0.0, 0.4)
EXACT = {"rtol": 1e-8, "atol": 1e-10}
HALF = {"rtol": 0.05, "atol": 0.02}  # bfloat16 has eight bits, and the stock layers round after each


# ---- models ----------------------------------------------------------------------------------------------------------
class SameNoise(nn.Module):
    """Dropout by the noise of the fused layers, in plain torch; draws its seed as they do."""

    def __init__(self, p, granularity="element"):
        super().__init__()
        self.p, self.granularity = p, granularity

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        seed = torch.ops.fusednorm.draw_seed(x)
        m = fusednorm.noise(x.shape, self.p, seed=seed, granularity=self.granularity, dtype=torch.float64)
        return (x * m).to(x.dtype)


class Checkpointed(nn.Module):
    """Runs a block again in backward."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


class WithSpare(nn.Module):
    """A model with parameters that nothing uses."""

    def __init__(self, model):
        super().__init__()
        self.model, self.spare = model, nn.Linear(3, 3)

    def forward(self, x):
        return self.model(x)


def stock(p, seed=11, act=nn.PReLU):
    torch.manual_seed(seed)
    noise = SameNoise if p else nn.Dropout
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), act(), noise(p)),
        nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), noise(p)),
        nn.Sequential(nn.Flatten(), nn.Linear(32, 3)),
    ).double()


def fused(p, seed=11, **options):
    """The same parameters under the same keys."""
    model = stock(p, seed, **options)
    for block in model[:2]:
        keeps = isinstance(block[2], nn.PReLU)
        block[1] = fusednorm.FusedBatchNorm2d.from_torch(block[1], act=block[2], drop=p)
        block[2], block[3] = nn.Identity(), nn.Identity()
        if keeps:
            fusednorm.keep_act_keys(block, "1", "2")
    return model


def over_blocks(wrap):
    def apply(model):
        for i, block in enumerate(model):
            model[i] = wrap(block)
        return model

    return apply


# ---- training --------------------------------------------------------------------------------------------------------
def batches(count=3, rank=None):
    draw = torch.Generator().manual_seed(100 + (dist.get_rank() if rank is None else rank))
    return [
        (torch.randn(4, 3, 6, 6, generator=draw).double(), torch.randn(4, 3, generator=draw).double())
        for _ in range(count)
    ]


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def plainly(model, x, y):
    loss = F.mse_loss(model(x.to(next(model.parameters()).dtype)).to(y.dtype), y)
    loss.backward()
    return loss


def accumulating(model, x, y):
    with model.no_sync():
        plainly(model, 2 * x, y)
    return plainly(model, x, y)


def accumulating_shards(model, x, y):
    model.set_requires_gradient_sync(False)
    plainly(model, 2 * x, y)
    model.set_requires_gradient_sync(True)
    return plainly(model, x, y)


def twice(model, x, y):
    loss = F.mse_loss(model(x), y) + F.mse_loss(model(2 * x), y)
    loss.backward()
    return loss


def train(model, step=plainly, around=lambda model: contextlib.nullcontext(), steps=3, evaluate=True):
    """Name -> tensor of all that training leaves, and an evaluation after it."""
    torch.manual_seed(1000 + dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    got = {}
    with around(model):
        for x, y in batches(steps(dist.get_rank()) if callable(steps) else steps):
            optimizer.zero_grad()
            got[f"loss {len(got)}"] = step(model, x, y).detach()
            optimizer.step()
    got |= {f"gradient {i}": whole(p.grad) for i, p in enumerate(model.parameters()) if p.grad is not None}
    got |= {f"parameter {i}": whole(p) for i, p in enumerate(model.parameters())}
    got |= {f"buffer {i}": whole(b) for i, b in enumerate(model.buffers())}
    if evaluate:
        with torch.no_grad():
            got["evaluation"] = model.eval()(x)
    return got


def agree(got, expected, but=(), **tolerance):
    """Equal tensors under every name, but for names that begin with one of `but`."""
    assert got.keys() == expected.keys(), f"{list(got)} and {list(expected)}"
    compared = [name for name in got if not name.startswith(tuple(but))]
    assert compared
    for name in compared:
        torch.testing.assert_close(
            got[name], expected[name].to(got[name].dtype), **(tolerance or EXACT), msg=lambda m, n=name: f"{n}: {m}"
        )


def twins(wrap, *args, but=(), tolerance=EXACT, **options):
    """A case: both models, wrapped, learn alike."""

    def case(p, folder):
        agree(*(train(wrap(model(p)), *args, **options) for model in (fused, stock)), but, **tolerance)

    return case


# ---- DDP -------------------------------------------------------------------------------------------------------------
def ddp(**options):
    return functools.partial(DDP, **options)


def in_checkpoints(wrap):
    """Two cases, as recomputing stops where backward has what it needs: before the last fused layer of a block moves
    its statistics a second time, which stock layers do. Recomputed in full, fused layers do so too.
    """

    def wrap_blocks(model):
        return wrap(over_blocks(Checkpointed)(model))

    return {
        "checkpoint": twins(wrap_blocks, but=("buffer", "evaluation")),
        "checkpoint, in full": twins(wrap_blocks, around=lambda model: set_checkpoint_early_stop(False)),
    }


DDP_CASES = {
    "plain": twins(ddp()),
    "find_unused_parameters": twins(lambda model: DDP(WithSpare(model).double(), find_unused_parameters=True)),
    "static_graph": twins(ddp(static_graph=True)),
    "no_sync": twins(ddp(), accumulating),
    "broadcast_buffers=False": twins(ddp(broadcast_buffers=False)),
    "two forwards": twins(ddp(broadcast_buffers=False), twice),
    "join, uneven": twins(ddp(), around=lambda model: model.join(), steps=lambda rank: 2 + rank),
    "compiled": twins(lambda model: torch.compile(DDP(model), backend="aot_eager"), steps=1, evaluate=False),
} | in_checkpoints(DDP)


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------
def shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def in_bfloat16(model):
    """bfloat16 parameters in forward and backward, float32 ones and statistics at rest.

    Stock layers refuse bfloat16 parameters beside float32 statistics on the CPU, so theirs are bfloat16 too.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = model.float()
    for layer in model.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.running_mean, layer.running_var = layer.running_mean.bfloat16(), layer.running_var.bfloat16()
    return shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def compiled_block(block):
    block.compile(backend="aot_eager")
    return block


FSDP_CASES = {
    "plain": twins(shard),
    "reshard_after_forward=False": twins(functools.partial(shard, reshard_after_forward=False)),
    "accumulation": twins(shard, accumulating_shards),
    "bfloat16": twins(in_bfloat16, steps=1, evaluate=False, tolerance=HALF),
    "compiled": twins(lambda model: shard(over_blocks(compiled_block)(model)), steps=1, evaluate=False),
} | in_checkpoints(shard)


# ---- distributed checkpoints -----------------------------------------------------------------------------------------
def of_model(model, optimizer):
    return {"model": model.state_dict()}


def of_both(model, optimizer):
    """By torch's own functions, which name the optimizer's state too."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def load(state, model, optimizer):
    from torch.distributed.checkpoint.state_dict import set_state_dict

    if "optimizer" in state:
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:
        model.load_state_dict(state["model"])


def full_state(model):
    return {key: whole(value) for key, value in model.state_dict().items()}


def learn(model, optimizer, steps):
    torch.manual_seed(7)
    for x, y in batches(steps, rank=0):  # the same everywhere: what is not sharded averages nothing
        optimizer.zero_grad()
        plainly(model, x, y)
        optimizer.step()


def restored(source, target, place, states=of_model, **options):
    """A case: what `source` saved on two ranks `target` loads, placed otherwise, and they go on alike."""

    def case(p, folder):
        import torch.distributed.checkpoint as dcp

        models = shard(source(p, **options)), place(target(p, seed=12, **options))
        first, second = ((model, torch.optim.Adam(model.parameters(), 0.01)) for model in models)
        learn(*first, 2)
        learn(*second, 1)  # so that all of it has other values
        where = folder / f"{source.__name__}-{states.__name__}"
        dcp.save(states(*first), checkpoint_id=where)
        expected = full_state(first[0])
        if dist.get_rank() == 0:
            torch.save(expected, f"{where}.pt")  # for a single process
        state = states(*second)
        dcp.load(state, checkpoint_id=where)
        load(state, *second)
        agree(full_state(second[0]), expected)
        if states is of_both:
            learn(*first, 1)
            learn(*second, 1)
            agree(full_state(second[0]), full_state(first[0]))

    return case


def replicate(model):
    return model


# ELU where torch's own functions name parameters: they look for a module behind every key, and the key that
# keep_act_keys keeps leads to where PReLU was before.
CHECKPOINT_CASES = {
    f"{source.__name__} to {target.__name__}, {place.__name__}, {states.__name__}": restored(
        source, target, place, states, **options
    )
    for source, target in ((fused, stock), (stock, fused))
    for place, states, options in ((shard, of_model, {}), (replicate, of_model, {}), (shard, of_both, {"act": nn.ELU}))
}


# ---- all of them -----------------------------------------------------------------------------------------------------
def _with_strengths(cases):
    """Compilers take long: theirs once, with noise."""
    slow = {"compiled", *CHECKPOINT_CASES}
    return {
        f"{name}, p={p:g}": functools.partial(case, p)
        for name, case in cases.items()
        for p in STRENGTHS[-1 if name in slow else 0 :]
    }


def groups():
    """Group -> case -> function of a folder. Imports no part of torch that is slow to import."""
    import distributed_tensors

    return {
        "ddp": _with_strengths(DDP_CASES),
        "fsdp": _with_strengths(FSDP_CASES | CHECKPOINT_CASES),
        "dtensor": distributed_tensors.CASES,
    }


def main(group, rank, folder):
    warnings.simplefilter("ignore")  # of torch, about itself
    torch.set_num_threads(1)
    folder = Path(folder)
    store = dist.FileStore(str(folder / f"{group}-store"), WORLD_SIZE)
    limit = datetime.timedelta(seconds=60)  # for a rank that waits where the other has failed
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=limit)
    errors = {}
    for name, case in groups()[group].items():
        try:
            case(folder)
            errors[name] = None
        except Exception:
            errors[name] = traceback.format_exc()
        (folder / f"{group}-{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()
