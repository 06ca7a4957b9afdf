"""Padded sequences: what a BatchNorm learns of silence, and what becomes of it when a sequence comes alone.

    python examples/padded.py [--out DIR] [--seed 0] [--quick]

Recordings differ in length, and a batch of them is padded with zeros. A BatchNorm that sees these takes them for data:
its variance is too small, and the more so the more padding there was; it also turns zeros into other numbers, which the
next convolution reads. With `layer(x, lengths=lengths)` padding is neither in the statistics nor worked on, and is
zero in the output. The sequences are generated: wavering tones of four pitches in noise, 25 to 200 steps long. Nets are
trained both ways on padded batches, and asked for the pitch of new sequences, in padded batches and one by one. Both
take the mean over the true length at their end.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402  (what follows is found through the line above, or by it)
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from examples import common  # noqa: E402
from fusednorm import FusedBatchNorm1d  # noqa: E402

BATCH, SHORTEST, LONGEST, CHANNELS = 32, 25, 200, 24
PITCHES = 0.1, 0.14, 0.18, 0.22  # cycles a step
NOISE = 1.6  # beside tones of amplitude 1
WAYS = {"padding taken for data": False, "layer(x, lengths=lengths)": True}
IGNORED, TOLD = WAYS
ASKED = "in padded batches", "one by one"


def sequences(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, 1, LONGEST) with zeros behind the end, lengths, labels."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=draw)

    labels = torch.randint(len(PITCHES), (count,), generator=draw)
    # Most are short, as utterances are: a padded batch is mostly padding.
    lengths = (SHORTEST + (LONGEST - SHORTEST) * uniform(0, 1) ** 2).long()
    time = torch.arange(LONGEST)
    along = time / lengths
    waver, start = 0.03 * torch.sin(2 * math.pi * uniform(1, 4) * along), uniform(0, 2 * math.pi)
    pitch = torch.tensor(PITCHES)[labels, None] + uniform(-0.01, 0.01) + waver
    tone = torch.sin(start + 2 * math.pi * pitch.cumsum(1)) + NOISE * torch.randn(count, LONGEST, generator=draw)
    tone = torch.where(time < lengths, tone, 0)
    return tone.unsqueeze(1), lengths.squeeze(1), labels


class Net(nn.Module):
    def __init__(self, seed: int, told: bool):
        super().__init__()
        torch.manual_seed(seed)
        sizes = 1, CHANNELS, CHANNELS, CHANNELS
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, 9, padding=4, bias=False) for before, after in zip(sizes, sizes[1:], strict=False)
        )
        self.norms = nn.ModuleList(FusedBatchNorm1d(CHANNELS, act="relu", drop=0.1) for _ in sizes[1:])
        self.last = nn.Linear(CHANNELS, len(PITCHES))
        self.told = told

    def forward(self, x, lengths):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x), lengths=lengths if self.told else None)
        inside = torch.arange(x.shape[2]) < lengths[:, None]
        return self.last((x * inside.unsqueeze(1)).sum(2) / lengths[:, None])


def cut(x, lengths, labels, batch: torch.Tensor) -> tuple:
    """A batch as a loader gives it: no longer than its longest sequence."""
    lengths = lengths[batch]
    return x[batch, :, : int(lengths.max())], lengths, labels[batch]


def scores(net: Net, data: tuple, size: int) -> torch.Tensor:
    with torch.inference_mode():
        every = torch.arange(len(data[0])).split(size)
        return torch.cat([net(*cut(*data, batch)[:2]) for batch in every])


def run(told: bool, seed: int, data: tuple, test: tuple, steps: int) -> dict:
    """Accuracy in padded batches and one by one, how far the answers are apart, and the first norm's variances."""
    net = Net(seed, told)

    def loss(batch):
        x, lengths, labels = cut(*data, batch)
        return cross_entropy(net(x, lengths), labels)

    common.train(net, loss, common.batches(len(data[0]), BATCH, steps, seed), steps)
    many, one = scores(net, test, BATCH), scores(net, test, 1)
    with torch.no_grad():
        packed = pack(net.convolutions[0](data[0]), data[1])
    return {
        "accuracy": [common.accuracy(found, test[2]) for found in (many, one)],
        "apart": (many - one).abs().max().item(),
        "variance": (net.norms[0].running_var / packed.var(0)).tolist(),
    }


