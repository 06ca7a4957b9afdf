"""Statistics of some rows, of several processes, or renormalised, and stochastic passes as one batch: ours against what
users write in torch.

`python benchmarks/whose_statistics.py [--json F]`: two gloo processes of one thread each, whose contestants take turns
with a barrier before each; then, in one process with all threads, a training step of one layer with padding, with
renormalisation and with a strength that is a tensor, and `predict` against a loop of passes. Ratios of medians in one
run, theirs over ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

import fusednorm  # noqa: E402
from benchmarks import machine, publish  # noqa: E402
from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d  # noqa: E402

SHAPE, P, ROUNDS, SAMPLES = (32, 64, 56, 56), 0.1, 15, 32
PADDED = (64, 512, 800)  # a Tacotron 2 convolution: half of it padding


class _Shared(torch.autograd.Function):
    """The sum over processes, which is its own derivative."""

    @staticmethod
    def forward(ctx, t):
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class HandWritten(nn.Module):
    """What people write where torch's SyncBatchNorm refuses tensors on CPUs, then ReLU and dropout."""

    def __init__(self, channels: int, p: float):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(channels), nn.Dropout(p)

    def forward(self, x):
        mean, square = x.mean([0, 2, 3]), x.square().mean([0, 2, 3])
        mean, square = _Shared.apply(torch.stack([mean, square])) / dist.get_world_size()
        var = square - mean.square()
        with torch.no_grad():
            self.norm.running_mean.lerp_(mean, self.norm.momentum)
            self.norm.running_var.lerp_(var, self.norm.momentum)
        scale = (var + self.norm.eps).rsqrt() * self.norm.weight
        z = (x - mean[:, None, None]) * scale[:, None, None] + self.norm.bias[:, None, None]
        return self.drop(torch.relu(z))


def _timed(contestants: dict[str, Callable[[], object]], rounds: int, before: Callable[[], object]) -> dict[str, float]:
    """Median seconds, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, run in contestants.items():
            before()
            start = time.perf_counter()
            run()
            if turn >= 2:  # warm
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(all_) for name, all_ in seconds.items()}


def _step(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, g: torch.Tensor) -> Callable[[], object]:
    """A training step of a layer alone."""
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        layer(leaf).backward(g)

    return run


def synchronised(rank: int, folder: Path) -> None:
    """One of two processes: a training step of the layer alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    x, g = (torch.randn(SHAPE) for _ in range(2))
    layers = {
        "synchronised": FusedBatchNorm2d(64, act="relu", drop=P, process_group="world"),
        "alone": FusedBatchNorm2d(64, act="relu", drop=P),
        "hand-written": HandWritten(64, P),
    }
    found = _timed({name: _step(layer, x, g) for name, layer in layers.items()}, ROUNDS, dist.barrier)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def padded() -> dict[str, float]:
    """Of speech whose samples end early: what counts packed for a stock layer, and moments from masked sums."""
    torch.manual_seed(0)
    n, channels, length = PADDED
    x, g = (torch.randn(PADDED) for _ in range(2))
    lengths = torch.linspace(0, length, n).round().long()
    mask = torch.arange(length) < lengths[:, None]
    rows = mask[:, None]
    ours = FusedBatchNorm1d(channels, act="tanh", drop=0.5)
    stock, drop = nn.BatchNorm1d(channels), nn.Dropout(0.5)

    def packed(x: torch.Tensor) -> torch.Tensor:
        values = stock(x.movedim(1, -1)[mask])
        return drop(torch.tanh(torch.zeros_like(x.movedim(1, -1)).index_put((mask,), values).movedim(-1, 1)))

    def summed(x: torch.Tensor) -> torch.Tensor:
        count = mask.sum()
        mean = (x * rows).sum([0, 2], keepdim=True) / count
        var = ((x - mean).square() * rows).sum([0, 2], keepdim=True) / count
        with torch.no_grad():
            stock.running_mean.lerp_(mean.flatten(), 0.1)
            stock.running_var.lerp_(var.flatten(), 0.1)
        z = (x - mean) * (var + stock.eps).rsqrt() * stock.weight[:, None] + stock.bias[:, None]
        return drop(torch.tanh(z)) * rows

    contestants = {
        "masked": lambda x: ours(x, lengths=lengths),
        "without a mask": ours,
        "values packed for nn.BatchNorm1d": packed,
        "sums with a mask": summed,
    }
    return _timed({name: _step(layer, x, g) for name, layer in contestants.items()}, 5, lambda: None)


