"""Statistics shared by processes, and stochastic passes as one batch: ours against what users write in torch.

`python benchmarks/synchronised.py [--json F]`: two gloo processes of one thread each, whose contestants take turns with
a barrier before each; then, in one process with all threads, `predict` against a loop of passes. Ratios of medians in
one run, theirs over ours.
"""

from __future__ import annotations

import argparse
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
from fusednorm import FusedBatchNorm2d  # noqa: E402

SHAPE, P, ROUNDS, SAMPLES = (32, 64, 56, 56), 0.1, 15, 32


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


def synchronised(rank: int, folder: Path) -> None:
    """One of two processes: a training step of the layer alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    x, g = (torch.randn(SHAPE) for _ in range(2))

    def step(layer: nn.Module) -> Callable[[], object]:
        leaf = x.clone().requires_grad_()

        def run() -> None:
            leaf.grad = None
            layer(leaf).backward(g)

        return run

    layers = {
        "synchronised": FusedBatchNorm2d(64, act="relu", drop=P, process_group="world"),
        "alone": FusedBatchNorm2d(64, act="relu", drop=P),
        "hand-written": HandWritten(64, P),
    }
    found = _timed({name: step(layer) for name, layer in layers.items()}, ROUNDS, dist.barrier)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


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