def pack(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The values that count, one below another: (number of them, channels)."""
    return x.transpose(1, 2)[torch.arange(x.shape[2]) < lengths[:, None]]


def told_against_packed(seed: int) -> float:
    """Largest difference of a padded batch with its lengths from torch's BatchNorm on the packed values, in float64:
    outputs, running statistics."""
    x, lengths, _ = sequences(BATCH, seed)
    x = (x * torch.linspace(1, 2, 3)[:, None]).double()
    stock, ours = nn.BatchNorm1d(3).double(), FusedBatchNorm1d(3).double()
    pairs = [(stock(pack(x, lengths)), pack(ours(x, lengths=lengths), lengths))]
    pairs += [(stock.running_mean, ours.running_mean), (stock.running_var, ours.running_var)]
    return max((a - b).abs().max().item() for a, b in pairs)


def draw(figure, data: tuple, found: dict) -> None:
    batch, variances, right = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    x, lengths, _ = (part[:BATCH] for part in data)
    shown = x[:, 0].masked_fill(torch.arange(LONGEST) >= lengths[:, None], math.nan)
    limit = x.abs().max().item()
    batch.imshow(shown, aspect="auto", cmap="RdBu_r", interpolation="nearest", vmin=-limit, vmax=limit)
    padding = 1 - lengths.sum().item() / (len(x) * lengths.max().item())
    batch.set(title=f"a batch: {padding:.0%} is padding (blank)", xlabel="step", ylabel="sequence")
    for place, (way, colour) in enumerate(zip(WAYS, ("C1", "C0"), strict=True)):
        values = np.concatenate([run["variance"] for run in found[way]])
        spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(values))
        variances.plot(place + spread, values, "o", ms=2.5, alpha=0.6, color=colour)
        runs = np.array([run["accuracy"] for run in found[way]])
        for index, values in enumerate(runs.T):
            mean, low, _ = common.interval(values)
            bar = right.bar(index + 0.38 * (place - 0.5), mean, 0.36, color=colour, label=way if index == 0 else None)
            right.errorbar(index + 0.38 * (place - 0.5), mean, mean - low, color="C3", capsize=2)
            right.bar_label(bar, [f"{mean:.1%}"], label_type="center", color="white", fontsize="small")
    variances.axhline(1, color="C3", lw=0.8)
    variances.set_xticks([])
    variances.set(title="running variance of a channel\nover that of the sequences", ylim=(0, None), xlim=(-0.5, 1.5))
    right.set_xticks(range(2), ASKED)
    right.set(title="right answers", ylim=(0, 1))
    right.yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def main() -> int:
    arguments = common.options(__doc__)
    seeds, count, steps = (2, 128, 20) if arguments.quick else (5, 1024, 200)
    print(f"padded with lengths against packed: {told_against_packed(arguments.seed):.0e} apart at most")
    found = {way: [] for way in WAYS}
    for seed in range(arguments.seed, arguments.seed + seeds):
        data, test = sequences(count, 2 * seed), sequences(count // 2, 2 * seed + 1)
        for way, told in WAYS.items():
            found[way].append(run(told, seed, data, test, steps))
    for way, runs in found.items():
        ratio = np.mean([run["variance"] for run in runs])
        apart = max(run["apart"] for run in runs)
        rights = np.array([run["accuracy"] for run in runs])
        print(f"{way}:")
        print(f"  running variance of the first norm over that of the sequences: {ratio:.2f}")
        print(f"  right {ASKED[0]} {rights[:, 0].mean():.1%}, {ASKED[1]} {rights[:, 1].mean():.1%}")
        print(f"  an answer {ASKED[1]} is up to {apart:.0e} away from that {ASKED[0]}")
    for index, how in enumerate(ASKED):
        told, ignored = ([run["accuracy"][index] for run in found[way]] for way in (TOLD, IGNORED))
        print(f"lengths told less ignored, {how}: {common.difference(told, ignored, '.1%')}")
    common.pictures("padded", arguments.out, (10, 3.8), lambda figure: draw(figure, data, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
