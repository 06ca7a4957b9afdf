"""Two processes that train one net: with shared statistics they are one process, without they are not.

    python examples/two_processes.py [--out DIR] [--seed 0] [--quick]

Data-parallel training gives each process a part of the batch. Each BatchNorm then sees its part alone, and small parts
have poor statistics. `fusednorm.convert_sync_batchnorm` lets the processes share them, over gloo on CPUs too, and with
`global_noise=True` they drop what one process would. So two processes on half a batch each must have the losses of one
process on the whole, to rounding: here in float64, beside two processes that do not share. They run on this
machine, under DistributedDataParallel.
"""

from __future__ import annotations

import datetime
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402  (what follows is found through the line above, or by it)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import fusednorm  # noqa: E402
from examples import common  # noqa: E402

PROCESSES = 2
BATCH = 16  # of all processes together
WAYS = {
    "one": "one process, the whole batch",
    "shared": "two processes, statistics shared",
    "apart": "two processes, each its own statistics",
}


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        fusednorm.FusedBatchNorm2d(8, act="relu", drop=0.1, global_noise=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        fusednorm.FusedBatchNorm2d(16, act="relu", drop=0.1, global_noise=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, 10),
    ).double()


def run(way: str, seed: int, steps: int) -> tuple[list[float], float]:
    """The losses of this process's part of the batches, and the loss of the trained net on the test images."""
    images, labels, test_images, test_labels = common.digits()
    model = net(seed)
    if way == "shared":
        fusednorm.convert_sync_batchnorm(model)
    outer = model if way == "one" else DistributedDataParallel(model)
    rank, parts = (0, 1) if way == "one" else (dist.get_rank(), PROCESSES)

    def loss(batch):
        mine = batch.chunk(parts)[rank]
        return cross_entropy(outer(images[mine].double()), labels[mine])

    losses = common.train(outer, loss, common.batches(len(images), BATCH, steps, seed), steps)
    with torch.no_grad():
        return losses, cross_entropy(model(test_images.double()), test_labels).item()


def process(rank: int, meeting: str, seed: int, steps: int) -> dict[str, tuple[list[float], float]]:
    """One of the two: both ways one after another."""
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, PROCESSES)
    limit = datetime.timedelta(seconds=60)  # else one would wait for another that has failed
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=limit)
    try:
        return {way: run(way, seed, steps) for way in WAYS if way != "one"}
    finally:
        dist.destroy_process_group()


def study(seed: int, steps: int) -> dict[str, tuple[np.ndarray, float]]:
    """Of each way, the losses of the whole batches and the loss on the test images."""
    losses, test = run("one", seed, steps)
    found = {"one": (np.array(losses), test)}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        jobs = [pool.submit(process, rank, f"{folder}/meeting", seed, steps) for rank in range(PROCESSES)]
        parts = [job.result() for job in jobs]
    for way in parts[0]:
        # Parts are of one size: the mean of their means is the batch's.
        found[way] = np.mean([part[way][0] for part in parts], 0), parts[0][way][1]
    return found


def apart(found: dict, way: str) -> np.ndarray:
    """How far the losses of a way are from those of one process, beside these, step by step."""
    one = found["one"][0]
    return abs(found[way][0] - one) / one


def draw(figure, found: dict) -> None:
    curves, gaps = figure.subplots(1, 2)
    styles = {"one": ("C3", "-", 4), "shared": ("C0", "--", 1.2), "apart": ("C1", "-", 1.2)}
    for way, (losses, _) in found.items():
        colour, line, width = styles[way]
        curves.plot(np.arange(1, len(losses) + 1), losses, line, lw=width, color=colour, label=WAYS[way])
        if way != "one":
            # An equal loss has no place on such an axis: it is drawn at the spacing of float64.
            gap = np.maximum(apart(found, way), np.finfo(float).eps)
            gaps.plot(np.arange(1, len(losses) + 1), gap, lw=1, color=colour)
    curves.set(xlabel="step", ylabel="training loss of the whole batch", ylim=(0, None))
    gaps.set(xlabel="step", yscale="log", ylim=(1e-17, 10))
    gaps.set_ylabel("difference from one process, of its loss")
    gaps.grid(axis="y")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside upper center", ncols=3)


def main() -> int:
    arguments = common.options(__doc__)
    steps = 20 if arguments.quick else 200
    found = study(arguments.seed, steps)
    print(f"{steps} steps, batches of {BATCH}, {BATCH // PROCESSES} in each of {PROCESSES} processes, float64")
    for way, (_, test) in found.items():
        said = "" if way == "one" else f", training losses at most {apart(found, way).max():.0e} of them away"
        print(f"{WAYS[way]}: test loss {test:.4f}{said}")
    common.pictures("two_processes", arguments.out, (9, 3.6), lambda figure: draw(figure, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