def renormalised() -> dict[str, float]:
    torch.manual_seed(0)
    x, g = (torch.randn(SHAPE) for _ in range(2))
    stock, drop = nn.BatchNorm2d(64), nn.Dropout(P)

    def written(x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(x, [0, 2, 3], correction=0)
        std, running = (var + stock.eps).sqrt(), (stock.running_var + stock.eps).sqrt()
        r = (std / running).clamp(1 / 3, 3).detach()
        d = ((mean - stock.running_mean) / running).clamp(-5, 5).detach()
        with torch.no_grad():
            stock.running_mean.lerp_(mean, 0.1)
            stock.running_var.lerp_(var, 0.1)
        xhat = (x - mean[:, None, None]) * (r / std)[:, None, None] + d[:, None, None]
        return drop(torch.relu(xhat * stock.weight[:, None, None] + stock.bias[:, None, None]))

    contestants = {
        "renormalised": FusedBatchNorm2d(64, act="relu", drop=P, renorm=(3, 5)),
        "without": FusedBatchNorm2d(64, act="relu", drop=P),
        "hand-written": written,
    }
    return _timed({name: _step(layer, x, g) for name, layer in contestants.items()}, ROUNDS, lambda: None)


def varying() -> dict[str, float]:
    """A probability that is another one in each step."""
    x, g = (torch.randn(SHAPE) for _ in range(2))
    fused = {
        "p a tensor": FusedBatchNorm2d(64, act="relu", drop=fusednorm.Dropout(torch.tensor(P))),
        "p a number": FusedBatchNorm2d(64, act="relu", drop=P),
    }
    steps = {name: _step(layer, x, g) for name, layer in fused.items()}

    def changed(name: str) -> Callable[[], object]:
        values = itertools.cycle((0.1, 0.2, 0.15))

        def run() -> None:
            fused[name].drop.p = next(values)
            steps[name]()

        return run

    return _timed({name: changed(name) for name in fused}, ROUNDS, lambda: None)


def network() -> nn.Module:
    """A small convolutional net with dropout in each block, as it is written in torch."""

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU(), nn.Dropout(0.2)]

    return nn.Sequential(*block(3, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Linear(1024, 10)).eval()


def stochastic() -> dict[str, float]:
    """Of a batch of 64 images, the mean over 32 passes with noise."""
    torch.manual_seed(0)
    stock = network()
    ours = fusednorm.fuse(stock)
    x = torch.randn(64, 3, 32, 32)
    noisy = [m for m in stock.modules() if isinstance(m, nn.Dropout)]

    @torch.no_grad()
    def loop() -> None:
        for m in noisy:
            m.train()
        torch.stack([stock(x).softmax(1) for _ in range(SAMPLES)]).mean(0)

    contestants = {
        "predict": lambda: fusednorm.predict(ours, x, SAMPLES),
        "predict, stock layers": lambda: fusednorm.predict(stock, x, SAMPLES),
        "loop": loop,
    }
    return _timed(contestants, ROUNDS, lambda: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="F", help="write the medians and the machine's facts")
    parser.add_argument("--force", action="store_true", help="run although the machine is busy")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        return synchronised(args.rank, args.folder)
    if not machine.tuned():
        machine.restart_tuned(sys.argv)
    reason = None if args.force else machine.busy()
    if reason:
        sys.exit(f"Not measured: {reason}")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--rank"]
        processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
        assert not any([process.wait() for process in processes]), "a process failed"
        rows["training step, 2 processes"] = json.loads(Path(folder, "found.json").read_text())
    rows["training step, half of it padding"] = padded()
    rows["training step, renormalised"] = renormalised()
    rows["training step, another p each time"] = varying()
    rows[f"{SAMPLES} passes"] = stochastic()
    for name, medians in rows.items():
        own, *others = medians.items()
        against = ", ".join(f"{other} {theirs / own[1]:.2f}x" for other, theirs in others)
        print(f"{name}: {own[0]} {1e3 * own[1]:.2f} ms; {against}")
    if args.json:
        args.json.write_text(
            publish.compact({"machine": machine.facts(), "rows": [{"row": n, **m} for n, m in rows.items()]})
        )


if __name__ == "__main__":
    main()
