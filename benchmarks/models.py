"""Whole models, stock against converted by hand: `make models`.

Both start from the same weights and their equality is checked first, in float64. Then they take turns, one training
step each (forward, backward, SGD), and the medians stand side by side. How much of a step is the layers' own is the
model's affair, so beside that stand the times that the profiler sees in them: in the stock model BatchNorm, activation,
addition, counting of batches and their backwards, in ours the fused operators, with all that these call.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler else announces itself, through the table

import torch  # noqa: E402  (found through the lines above, as is what follows)
from rich.table import Table  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from benchmarks import census_packages, machine, models_convert, table  # noqa: E402

EXACT = 1e-6  # of the largest value, in float64, through dozens of layers
OWN = ("fusednorm::", "torch::autograd::CppNode<fusednorm", "aten::batch_norm", "NativeBatchNormBackward")
OWN += ("aten::relu", "ReluBackward", "aten::silu", "SiluBackward")
ADDITIONS = "aten::add", "aten::add_"  # the layers' own in a forward; elsewhere they sum gradients


def _torchvision(name: str, **options):
    from torchvision.models import get_model

    return get_model(name, weights=None, **options)


def _unet():
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet34", encoder_weights=None)


def _yolo():
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov8n.yaml", verbose=False)


def _ecapa():
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    return ECAPA_TDNN(80, lin_neurons=192, channels=[512] * 4 + [1536])


MODELS = {  # name -> (build, convert, input)
    "resnet18": (lambda: _torchvision("resnet18"), models_convert.resnet, (8, 3, 224, 224)),
    "resnet50": (lambda: _torchvision("resnet50"), models_convert.resnet, (8, 3, 128, 128)),
    "densenet121": (lambda: _torchvision("densenet121"), models_convert.densenet, (4, 3, 160, 160)),
    "googlenet": (lambda: _torchvision("googlenet", init_weights=False), models_convert.googlenet, (8, 3, 160, 160)),
    "yolov8n": (_yolo, models_convert.yolo, (8, 3, 160, 160)),
    "unet_resnet34": (_unet, models_convert.resnet, (4, 3, 128, 128)),
    "ecapa": (_ecapa, models_convert.ecapa, (16, 300, 80)),
}


def loss_of(model, inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Some loss that reaches every output, and the outputs."""
    outputs = [
        leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    ]
    return torch.stack([output.square().mean() for output in outputs]).sum(), outputs


class Trained:
    """A model and its optimizer: one call is one step."""

    def __init__(self, model: torch.nn.Module, x: torch.Tensor):
        self.model, self.x = model.train(), x
        # Small steps: times do not depend on what is learned, and nothing runs away.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with record_function("forward"):
            loss, _ = loss_of(self.model, (self.x,))
        loss.backward()
        self.optimizer.step()

    def seconds(self) -> float:
        start = time.perf_counter()
        self()
        return time.perf_counter() - start

    def own_ms(self, steps: int = 3) -> float:
        """Milliseconds that the profiler sees in the layers' own operators, in the median step."""
        return statistics.median(own_ms(self) for _ in range(steps))


def _is_own(event) -> bool:
    if event.name in ADDITIONS:
        parent = event.cpu_parent
        while parent is not None and parent.name != "forward":
            parent = parent.cpu_parent
        return parent is not None
    return event.name.startswith(OWN)


def own_ms(step) -> float:
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    total = 0.0
    for event in record.events():
        parent = event.cpu_parent
        while parent is not None and not _is_own(parent):
            parent = parent.cpu_parent
        if parent is None and _is_own(event):  # the outermost only: its time has that of what it calls
            total += event.cpu_time_total
    return total / 1e3


