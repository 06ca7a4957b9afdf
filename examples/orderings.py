"""In which order should convolution, BatchNorm, activation, dropout and pooling stand? Ten orders, measured.

    python examples/orderings.py --quick                     # 3 seeds, little training: under a minute
    python examples/orderings.py --out examples/results      # the study; interrupted, the same command goes on
    python examples/orderings.py --out examples/results --plot-only

A table in an answer on Stack Overflow gives the test loss of a small net on MNIST for ten orders, from one run of each.
Here the same ten train on the 8x8 digits that scikit-learn ships, many times: the runs of a seed share the split of the
data, the initial weights, the batches and the seeds of the noise, so that orders are compared pair by pair. Row 0 has
no dropout: what shows there is not dropout's doing. The net is the table's, cut to the size of the images: two modules
of a 3x3 convolution (padded, unlike there) and the order, with dropout rates 0.2 and 0.3, a dense layer, a classifier;
Adam as in Keras, BatchNorm as in torch. It is measured early in training, while it is not yet as sure as it may be, and
late, as the answers depend on that.

Beside the loss there is the loss after `fusednorm.recalibrate`, which takes the noise out of the running statistics
(dropout ahead of a BatchNorm shifts them: Li et al., arXiv 1801.05134), and after temperature scaling (Guo et al.,
arXiv 1706.04599), which takes under- and overconfidence out of the loss. Whether the table's claims hold is computed
from the runs. Intervals are of 95 %, and speak of these images, over splits, initial weights and noise; not of other
data.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402  (what follows is found through the line above, or by it)
import torch  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import fusednorm  # noqa: E402
from examples.common import interval  # noqa: E402

# Number in the original table: the order behind the convolution, in the words of a fused layer, and the original loss.
ORDERS = {
    0: ("norm-act-pool", None),
    1: ("act-drop-norm-pool", 0.042614),
    2: ("act-drop-pool-norm", 0.050065),
    3: ("act-norm-pool-drop", 0.049113),
    4: ("act-norm-drop-pool", 0.068096),
    5: ("norm-act-drop-pool", 0.038887),
    6: ("norm-act-pool-drop", 0.041261),
    7: ("norm-drop-act-pool", 0.051425),
    8: ("drop-act-norm-pool", 0.048278),
    9: ("drop-act-pool-norm", 0.047220),
    10: ("drop-norm-act-pool", 0.032382),
}
TABLE = tuple(ORDERS)[1:]
REFERENCE = 5  # what differences are taken to: the order of most textbooks, and the default of the fused layer
TWINS = ((5, 7), (1, 8), (2, 9))  # one function under the same noise if act(m x) = m act(x) for m >= 0: ReLU, not ELU
WIDTH = 164  # of the report, wherever it is printed
ACTIVATIONS = {"elu": nn.ELU, "relu": nn.ReLU}


def name(number: int) -> str:
    return ORDERS[number][0].title().replace("Norm", "BN")


def follows(first: str, second: str) -> list[int]:
    """The table's orders in which `second` stands somewhere behind `first`."""
    return [k for k in TABLE if ORDERS[k][0].index(first) < ORDERS[k][0].index(second)]


@dataclass(frozen=True)
class Settings:
    """All that a run depends on besides activation, order and seed. Runs of other settings do not share a file."""

    layers: str = "fused"
    measured: tuple[int, ...] = (20, 40, 80)  # after so many epochs; the last ends the training
    rates: tuple[float, float] = (0.2, 0.3)  # of dropout, as in the table
    batch: int = 32
    channels: tuple[int, int] = (16, 32)
    dense: int = 64
    train: int = 600
    validation: int = 300  # for the temperature; the remaining 897 are for testing
    torch: str = torch.__version__


# ---- one run ---------------------------------------------------------------------------------------------------------
class Dropout(nn.Dropout):
    """nn.Dropout with the noise of the fused layers: for the orders in which pooling parts it from the norm."""

    def forward(self, input):
        return fusednorm.functional.dropout(input, self.p, self.training)


