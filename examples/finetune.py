"""Convert a torchvision model, train it, and take it to production: fuse, unfuse, fold, ONNX.

    python examples/finetune.py [--out DIR] [--model resnet18] [--epochs 5] [--size 48] [--samples N]

`fusednorm.fuse` makes fused layers of the BatchNorms of a model that somebody else wrote. The converted model trains
here beside the stock one, from the same weights and on the same batches. Then the way back: `fusednorm.unfuse`, and its
checkpoint loads into torchvision's own class. And the way on: `fusednorm.fold` puts the norms into the convolutions,
and what is left is exported to ONNX and run by onnxruntime. At each stop the outputs must be the trained model's.

The data are the 8x8 handwritten digits that scikit-learn ships, enlarged. Nothing is downloaded, so the weights are
random; with pretrained ones all is done in the same way. Most of a step of such a net is convolutions, which nobody
touches here, and the gain is the layers' part of it. Times are medians of steps that the contestants take in turns, on
this machine, under the allocator settings of the benchmarks (benchmarks/machine.py). Where another program was at work
when it began, every ratio of times says "busy", and the picture shows no times.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (what follows is found through the line above, or by it)
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from torch.nn.functional import cross_entropy, interpolate  # noqa: E402

import fusednorm  # noqa: E402
from benchmarks import machine  # noqa: E402
from benchmarks.table import Form  # noqa: E402
from examples import common  # noqa: E402

COLOURS = {"stock": "C3", "fused": "C0", "folded": "C2", "onnxruntime": "C1"}
NEEDED = "torchvision", "sklearn", "onnxscript", "onnxruntime", "matplotlib"
BATCH = 64
ROUNDS = 15
ROUNDING = 1e-4  # of the largest output, through dozens of layers in float32
EXPORTED = 1e-3  # the same for kernels that may add up in another order


def options():
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="a classifier of torchvision's")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=48, help="height and width of the images; some models need more")
    parser.add_argument("--samples", type=int, default=1797, metavar="N", help="how many of the 1797 digits")
    arguments = parser.parse_args()
    if arguments.epochs < 1 or arguments.samples < 100:
        parser.error("--epochs must be at least 1, --samples at least 100: less is not one batch")
    return arguments


def torchvision_models():
    try:
        import torchvision
    except RuntimeError:
        from benchmarks import census_packages

        census_packages.stand_in()  # PyPI's torchvision lacks its library beside a CPU torch; no model here needs it
        import torchvision
    return torchvision.models


def enlarged(images, size: int):
    """In the shape that the models want: (N, 3, size, size)."""
    return interpolate(images, (size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()


def scores(model, images, size: int):
    with torch.inference_mode():
        return torch.cat([model(enlarged(part, size)) for part in images.split(BATCH)])


# ---- training --------------------------------------------------------------------------------------------------------
class Run:
    """A model in training."""

    def __init__(self, model, steps: int):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
        # Down to nothing, so that the end does not hang on where the last step happened to lead.
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_iters=steps)
        self.losses, self.seconds = [], []  # of every step
        self.epochs = []  # mean loss, accuracy on the test images, seconds of training

    def step(self, images, labels) -> None:
        self.model.train()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        outputs = self.model(images)
        # While they train, inception and googlenet give more than scores.
        loss = cross_entropy(getattr(outputs, "logits", outputs), labels)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        self.schedule.step()

    def test(self, images, labels, size: int, steps: int) -> None:
        right = common.accuracy(scores(self.model.eval(), images, size), labels)
        self.epochs.append((statistics.mean(self.losses[-steps:]), right, sum(self.seconds[-steps:])))


def train(models: dict, data, size: int, epochs: int) -> dict[str, Run]:
    """Both step by step on the same batches, so that the machine's noise falls on both."""
    images, labels, test_images, test_labels = data
    steps = len(images) // BATCH  # whole batches: a step costs what another does
    runs = {kind: Run(model, epochs * steps) for kind, model in models.items()}
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(images)).split(BATCH)[:steps]]
    for i, batch in enumerate(track(batches, "training", transient=True), 1):
        x = enlarged(images[batch], size)
        # Whoever goes first meets the colder caches: take turns.
        for run in runs.values() if i % 2 else reversed(runs.values()):
            run.step(x, labels[batch])
        if i % steps == 0:
            for run in runs.values():
                run.test(test_images, test_labels, size, steps)
    return runs