def checked(build, convert, shape) -> tuple[torch.nn.Module, torch.nn.Module, float]:
    """The model, its conversion, and how far they differ. Raises AssertionError where that is more than rounding."""
    torch.manual_seed(0)
    stock = build()
    ours = copy.deepcopy(stock)
    convert(ours)
    x = torch.randn(min(4, shape[0]), *shape[1:], dtype=torch.float64)
    error = models_convert.compare(copy.deepcopy(stock).double(), copy.deepcopy(ours).double(), (x,), loss_of)
    if not error <= EXACT:
        raise AssertionError(f"the converted model differs by {error:.2g} of the largest value")
    return stock, ours, error


def measure(name: str, seconds: float) -> dict:
    """One model's row; `seconds` bounds the timed turns."""
    build, convert, shape = MODELS[name]
    stock, ours, error = checked(build, convert, shape)
    left = models_convert.leftovers(ours)
    x = torch.randn(shape)
    stock, ours = Trained(stock, x), Trained(ours, x)
    first = stock.seconds() + ours.seconds()  # meets fresh memory
    first = stock.seconds() + ours.seconds()
    rounds = max(3, min(100, int(seconds / first)))
    times = []
    for i in range(rounds):
        turns = (stock, ours) if i % 2 else (ours, stock)
        taken = {turn: turn.seconds() for turn in turns}
        times.append((taken[stock], taken[ours]))
    own = {"stock_own_ms": stock.own_ms(), "ours_own_ms": ours.own_ms()}
    return {
        "model": name,
        "shape": list(shape),
        "error": error,
        "unconverted": left,
        "rounds": rounds,
        "stock_ms": statistics.median(theirs for theirs, _ in times) * 1e3,
        "ours_ms": statistics.median(mine for _, mine in times) * 1e3,
        "ratio": statistics.median(theirs / mine for theirs, mine in times),
        **own,
        "own_share": own["ours_own_ms"] / own["stock_own_ms"],
    }


def render(rows: list[dict]) -> Table:
    caption = "own = in BatchNorm, activation, addition and their backwards, as the profiler sees them, of one step;\n"
    caption += "left = BatchNorms that no conversion reached; error = largest difference in float64, relative."
    result = Table(title="One training step, stock against converted", caption=caption, caption_justify="left")
    result.add_column("model", no_wrap=True)
    for name in ("stock ms", "ours ms", "stock / ours", "own: stock ms", "ours ms", "ours / stock", "left", "error"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        head = f"{row['model']} {'x'.join(map(str, row['shape']))}"
        if "failed" in row:
            result.add_row(head, "[bold red]FAILED[/]")
            continue
        cells = f"{row['stock_ms']:.1f}", f"{row['ours_ms']:.1f}", f"[bold]{row['ratio']:.2f}x[/]"
        own = f"{row['stock_own_ms']:.1f}", f"{row['ours_own_ms']:.1f}", f"[bold]{row['own_share']:.2f}[/]"
        result.add_row(head, *cells, *own, str(row["unconverted"]), f"{row['error']:.0e}")
    return result


def options():
    parser = argparse.ArgumentParser(description="Training steps of whole models, stock against converted.")
    parser.add_argument("--only", action="append", default=[], choices=MODELS, help="this model (repeatable)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed steps per model")
    parser.add_argument("--json", metavar="F", help="write the rows and the machine's facts")
    parser.add_argument("--force", action="store_true", help="run although the machine is busy")
    return parser.parse_args()


def main() -> int:
    args = options()
    if not machine.tuned():
        machine.restart_tuned(sys.argv)
    reason = None if args.force else machine.busy()
    if reason:
        print(f"Not measured: {reason}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    census_packages.stand_in()
    console, facts, rows = table.console(), machine.facts(), []
    for name in args.only or MODELS:
        try:
            rows.append(measure(name, args.seconds))
        except Exception as error:
            failed = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append({"model": name, "shape": list(MODELS[name][2]), "failed": failed})
        told = rows[-1].get("failed") or f"{rows[-1]['ratio']:.2f}x"
        console.print(f"  {name}: {told}", markup=False, highlight=False)
    console.print(render(rows))
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