def block(order: str, channels: int, activation: str, p: float, layers: str) -> list[nn.Module]:
    """What stands behind a convolution: stock modules word by word, or one fused layer for all between two poolings."""
    made = {"act": ACTIVATIONS[activation], "pool": lambda: nn.MaxPool2d(2), "drop": lambda: Dropout(p)}
    if layers == "stock":
        made |= {"norm": lambda: nn.BatchNorm2d(channels), "drop": lambda: nn.Dropout(p)}
        return [made[word]() for word in order.split("-")]
    modules = []
    for i, part in enumerate(order.split("pool")):
        words = part.strip("-").split("-") if part else []
        modules += [made["pool"]()] if i else []
        if "norm" in words:
            act, drop = activation if "act" in words else None, p if "drop" in words else None
            modules.append(fusednorm.FusedBatchNorm2d(channels, act=act, drop=drop, order="-".join(words)))
        else:
            modules += [made[word]() for word in words]
    return modules


def net(number: int, activation: str, seed: int, settings: Settings) -> nn.Sequential:
    """Every order has the same parameters, made in the same sequence: the same seed gives the same weights."""
    torch.manual_seed(seed)
    modules, before = [], 1
    for channels, p in zip(settings.channels, settings.rates, strict=True):
        modules += [nn.Conv2d(before, channels, 3, padding=1)]
        modules += block(ORDERS[number][0], channels, activation, p, settings.layers)
        before = channels
    dense = [nn.Flatten(), nn.Linear(before * 2 * 2, settings.dense), ACTIVATIONS[activation]()]
    return nn.Sequential(*modules, *dense, nn.Linear(settings.dense, 10))


@functools.cache
def images_and_labels():
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def digits(seed: int, settings: Settings) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Training, validation and test part of the seed's own split: images (N, 1, 8, 8), standardised, and labels."""
    from sklearn.model_selection import train_test_split

    parts, rest = [], images_and_labels()
    for size in (settings.train, settings.validation):
        part, rest_images, labels, rest_labels = train_test_split(
            *rest, train_size=size, random_state=seed, stratify=rest[1]
        )
        parts.append((part, labels))
        rest = rest_images, rest_labels
    parts.append(rest)
    mean, std = parts[0][0].mean(), parts[0][0].std()
    return [
        (torch.tensor((x - mean) / std, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y)) for x, y in parts
    ]


def steps(model: nn.Module, images, labels, seed: int, epochs: int, batch: int):
    """Trains, and yields the loss of every step. Batches and noise depend on the seed alone."""
    # Keras's eps, as the table is from there. A bias directly before a norm has no gradient but rounding, which Adam
    # takes for one where it is larger than eps.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-7)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed + 1_000_000)  # the noise's, apart from the weights'
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).split(batch):
            optimizer.zero_grad()
            loss = cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            yield loss.item()


@torch.no_grad()
def logits(model: nn.Module, images) -> torch.Tensor:
    """In float64, so that losses near zero are what they are."""
    return model.eval()(images).double()


def nll(scores, labels) -> float:
    return cross_entropy(scores, labels).item()