def margin(right: float, count: int) -> float:
    """How far below an accuracy another may be: three standard errors of the difference between two such.

    The layers differ by rounding only, but training makes that grow, until the two models are two runs of one recipe,
    which miss images of their own. One miss is added: no standard error comes of none. That is 1.6 to 2.5 points where
    six seeds had differences up to 0.9.
    """
    missed = min(1.0, 1 - right + 1 / count)
    return 3 * math.sqrt(2 * missed * (1 - missed) / count)


# ---- deployment ------------------------------------------------------------------------------------------------------
def in_onnxruntime(model, example, folder: str):
    """The model, exported for any number of images, as a function of tensors."""
    import onnxruntime

    path = f"{folder}/model.onnx"
    torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    # Else its threads spin a while after each call, on the cores where torch has its turn.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def medians(models: dict, images) -> dict[str, float]:
    """Milliseconds of a call."""
    times = {kind: [] for kind in models}
    with torch.inference_mode():
        for i in range(ROUNDS):
            for kind in models if i % 2 else reversed(models):
                models[kind](images)  # untimed: the caches and threads are another's
                start = time.perf_counter()
                models[kind](images)
                times[kind].append((time.perf_counter() - start) * 1e3)
    return {kind: statistics.median(taken) for kind, taken in times.items()}


# ---- what is shown ---------------------------------------------------------------------------------------------------
def learned(runs: dict[str, Run]) -> Table:
    columns = [f"{kind}\n{what}" for kind in runs for what in ("loss", "accuracy", "seconds")]
    result = Table("epoch", *columns, title="Training loss, test accuracy, seconds")
    for i, epoch in enumerate(zip(*(run.epochs for run in runs.values()), strict=True), 1):
        cells = [(f"{loss:.4f}", f"{right:.1%}", f"{seconds:.1f}") for loss, right, seconds in epoch]
        result.add_row(str(i), *cells[0], *cells[1])
    return result


def timed(rows: list[tuple[str, str, float, float]], form: Form) -> Table:
    result = Table("", "model", "ms", "stock / this", title="Times, medians")
    for what, kind, ms, gain in rows:
        if kind == "stock":
            result.add_section()
        result.add_row(what if kind == "stock" else "", kind, f"{ms:.1f}", form.ratio(gain, "x"))
    return result


