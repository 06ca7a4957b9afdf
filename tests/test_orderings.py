"""The orderings study: its nets, its measures, its file, and that its verdicts follow the numbers."""

import functools
import importlib.util
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import fusednorm

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "orderings.py"

pytest.importorskip("sklearn")
np = pytest.importorskip("numpy")
pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def orderings():
    spec = importlib.util.spec_from_file_location("orderings", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["orderings"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # as the study does: these nets are small


# ---- nets ------------------------------------------------------------------------------------------------------------
class SameNoise(nn.Module):
    """Dropout by the noise of the fused layers, multiplied in plain torch; draws its seed as they do."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        return x * fusednorm.noise(x.shape, self.p, seed=torch.ops.fusednorm.draw_seed(x), dtype=x.dtype)


def trained(orderings, layers, number, activation, dtype):
    """Losses of some steps, and the logits of evaluation after them."""
    settings = orderings.Settings(layers=layers, train=200)
    (images, labels), (test, _), _ = orderings.digits(0, settings)
    net = orderings.net(number, activation, 0, settings)
    if layers == "stock":
        net = nn.Sequential(*(SameNoise(m.p) if type(m) is nn.Dropout else m for m in net))
    net = net.to(dtype)
    losses = list(orderings.steps(net, images.to(dtype), labels, 0, 2, 32))
    return torch.tensor(losses), orderings.logits(net, test.to(dtype))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize("activation", ["elu", "relu"])
@pytest.mark.parametrize("number", range(11))
def test_stock_and_fused_layers_learn_alike(orderings, number, activation, dtype, tolerance):
    stock = trained(orderings, "stock", number, activation, dtype)
    fused = trained(orderings, "fused", number, activation, dtype)
    for a, b in zip(stock, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layers", ["stock", "fused"])
def test_relu_makes_some_orders_one(orderings, layers):
    for first, second in orderings.TWINS:
        a, b = (trained(orderings, layers, k, "relu", torch.float64)[0] for k in (first, second))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        a, b = (trained(orderings, layers, k, "elu", torch.float64)[0] for k in (first, second))
        assert (a - b).abs().max() > 1e-3


def test_orders_of_a_seed_are_paired(orderings):
    settings = orderings.Settings()
    nets = [orderings.net(k, "elu", 3, settings) for k in orderings.ORDERS]
    for other in nets[1:]:
        for a, b in zip(nets[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(orderings.digits(3, settings), orderings.digits(3, settings), strict=True):
        assert torch.equal(a[0], b[0])
    assert not torch.equal(orderings.digits(4, settings)[0][0], orderings.digits(3, settings)[0][0])


def test_every_part_of_the_data_is_used_once(orderings):
    parts = orderings.digits(0, orderings.Settings())
    assert [len(labels) for _, labels in parts] == [600, 300, 897]
    rows = torch.cat([images.flatten(1) for images, _ in parts])
    found = torch.tensor(orderings.images_and_labels()[0], dtype=torch.float32)
    assert len(rows.unique(dim=0)) == len(found.unique(dim=0))


def test_the_fused_nets_are_fused(orderings):
    def kinds(number):
        return [type(m).__name__ for m in orderings.net(number, "elu", 0, orderings.Settings())[1:4]]

    for number in (1, 4, 5, 7, 8, 10):
        assert kinds(number)[:2] == ["FusedBatchNorm2d", "MaxPool2d"]
    assert kinds(3) == kinds(6) == ["FusedBatchNorm2d", "MaxPool2d", "Dropout"]
    assert kinds(2) == ["ELU", "Dropout", "MaxPool2d"]


# ---- measures --------------------------------------------------------------------------------------------------------
def test_calibration_error(orderings):
    # Three at confidence 0.9, two of them right; one at 0.6, right. Bins of 1/15 part them.
    scores = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], dtype=torch.float64).log()
    expected = (3 * abs(2 / 3 - 0.9) + abs(1 - 0.6)) / 4
    assert orderings.calibration_error(scores, torch.tensor([0, 0, 1, 1])) == pytest.approx(expected)


@pytest.mark.parametrize("sharpened", [0.5, 1.0, 3.0])
def test_temperature(orderings, sharpened):
    scores = torch.randn(20_000, 10, dtype=torch.float64) * 2
    labels = torch.distributions.Categorical(logits=scores).sample()
    assert orderings.temperature(scores * sharpened, labels) == pytest.approx(sharpened, rel=0.05)


def test_measuring_leaves_the_net_alone(orderings):
    settings = orderings.Settings(layers="stock")
    (images, labels), *others = orderings.digits(0, settings)
    net = orderings.net(10, "elu", 0, settings)
    list(itertools.islice(orderings.steps(net, images, labels, 0, 3, 32), 50))  # running statistics forget their start
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    found = orderings.measure(net, images, *others)
    assert net.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    # The noise of rate 0.2 directly before the first norm: about 0.8 of its variance without it (Li et al.).
    assert 0.7 < found["shift1"] < 0.9


# ---- verdicts --------------------------------------------------------------------------------------------------------
def planted(orderings, losses, spread=1e-4, seeds=20):
    """Tables of a study whose losses are {order: mean}, and differ between seeds by much, within them by `spread`."""
    random = np.random.default_rng(0)
    means = np.array([losses[k] for k in orderings.ORDERS])
    nll = means + random.normal(size=(seeds, 1)) + spread * random.normal(size=(seeds, len(means)))
    get = {q: nll.copy() for q in ("nll", "error", "temperature", "nll_recalibrated", "nll_scaled")}
    get["nll_recalibrated_scaled"] = nll.copy()
    return get


def verdicts(orderings, get):
    return {claim: verdict for claim, verdict, _ in orderings.claims(get)}


def by_start(found, start):
    return next(verdict for claim, verdict in found.items() if claim.startswith(start))


CLAIMS = ("The table's ranking", "Its best", "Its worst", "BN before activation", "Dropout before BN has the lower")


@pytest.mark.parametrize(
    "sign, expected",
    [(1, ["holds"] * 5), (-1, ["the opposite", "does not hold", "does not hold", "the opposite", "the opposite"])],
)
def test_planted_table(orderings, sign, expected):
    losses = {k: sign * (loss or 0.0) for k, (_, loss) in orderings.ORDERS.items()}
    found = verdicts(orderings, planted(orderings, losses))
    assert [by_start(found, claim) for claim in CLAIMS] == expected


def test_noise_alone_decides_nothing(orderings):
    found = verdicts(orderings, planted(orderings, dict.fromkeys(orderings.ORDERS, 0.1), spread=0.1))
    assert {by_start(found, claim) for claim in CLAIMS} == {"undecided"}


def test_another_clear_ranking_is_not_the_tables(orderings):
    # The table's better half behind its worse one.
    others = sorted(orderings.TABLE, key=lambda k: orderings.ORDERS[k][1])
    losses = {0: 0.0, **{k: i for i, k in enumerate([*others[5:], *others[:5]])}}
    found = verdicts(orderings, planted(orderings, losses))
    assert by_start(found, "The table's ranking") == "does not hold"


def test_planted_shift(orderings):
    """Dropout before BN raises the loss, and recalibration takes all of it away."""
    early = orderings.follows("drop", "norm")
    get = planted(orderings, {k: 0.2 if k in early else 0.1 for k in orderings.ORDERS})
    get["nll_recalibrated"] = get["nll"] - np.array([0.1 if k in early else 0.0 for k in orderings.ORDERS])
    found = verdicts(orderings, get)
    assert by_start(found, "Dropout before BN has the lower loss") == "the opposite"
    assert by_start(found, "The 5 highest") == "holds"
    assert by_start(found, "It lowers it more") == "holds"
    assert by_start(found, "After it dropout before BN still") == "undecided"
    assert by_start(found, "After temperature scaling") == "holds"


def test_follows(orderings):
    assert orderings.follows("drop", "norm") == [1, 2, 8, 9, 10]
    assert orderings.follows("norm", "drop") == [3, 4, 5, 6, 7]
    assert orderings.follows("norm", "act") == [5, 6, 7, 10]


def test_interval_covers(orderings):
    random = np.random.default_rng(0)
    bounds = [orderings.interval(random.normal(size=8)) for _ in range(2000)]
    assert np.mean([low < 0 < high for _, low, high in bounds]) == pytest.approx(0.95, abs=0.015)


# ---- the file --------------------------------------------------------------------------------------------------------
RUN = {"activation": "elu", "order": 5, "seed": 0, "measured": {}, "seconds": 1.0}


def test_a_line_that_was_cut_off_is_dropped(orderings, tmp_path):
    path, settings = tmp_path / "runs.jsonl", orderings.Settings()
    orderings.Runs(path, settings, "command").add(RUN)
    whole = path.read_text()
    path.write_text(whole + json.dumps(RUN)[:20])
    runs = orderings.Runs(path, settings)
    assert list(runs.done) == [("elu", 5, 0)] and path.read_text() == whole
    runs.add(RUN | {"seed": 1})
    assert len(orderings.Runs(path, settings).done) == 2


def test_other_settings_are_refused(orderings, tmp_path):
    path = tmp_path / "runs.jsonl"
    orderings.Runs(path, orderings.Settings(), "command")
    with pytest.raises(SystemExit, match="made with .*'fused'.*choose another --out"):
        orderings.Runs(path, orderings.Settings(layers="stock"), "command")


def test_nothing_to_report(orderings, tmp_path):
    with pytest.raises(SystemExit, match="no runs"):
        orderings.Runs(tmp_path / "runs.jsonl")


# ---- the whole -------------------------------------------------------------------------------------------------------
def start(out, *options):
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out), *options]
    # Where the tests run in the background, interrupts are ignored, and children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed)


@pytest.mark.slow
def test_quick_run_interrupted_and_resumed(tmp_path):
    path = tmp_path / "orderings-quick.jsonl"
    process = start(tmp_path)
    give_up = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < 6:
        assert process.poll() is None and time.monotonic() < give_up, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "interrupted" in output and "Traceback" not in output
    interrupted = path.read_text()
    with path.open("a") as file:
        file.write('{"activation": "relu", "ord')

    process = start(tmp_path)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    text = path.read_text()
    assert text.startswith(interrupted)
    runs = [json.loads(line) for line in text.splitlines()[1:]]
    assert len(runs) == len({(r["activation"], r["order"], r["seed"]) for r in runs}) == 2 * 11 * 3
    assert path.with_suffix(".png").stat().st_size > 10_000
    report = path.with_suffix(".txt").read_text()
    for words in ("ELU after 4 epochs, 3 seeds", "Drop-BN-Act-Pool", "The table's ranking", "Recalibration lowers"):
        assert words in report and words in output

    process = start(tmp_path, "--plot-only")
    assert "training" not in process.communicate(timeout=60)[0] and process.returncode == 0
    assert path.read_text() == text and path.with_suffix(".txt").read_text() == report