def calibration_error(scores, labels, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence|, averaged over bins of equal width in confidence."""
    confidence, predicted = scores.softmax(1).max(1)
    gaps = (predicted == labels).double() - confidence
    where = (confidence * bins).long().clamp_max(bins - 1)
    return torch.zeros(bins, dtype=gaps.dtype).index_add_(0, where, gaps).abs().sum().item() / len(labels)


def temperature(scores, labels) -> float:
    """The T > 0 that makes scores / T likeliest: above 1 for an overconfident net."""
    from scipy.optimize import minimize_scalar

    return math.exp(minimize_scalar(lambda t: nll(scores / math.exp(t), labels), bounds=(-3, 3), method="bounded").x)


def measure(model: nn.Module, images, validation, test) -> dict[str, float]:
    """What is reported of a net; it stays as it is."""
    model, found = copy.deepcopy(model), {}
    for suffix in ("", "_recalibrated"):
        if suffix:
            # The whole training set as one batch: exact for every layer.
            ratios = fusednorm.recalibrate(model, [images], progress=False)
            found |= {f"shift{i}": ratio.median().item() for i, ratio in enumerate(ratios.values(), 1)}
        scores, labels = logits(model, test[0]), test[1]
        t = temperature(logits(model, validation[0]), validation[1])
        found |= {
            f"error{suffix}": (scores.argmax(1) != labels).double().mean().item(),
            f"nll{suffix}": nll(scores, labels),
            f"ece{suffix}": calibration_error(scores, labels),
            f"temperature{suffix}": t,
            f"nll{suffix}_scaled": nll(scores / t, labels),
        }
    return {quantity: round(value, 7) for quantity, value in found.items()}


def run(activation: str, number: int, seed: int, settings: Settings) -> dict:
    """Trains one net."""
    start = time.process_time()
    (images, labels), validation, test = digits(seed, settings)
    model = net(number, activation, seed, settings)
    measured = {}
    per_epoch = math.ceil(len(images) / settings.batch)
    for step, _ in enumerate(steps(model, images, labels, seed, settings.measured[-1], settings.batch), 1):
        epoch, rest = divmod(step, per_epoch)
        if rest == 0 and epoch in settings.measured:
            measured[str(epoch)] = measure(model, images, validation, test)
    seconds = round(time.process_time() - start, 2)
    return {"activation": activation, "order": number, "seed": seed, "measured": measured, "seconds": seconds}


# ---- all runs, resumable ---------------------------------------------------------------------------------------------
class Runs:
    """A file of one JSON object per line: settings and command first, then a run as soon as it is finished."""

    def __init__(self, path: Path, settings: Settings | None = None, command: str = ""):
        """Without `settings` takes what the file has.

        Raises:
            SystemExit: the file is of other settings, or of none.
        """
        self.path, self.done = path, {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith(b"\n")]  # a last one without was cut off
        if not whole:
            if settings is None:
                raise SystemExit(f"{path}: no runs there to report; leave --plot-only away")
            path.parent.mkdir(parents=True, exist_ok=True)
            head = json.dumps({"command": command, "settings": asdict(settings)})
            self.head = json.loads(head)  # as a later run finds it
            path.write_text(head + "\n")
            return
        self.head, *runs = whole
        if settings is not None and self.head["settings"] != json.loads(json.dumps(asdict(settings))):
            raise SystemExit(f"{path}: made with {self.head['settings']}; choose another --out, or remove it")
        self.done = {self.key(r): r for r in runs}
        if len(whole) < len(lines):
            os.truncate(path, sum(map(len, lines[:-1])))

    @staticmethod
    def key(result: dict) -> tuple[str, int, int]:
        return result["activation"], result["order"], result["seed"]

    def add(self, result: dict) -> None:
        self.done[self.key(result)] = result
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def tables(self, activation: str, epoch: int) -> dict[str, np.ndarray]:
        """{quantity: (complete seeds, all orders)}"""
        rows = [
            [self.done[activation, k, seed]["measured"][str(epoch)] for k in ORDERS] for seed in self.seeds(activation)
        ]
        return {quantity: np.array([[cell[quantity] for cell in row] for row in rows]) for quantity in rows[0][0]}

    def comparable(self) -> list[str]:
        """Activations with seeds enough for an interval."""
        return [activation for activation in ACTIVATIONS if len(self.seeds(activation)) >= 3]

    def seeds(self, activation: str) -> list[int]:
        """Those of which every order is finished: only they can be compared in pairs."""
        found = {seed for a, _, seed in self.done if a == activation}
        return sorted(seed for seed in found if all((activation, k, seed) in self.done for k in ORDERS))


def study(runs: Runs, seeds: int, settings: Settings, jobs: int) -> bool:
    """Does what is missing, seed by seed; returns whether it came to the end."""
    wanted = [(a, k, seed) for seed in range(seeds) for a in ACTIVATIONS for k in ORDERS]
    missing = [key for key in wanted if key not in runs.done]
    if not missing:
        return True
    # Spawned, as a fork of a process with threads (torch's) may hang.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: an interrupt is for this process to handle
    futures = [pool.submit(run, *key, settings) for key in missing]
    signal.signal(signal.SIGINT, handler)
    try:
        with Progress(*Progress.get_default_columns(), "{task.completed}/{task.total}") as progress:
            task = progress.add_task("training", total=len(wanted), completed=len(wanted) - len(missing))
            for future in as_completed(futures):
                result = future.result()
                runs.add(result)
                last = result["measured"][str(settings.measured[-1])]
                what = f"seed {result['seed']}, {result['activation']}, {name(result['order'])}"
                progress.update(task, advance=1, description=f"{what}: error {last['error']:.1%}")
    except KeyboardInterrupt:
        done = sum(key in runs.done for key in wanted)
        print(f"interrupted: {done} of {len(wanted)} runs are in {runs.path}; the same command goes on")
        return False
    finally:
        pool.shutdown(cancel_futures=True)
    return True


# ---- what the runs say -----------------------------------------------------------------------------------------------
def rank_correlation(rows: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Spearman's, of each row with `column`, or with the row of the same place."""
    from scipy.stats import rankdata

    def standard(x):
        ranks = rankdata(x, axis=-1)
        ranks = ranks - ranks.mean(-1, keepdims=True)
        return ranks / np.maximum(np.linalg.norm(ranks, axis=-1, keepdims=True), 1e-30)

    return (standard(rows) * standard(column)).sum(-1)


@dataclass(frozen=True)
class Ranking:
    """Our ranking of the table's orders by loss, against the original one."""

    correlation: float
    low: float  # 95 % bootstrap interval over the seeds
    high: float
    chance: float  # share of all rankings that agree, or disagree, as much
    halves: float  # correlation of the rankings by two halves of our own seeds, on average
    ranks: dict[int, tuple[float, float, float]]  # order: rank and its bootstrap interval

    def verdict(self) -> str:
        if self.chance < 0.05 and self.low > 0:
            return "holds"
        if self.chance < 0.05 and self.high < 0:
            return "the opposite"
        return "does not hold" if self.halves > 0.7 else "undecided"


def ranking(losses: np.ndarray, draws: int = 4000) -> Ranking:
    """losses: (seeds, all orders)."""
    from scipy.stats import rankdata

    ours, random = losses[:, list(TABLE)], np.random.default_rng(0)
    original = np.array([ORDERS[k][1] for k in TABLE])
    count = len(ours)
    resampled = ours[random.integers(count, size=(draws, count))].mean(1)
    low, high = np.quantile(rank_correlation(resampled, original), (0.025, 0.975))
    correlation = rank_correlation(ours.mean(0), original).item()
    shuffled = random.permuted(np.tile(original, (draws, 1)), axis=1)
    chance = (abs(rank_correlation(ours.mean(0), shuffled)) >= abs(correlation) - 1e-12).mean().item()
    mixed = random.permuted(np.tile(np.arange(count), (draws, 1)), axis=1)
    first, second = (ours[mixed[:, part]].mean(1) for part in (slice(count // 2), slice(count // 2, None)))
    middle, ends = rankdata(ours.mean(0)), np.quantile(rankdata(resampled, axis=1), (0.025, 0.975), axis=0)
    ranks = {k: (middle[i], *ends[:, i]) for i, k in enumerate(TABLE)}
    halves = rank_correlation(first, second).mean().item()
    return Ranking(correlation, float(low), float(high), chance, halves, ranks)


def sign_verdict(low: float, high: float, expected: int) -> str:
    if low <= 0 <= high:
        return "undecided"
    return "holds" if (low > 0) == (expected > 0) else "the opposite"


def rank_verdict(low: float, high: float, best: bool) -> str:
    """Whether an order is among the three best (or worst) of the ten, by the interval of its rank."""
    if not best:
        low, high = 11 - high, 11 - low
    return "holds" if high <= 3 else "does not hold" if low > 3 else "undecided"


def claims(get: dict[str, np.ndarray]) -> list[tuple[str, str, str]]:
    """(claim, verdict, what is found here), all computed from {quantity: (seeds, all orders)}."""
    early, late = follows("drop", "norm"), follows("norm", "drop")
    first, second = follows("norm", "act"), follows("act", "norm")
    original = {k: loss for k, (_, loss) in ORDERS.items()}
    gain = get["nll_recalibrated"] - get["nll"]
    found = []

    def compare(claim, values, these, those, expected, form="+.4f"):
        mean, low, high = interval(values[:, these].mean(1) - values[:, those].mean(1))
        verdict = sign_verdict(low, high, expected)
        found.append((claim, verdict, f"{mean:{form}} ({low:{form}}, {high:{form}})"))

    def original_gap(these, those):
        return np.mean([original[k] for k in these]) - np.mean([original[k] for k in those])

    order = ranking(get["nll"])
    text = f"rank correlation {order.correlation:+.2f}\n({order.low:+.2f}, {order.high:+.2f}); as much by "
    text += f"chance: {order.chance:.0%}; our halves: {order.halves:+.2f}"
    found.append(("The table's ranking of the ten by loss", order.verdict(), text))
    for which, choose in (("best", min), ("worst", max)):
        k = choose(TABLE, key=original.get)
        rank, low, high = order.ranks[k]
        verdict = rank_verdict(low, high, which == "best")
        claim = f"Its {which}, {k} {name(k)}, is among the three {which}"
        found.append((claim, verdict, f"rank {rank:.0f} of 10 ({low:.0f}, {high:.0f})"))
    gap = original_gap(first, second)
    compare(f"BN before activation has the lower loss (there {gap:+.4f})", get["nll"], first, second, -1)
    gap = original_gap(early, late)
    compare(f"Dropout before BN has the lower loss (there {gap:+.4f})", get["nll"], early, late, -1)
    compare(
        "Dropout before BN has the higher error (Li et al.), in points", get["error"] * 100, early, late, +1, "+.2f"
    )
    highest = sorted(TABLE, key=lambda k: -get["nll"][:, k].mean())[: len(early)]
    count = len(set(highest) & set(early))
    verdict = "holds" if count == len(early) else "does not hold"
    claim = f"The {len(early)} highest losses are those with dropout before BN"
    found.append((claim, verdict, f"{count} of {len(early)}: highest {', '.join(map(str, highest))}"))
    # The maximum of noisy values is larger than that of their means: the mean shifts too.
    between, apart = [2, 9], [1, 8]
    claim = "Pooling between dropout and BN (2 and 9 against 1 and 8) has the higher loss"
    compare(claim, get["nll"], between, apart, +1)
    compare("Dropout before BN makes less sure: lower temperature", get["temperature"], early, late, -1, "+.3f")
    tests = [interval(gain[:, k], len(TABLE)) for k in TABLE]
    lower, higher = sum(high < 0 for _, _, high in tests), sum(low > 0 for _, low, _ in tests)
    verdict = "holds" if lower > len(TABLE) / 2 and not higher else "does not hold" if higher else "undecided"
    text = f"lower in {lower} of 10, higher in {higher}\n"
    text += ", ".join(
        f"{word} {gain[:, k].mean():+.4f}" for word, k in (("no dropout", [0]), ("before", early), ("behind", late))
    )
    found.append(("Recalibration lowers the loss", verdict, text))
    compare("It lowers it more where dropout stands before BN", gain, early, late, -1)
    compare("After it dropout before BN still has the higher loss", get["nll_recalibrated"], early, late, +1)
    compare("After temperature scaling it has the higher loss", get["nll_scaled"], early, late, +1)
    compare("After both it has the higher loss", get["nll_recalibrated_scaled"], early, late, +1)
    most = max(abs(get["nll"][:, a] - get["nll"][:, b]).max() for a, b in TWINS)
    pairs = ", ".join(f"{a} = {b}" for a, b in TWINS)
    verdict = "equal" if most < 1e-6 else "different"
    found.append((f"{pairs}: must be so for ReLU, not for ELU", verdict, f"losses differ by {most:.0e} at most"))
    return found


# Title, quantity, factor, format.
COLUMNS = (
    ("error %", "error", 100, ".2f"),
    ("NLL", "nll", 1, ".4f"),
    ("ECE %", "ece", 100, ".2f"),
    ("NLL re-\ncalibrated", "nll_recalibrated", 1, ".4f"),
    ("NLL\ntemperature", "nll_scaled", 1, ".4f"),
)


def levels(runs: Runs, activation: str, epoch: int) -> Table:
    """A line for each order."""
    get, count = runs.tables(activation, epoch), len(runs.seeds(activation))
    title = f"{ACTIVATIONS[activation].__name__} after {epoch} epochs, {count} seeds: mean ± 95 %"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    titles = ("", "order", "loss in\nthe table", *(title for title, *_ in COLUMNS), f"NLL less\nthat of {REFERENCE}")
    for title in (*titles, "NLL change by\nrecalibrating", "temper-\nature", "variance\nshift"):
        table.add_column(title, justify="left" if title in ("", "order") else "right", no_wrap=True)

    def cell(values, form):
        mean, low, _ = interval(values)
        return f"{mean:{form}} ±{mean - low:{form.lstrip('+')}}".replace("±0.", "±.")

    for k, (_, loss) in ORDERS.items():
        cells = [cell(get[quantity][:, k] * factor, form) for _, quantity, factor, form in COLUMNS]
        cells.append("" if k == REFERENCE else cell(get["nll"][:, k] - get["nll"][:, REFERENCE], "+.4f"))
        cells.append(cell(get["nll_recalibrated"][:, k] - get["nll"][:, k], "+.4f"))
        cells.append(f"{get['temperature'][:, k].mean():.2f}")
        cells.append(", ".join(f"{np.median(get[shift][:, k]):.2f}" for shift in ("shift1", "shift2")))
        table.add_row(str(k), name(k), "" if loss is None else f"{loss:.4f}", *cells, end_section=k == 0)
    return table


def report(runs: Runs, console: Console) -> None:
    settings, minutes = runs.head["settings"], sum(r["seconds"] for r in runs.done.values()) / 60
    console.print(f"{runs.head['command']}    ({len(runs.done)} runs, {minutes:.0f} minutes of one core)", markup=False)
    console.print(", ".join(f"{k} {v}" for k, v in settings.items()), markup=False)
    shown = runs.comparable()
    if len(shown) < len(ACTIVATIONS):
        console.print("an activation with fewer than 3 complete seeds is left out: they say nothing")
    for activation in shown:
        console.print()
        console.print(levels(runs, activation, settings["measured"][-1]))
    if not shown:
        return
    console.print(
        "NLL temperature: after dividing the logits by the temperature that fits the validation part. Variance shift: "
        "running variance\nwith the noise off over that with it on, median channel, first and second BatchNorm. "
        "Differences are paired by seed.\n"
    )
    table = Table(title="What holds", title_justify="left", show_lines=True)
    table.add_column("claim", ratio=4)
    columns = []
    for activation in shown:
        for epoch in (settings["measured"][0], settings["measured"][-1]):
            table.add_column(f"{ACTIVATIONS[activation].__name__}, {epoch} epochs", ratio=5)
            columns.append(claims(runs.tables(activation, epoch)))
    for row in zip(*columns, strict=True):
        table.add_row(row[0][0], *(f"[bold]{verdict}[/]\n{text}" for _, verdict, text in row))
    console.print(table)
    console.print(
        "Numbers are differences of means over the orders in question, with their 95 % interval, each on its own. Rank "
        "correlation: its interval is over our\nseeds; by chance: of a random ranking; our halves: between rankings by "
        "two halves of our own seeds, which is what there is to agree with."
    )


def plot(runs: Runs, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {"nll": ("as trained", "o", "-"), "nll_recalibrated": ("recalibrated", "s", "--")}
    kinds |= {"nll_scaled": ("temperature scaled", "^", ":")}
    early, late = follows("drop", "norm"), follows("norm", "drop")
    colours = {k: "#c44e52" if k in early else "#4c72b0" if k in late else "#8c8c8c" for k in ORDERS}
    numbers = [0, *sorted(TABLE, key=lambda k: ORDERS[k][1])]  # from the table's best to its worst
    epochs = runs.head["settings"]["measured"]
    shown = runs.comparable()
    figure, axes = plt.subplots(
        len(shown), 3, figsize=(13, 3.9 * len(shown)), width_ratios=(2.4, 1, 1), layout="constrained", squeeze=False
    )
    for activation, (losses, scatter, gap) in zip(shown, axes, strict=True):
        last = runs.tables(activation, epochs[-1])
        # Some splits are harder than others, for all orders alike: that is no part of the intervals.
        level = last["nll"].mean(1, keepdims=True) - last["nll"].mean()
        for offset, (quantity, (label, marker, line)) in zip((-0.2, 0, 0.2), kinds.items(), strict=True):
            for x, k in enumerate(numbers):
                mean, low, _ = interval((last[quantity] - level)[:, k])
                losses.errorbar(x + offset, mean, mean - low, fmt=marker, ms=4, color=colours[k], lw=1)
                if quantity == "nll" and k:
                    scatter.errorbar(ORDERS[k][1], mean, mean - low, fmt=marker, ms=4, color=colours[k], lw=1)
                    end, offset_y, side = (2 * mean - low, 2, "bottom") if k in early else (low, -2, "top")
                    at = {"xytext": (0, offset_y), "textcoords": "offset points", "ha": "center", "va": side}
                    scatter.annotate(str(k), (ORDERS[k][1], end), fontsize=8, **at)
            losses.plot([], [], marker, ms=4, color="#555555", label=label)
            tables = [runs.tables(activation, epoch)[quantity] for epoch in epochs]
            gaps = np.array([interval(t[:, early].mean(1) - t[:, late].mean(1)) for t in tables])
            x = np.array(epochs) + 4 * offset
            gap.errorbar(x, gaps[:, 0], gaps[:, 0] - gaps[:, 1], fmt=marker + line, ms=4, color="#555555", lw=1)
        for word, colour in (("before", colours[early[0]]), ("behind", colours[late[0]])):
            losses.plot([], [], lw=4, color=colour, label=f"dropout {word} BN")
        losses.set_xticks(range(len(numbers)), [f"{k} {name(k)}" for k in numbers], rotation=35, ha="right", fontsize=8)
        losses.set_ylabel("test NLL")
        title = f"{ACTIVATIONS[activation].__name__}, {epochs[-1]} epochs; from the table's best to its worst; "
        losses.set_title(f"{title}{len(runs.seeds(activation))} seeds, 95 % intervals within them", fontsize=9)
        found = ranking(last["nll"])
        text = f"rank correlation {found.correlation:+.2f} ({found.low:+.2f}, {found.high:+.2f})"
        scatter.set_title(text, fontsize=9)
        scatter.set(xlabel="test loss in the table (MNIST, one run)", ylabel="test NLL here")
        gap.axhline(0, color="#8c8c8c", lw=0.8)
        gap.set_title("NLL, dropout before BN less behind BN", fontsize=9)
        gap.set(xlabel="epochs", xticks=epochs)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside upper center", frameon=False, fontsize=8, ncols=5)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def options():
    parser = argparse.ArgumentParser(description="Ten orders of BatchNorm, activation, dropout and pooling, measured.")
    parser.add_argument("--out", default=".", metavar="DIR", help="where runs, report and plot go")
    parser.add_argument("--seeds", type=int, metavar="N", help="paired runs of every order (20; with --quick 3)")
    parser.add_argument("--layers", choices=("fused", "stock"), default="fused")
    parser.add_argument("--quick", action="store_true", help="3 seeds, 4 epochs: to see it work")
    parser.add_argument("--plot-only", action="store_true", help="report what the file has, without training")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread each")
    arguments = parser.parse_args()
    if arguments.seeds is None:
        arguments.seeds = 3 if arguments.quick else 20
    if arguments.seeds < 3:
        parser.error("--seeds must be at least 3: the comparison needs a spread")
    return arguments


def main() -> int:
    arguments = options()
    path = Path(arguments.out) / ("orderings-quick.jsonl" if arguments.quick else "orderings.jsonl")
    settings = Settings(layers=arguments.layers, measured=(2, 4) if arguments.quick else Settings.measured)
    command = shlex.join(["python", *sys.argv])
    runs = Runs(path) if arguments.plot_only else Runs(path, settings, command)
    if not arguments.plot_only and not study(runs, arguments.seeds, settings, arguments.jobs):
        return 130
    console = Console(width=WIDTH, record=True, highlight=False)
    report(runs, console)
    path.with_suffix(".txt").write_text("\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n")
    if runs.comparable():
        plot(runs, path.with_suffix(".png"))
    print(f"wrote {path}, .txt and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