def curves(axis, runs: dict[str, Run], at: int, label: str) -> None:
    # The two may lie on one another: a wide line below a dashed one.
    styles = {"stock": {"lw": 4, "alpha": 0.6}, "fused": {"lw": 1.5, "ls": "--", "marker": "o", "ms": 4}}
    for kind, run in runs.items():
        epochs = range(1, len(run.epochs) + 1)
        axis.plot(epochs, [epoch[at] for epoch in run.epochs], color=COLOURS[kind], label=kind, **styles[kind])
    axis.set(xlabel="epoch", ylabel=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y")
    axis.legend()


def bars(axis, rows: list[tuple[str, str, float, float]]) -> None:
    whats, kinds, times, gains = zip(*rows, strict=True)
    places = [i + 0.5 * (what != whats[0]) for i, what in enumerate(whats)]
    drawn = axis.barh(places, times, color=[COLOURS[kind] for kind in kinds])
    labels = [f"{ms:.0f} ms ({gain:.2f}x)" for ms, gain in zip(times, gains, strict=True)]
    axis.bar_label(drawn, labels, padding=3, fontsize="small")
    axis.set_yticks(places, [f"{what}\n{kind}" for what, kind in zip(whats, kinds, strict=True)], fontsize="small")
    axis.invert_yaxis()
    axis.margins(x=0.45)
    axis.set(xlabel="ms, median (stock's time over this one's)")


def draw(figure, runs: dict[str, Run], rows: list[tuple[str, str, float, float]], title: str) -> None:
    """No `rows`, no times."""
    loss, right, *times = figure.subplots(1, 2 + bool(rows))
    curves(loss, runs, 0, "training loss, mean of the epoch")
    loss.set_yscale("log")
    curves(right, runs, 1, "right answers on test images")
    right.yaxis.set_major_formatter("{x:.0%}")
    for axis in times:
        bars(axis, rows)
    figure.suptitle(title, fontsize="medium")


# ---- the way there and back ------------------------------------------------------------------------------------------
class Tour:
    """A model on its way; `failed` has a sentence for each thing that was not as it must be."""

    def __init__(self, name: str, size: int, samples: int):
        models = torchvision_models()
        if name not in models.list_models(module=models):
            sys.exit(f"{name} is none of torchvision's classifiers.")
        torch.manual_seed(0)
        self.size, self.failed = size, []
        self.data = images, _, self.images, self.labels = common.digits(samples)
        self.example = enlarged(images[:BATCH], size)  # as in training: fuse may try what pays at this size
        self.stock, self.back = (models.get_model(name, weights=None, num_classes=10) for _ in range(2))

    def fuse_and_train(self, epochs: int) -> dict[str, Run]:
        self.fused = fusednorm.fuse(self.stock, self.example)  # a copy: two models from here on
        report = self.fused.fusednorm_report
        if not report.rows:
            sys.exit(f"{report}: there is nothing to fuse.")
        lines = str(report).splitlines()
        print(*lines[:4], f"  ... and {len(lines) - 4} more", sep="\n")
        runs = train({"stock": self.stock, "fused": self.fused}, self.data, self.size, epochs)
        Console().print(learned(runs))
        theirs, ours = (run.epochs[-1][1] for run in runs.values())
        room = margin(theirs, len(self.labels))
        if ours < theirs - room:
            self.failed.append(f"The fused model is less accurate by {theirs - ours:.1%}, more than {room:.1%}.")
        self.trained = scores(self.fused, self.images, self.size)
        return runs

    def compare(self, what: str, model, limit: float) -> None:
        found = scores(model, self.images, self.size)
        difference = ((found - self.trained).abs().max() / self.trained.abs().max()).item()
        line = f"{what}: outputs differ from the trained model's by {difference:.1e} of the largest"
        print(f"{line}, accuracy {common.accuracy(found, self.labels):.1%}")
        if not difference <= limit:  # so that NaN fails
            self.failed.append(f"{line}, more than {limit:g}.")

    def unfuse(self) -> None:
        try:
            self.back.load_state_dict(fusednorm.unfuse(copy.deepcopy(self.fused)).state_dict())
            self.fused.load_state_dict(self.back.state_dict())  # and the other way
        except RuntimeError as error:
            sys.exit(f"The state dict is not interchangeable: {error}")
        self.compare("loaded into the stock model", self.back.eval(), ROUNDING)

    def fold_and_export(self) -> dict[str, float]:
        folded = fusednorm.fold(self.fused.eval(), self.example)
        report = folded.fusednorm_report
        print(f"{len(report.fused)} of {len(report.rows)} BatchNorms folded")
        if not report.fused:  # whose outputs would be the trained model's all the same
            self.failed.append(f"fold left all BatchNorms as they are: {report.rows[0].reason}.")
        self.compare("folded", folded, ROUNDING)
        with tempfile.TemporaryDirectory() as folder:
            exported = in_onnxruntime(folded, self.example, folder)
            self.compare("in onnxruntime", exported, EXPORTED)
            return medians({"stock": self.back, "folded": folded, "onnxruntime": exported}, self.example)


def main() -> int:
    arguments = options()
    if missing := [module for module in NEEDED if importlib.util.find_spec(module) is None]:
        sys.exit(f"This example needs modules that are not installed here: {', '.join(missing)}.")
    if not machine.tuned():
        machine.restart_tuned(sys.argv)
    warnings.simplefilter("ignore", FutureWarning)  # of torch's exporter, about itself
    started, busy = time.perf_counter(), machine.busy()  # asked here: soon the load is our own
    tour = Tour(arguments.model, arguments.size, arguments.samples)
    print(f"1. fuse {arguments.model}, and train it beside the stock model")
    runs = tour.fuse_and_train(arguments.epochs)
    print("2. unfuse: the trained weights in torchvision's own class, and back")
    tour.unfuse()
    print("3. fold the norms into the convolutions, and export to ONNX")
    inference = tour.fold_and_export()

    training = {kind: statistics.median(run.seconds) * 1e3 for kind, run in runs.items()}
    groups = ("training step", training), ("inference", inference)
    rows = [(what, kind, ms, times["stock"] / ms) for what, times in groups for kind, ms in times.items()]
    images = f"{arguments.size}x{arguments.size} images, batches of {BATCH}"
    here = f"{machine.facts()['cpu']}, {torch.get_num_threads()} threads"
    Console().print(timed(rows, Form(busy=bool(busy))))
    print(f"medians of steps taken in turns, on this machine: {images}, {here}")
    if busy:
        print(f"not a quiet machine: when this began, {busy.partition(' (')[0]}")
    title = f"{arguments.model}, {images}" + ("" if busy else f", {here}")
    shown = [] if busy else rows
    common.pictures("finetune", arguments.out, (10, 3.6), lambda figure: draw(figure, runs, shown, title))
    print(f"{time.perf_counter() - started:.0f} s in all")
    for sentence in tour.failed:
        print(sentence, file=sys.stderr)
    return int(bool(tour.failed))


if __name__ == "__main__":
    sys.exit(main())
