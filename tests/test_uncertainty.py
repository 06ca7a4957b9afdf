"""Several passes as one batch: against exact enumeration, against the passes one by one, and what must come back."""

import itertools
import math

import pytest
import torch
from torch import nn

from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, GaussianDropout, uncertainty
from fusednorm.uncertainty import batch_statistics, effective_batch_size, predict

pytestmark = pytest.mark.cpu


def tiny(noise):
    """Four units, each dropped half of the time, and the same logits and events of all 16 masks."""
    torch.manual_seed(0)
    norm = FusedBatchNorm1d(4, drop=noise) if isinstance(noise, float) else nn.BatchNorm1d(4)
    rest = [] if isinstance(noise, float) else [noise]
    net = nn.Sequential(nn.Linear(3, 4), norm, *rest, nn.Linear(4, 3)).double()
    net(torch.randn(64, 3, dtype=torch.float64))  # statistics of its own
    return net


def enumerated(net, x, output):
    """(mean, variance, entropy, mutual information) over all masks, from their definition."""
    net.eval()
    hidden = net[1](net[0](x))
    net.train()
    masks = torch.tensor(list(itertools.product((0.0, 2.0), repeat=4)), dtype=torch.float64)
    outputs = net[-1](hidden * masks[:, None])
    if output is None:
        return outputs.mean(0), outputs.var(0, correction=0), None, None
    p = outputs.softmax(-1) if output == "logits" else outputs.sigmoid()
    cases = torch.stack([p, 1 - p]) if output == "binary" else p.movedim(-1, 0)
    mean = cases.mean(1) if output == "binary" else cases.mean(1)
    total = -(mean * mean.log()).sum(0)
    return p.mean(0), p.var(0, correction=0), total, total + (cases * cases.log()).sum(0).mean(0)


@pytest.mark.parametrize("output", ["logits", "binary", None])
@pytest.mark.parametrize("noise", [0.5, nn.Dropout(0.5)], ids=["fused", "stock"])
@torch.no_grad()
def test_enumeration(noise, output):
    net, x = tiny(noise), torch.randn(5, 3, dtype=torch.float64)
    found = predict(net, x, 40000, seed=1, output=output)
    for name, got, expected in zip(found._fields, found, enumerated(net, x, output), strict=True):
        if expected is None:
            assert got is None, name
        else:
            assert got.shape == expected.shape and (got - expected).abs().max() < 0.02 * (1 + expected.abs().max()), (
                name
            )


def test_probabilities_of_any_dimension():
    net = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 4, 1))
    x = torch.randn(2, 3, 5, 6)
    logits = predict(net, x, seed=3)
    probabilities = predict(nn.Sequential(net, nn.Softmax(1)), x, seed=3, output="probabilities", dim=-3)
    for a, b in zip(logits, probabilities, strict=True):
        torch.testing.assert_close(a, b)
    assert logits.mean.shape == (2, 4, 5, 6) and logits.entropy.shape == (2, 5, 6)
    assert (logits.entropy <= math.log(4) + 1e-6).all() and (logits.mutual_information > 0).all()


def test_passes_differ_and_a_batch_is_as_good_as_a_loop():
    seen = []
    net = nn.Sequential(nn.Linear(3, 8), FusedBatchNorm1d(8, act="relu", drop=0.3), nn.Linear(8, 2))
    net[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(7, 3)
    predict(net, x, 6, seed=0)
    rows = torch.cat(seen).unflatten(0, (6, 7))
    assert len(seen) == 1 and len({tuple(map(float, row.flatten())) for row in rows}) == 6
    seen.clear()
    predict(net, x, 6, seed=0, batch_size=20)
    assert [len(rows) for rows in seen] == [14, 14, 14]


def test_what_is_not_random_is_computed_once():
    class Counted(nn.Linear):
        rows = 0

        def forward(self, x):
            self.rows += len(x)
            return super().forward(x)

    net = nn.Sequential(Counted(3, 8), nn.Sequential(nn.ReLU(), Counted(8, 8), nn.Dropout(0.5)), Counted(8, 2))
    predict(net, torch.randn(7, 3), 6, seed=0)
    assert [m.rows for m in net.modules() if isinstance(m, Counted)] == [7, 7, 42]
    net[1].register_forward_hook(lambda module, args, given: given)  # which is to see every call
    predict(net, torch.randn(7, 3), 6, seed=0)
    assert [m.rows for m in net.modules() if isinstance(m, Counted)] == [14, 49, 84]


class Last(nn.Module):
    """The last state of a recurrent layer, with noise of its own."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, given):
        return self.drop(given[0][:, -1])


MODELS = {
    "transformer": nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True), 2),
    "attention": nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True),
    "recurrent": nn.Sequential(nn.LSTM(4, 4, 2, batch_first=True, dropout=0.5), Last()),
    "rows between": nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3), nn.Dropout(0.5), nn.Unflatten(0, (-1, 6))),
    "a head that gives a tuple": nn.Sequential(nn.LSTM(4, 4, batch_first=True), Last()),
    "frozen": nn.Sequential(FusedBatchNorm1d(6).freeze(), nn.Dropout(0.5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_with_noise_of_many_kinds(name):
    """As passes by hand, with everything but the noise in eval mode: the same mean and variance, and there is some."""
    model, x = MODELS[name], torch.randn(3, 6, 4)
    if name in ("transformer", "attention"):
        torch.backends.mha.set_fastpath_enabled(True)
    found = predict(model, x, 3000, seed=0, output=None)
    assert torch.backends.mha.get_fastpath_enabled()
    model.eval()
    for m in model.modules():
        if isinstance(m, (nn.Dropout, nn.MultiheadAttention, nn.RNNBase)):
            m.training = True
    with torch.enable_grad():  # or transformers leave their dropouts out
        passes = torch.stack([model(x).detach() for _ in range(3000)])
    model.train()
    assert (found.variance.amax() > 1e-3).all()
    torch.testing.assert_close(found.mean, passes.mean(0), rtol=0.1, atol=0.1)
    torch.testing.assert_close(found.variance, passes.var(0, correction=0), rtol=0.25, atol=0.1)


def test_noises_hold_more_than_noise():
    """What is given stays on with all that is in it, but norms; a Sequential's own forward is called."""
    layer = FusedBatchNorm1d(3, drop=0.5)
    block = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5)))
    net = nn.Sequential(layer, block)
    for noises in ([layer], [block], [net]):
        assert (predict(net, torch.randn(8, 3), 50, seed=0, noises=noises, output=None).variance > 0).any()
    assert all(int(m.num_batches_tracked) == 0 for m in (layer, block[0]))
    own = nn.Sequential(nn.Dropout(0.5))
    own.forward = lambda x: nn.Sequential.forward(own, x).clamp(0, 1)
    assert predict(own, torch.ones(4, 3), 50, seed=0, output=None).mean.max() <= 1


def test_narrow_outputs_are_summed_up_in_float32():
    net, x = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 500)), torch.randn(4, 8)
    wide, narrow = predict(net, x, 64, seed=0), predict(nn.Sequential(net, Narrow()), x, 64, seed=0)
    assert narrow.mean.dtype == torch.float32
    torch.testing.assert_close(wide.mutual_information, narrow.mutual_information, rtol=0.05, atol=1e-3)


class Narrow(nn.Module):
    def forward(self, x):
        return x.bfloat16()


def test_effective_batch_size_of_few_batches():
    torch.manual_seed(0)
    for count in (2, 3, 10):
        values = torch.randn(count, 32, 4000, dtype=torch.float64)
        bank = {"norm": (values.mean(1), values.var(1, correction=0))}
        assert effective_batch_size(bank) == pytest.approx(32, rel=0.1), count


def test_seed():
    net, x = nn.Sequential(nn.Linear(3, 8), GaussianDropout(0.5), nn.Dropout(0.5), nn.Linear(8, 2)), torch.randn(7, 3)
    state = torch.get_rng_state()
    first, again, other = (predict(net, x, seed=seed).mean for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(predict(net, x).mean, predict(net, x).mean)


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("of the model itself")


@pytest.mark.parametrize("raises", [False, True])
def test_all_comes_back(raises):
    net = nn.Sequential(FusedBatchNorm1d(3, drop=0.5), nn.BatchNorm1d(3), nn.Linear(3, 3))
    net.train()
    net[0].eval()
    net[0].drop.train()
    net[1](torch.randn(8, 3) + 1)
    if raises:
        net.append(Raises())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    buffers, flags = dict(net.named_buffers()), [m.training for m in net.modules()]
    x = torch.randn(5, 3, requires_grad=True)
    bank = {name: (torch.zeros(2, 3), torch.ones(2, 3)) for name in ("0", "1")}
    for statistics in (None, 4, bank):
        if raises:
            with pytest.raises(RuntimeError, match="of the model itself"):
                predict(net, x, 3, seed=0, statistics=statistics)
        else:
            assert not predict(net, x, 3, seed=0, statistics=statistics).mean.requires_grad
    assert flags == [m.training for m in net.modules()] and torch.is_grad_enabled()
    assert all(buffers[name] is value for name, value in net.named_buffers())
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


# ---- statistics of batches -------------------------------------------------------------------------------------------
def two_norms():
    torch.manual_seed(0)
    layers = nn.Linear(3, 5), FusedBatchNorm1d(5, act="relu", drop=0.5), nn.Linear(5, 5), nn.BatchNorm1d(5)
    net = nn.Sequential(*layers).double()
    net[1].drop.p = 0.0
    return net


def test_a_bank_of_the_batch_itself_is_training():
    """All layers take the statistics of the same batch: every pass is the training forward of one of them."""
    net = two_norms()
    batches = [torch.randn(9, 3, dtype=torch.float64) for _ in range(3)]
    bank = batch_statistics(net, batches, progress=False)
    assert [tuple(t.shape) for t in bank["3"]] == [(3, 5), (3, 5)]
    own = {name: (means[1:2], variances[1:2]) for name, (means, variances) in bank.items()}
    with torch.no_grad():
        torch.testing.assert_close(predict(net, batches[1], 1, statistics=own, output=None).mean, net(batches[1]))
    x = batches[0][:4]
    banks = [{name: (m[i : i + 1], v[i : i + 1]) for name, (m, v) in bank.items()} for i in range(3)]
    alone = [predict(net, x, 1, statistics=one).mean for one in banks]
    drawn = [predict(net, x, 1, seed, statistics=bank).mean for seed in range(12)]
    assert {i for mean in drawn for i in range(3) if torch.equal(mean, alone[i])} == {0, 1, 2}
    assert all(any(torch.equal(mean, one) for one in alone) for mean in drawn)


def test_gathering_changes_nothing_and_sees_training():
    net = two_norms().eval()
    net[3].train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [m.training for m in net.modules()]
    x = torch.randn(6, 3, dtype=torch.float64)
    bank = batch_statistics(net, [(x, "label")], progress=False)
    torch.testing.assert_close(bank["1"][0][0], net[0](x).mean(0))
    torch.testing.assert_close(bank["1"][1][0], net[0](x).var(0, correction=0))
    assert flags == [m.training for m in net.modules()]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("m", [2, 8])
def test_the_closed_form_is_what_batches_of_normal_values_have(m):
    """Outputs of a norm: their mean and spread over batches that were drawn, and over statistics in closed form."""
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(6, eps=0.3).double()
    mean, std = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.5
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(std.square())
    batches = [torch.randn(m, 6, dtype=torch.float64) * std + mean for _ in range(8000)]
    bank = batch_statistics(norm, batches, progress=False)
    x = torch.randn(2, 6, dtype=torch.float64)
    drawn = predict(norm, x, 8000, seed=0, statistics=bank, output=None)
    formula = predict(norm, x, 8000, seed=0, statistics=m, output=None)
    torch.testing.assert_close(drawn.mean, formula.mean, rtol=0.05, atol=0.05)
    torch.testing.assert_close(drawn.variance, formula.variance, rtol=0.15, atol=0.01)
    assert effective_batch_size(bank) == pytest.approx(m, rel=0.1)


def test_statistics_apart_from_noise():
    """Noise in the model is switched by `noises`, whatever the statistics do."""
    net, x = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)), torch.randn(50, 3)
    quiet = predict(net, x, 8, seed=0, statistics=4, noises=[], output=None)
    assert (quiet.mean != 0).all()
    assert (predict(net, x, 1, seed=0, statistics=4, output=None).mean == 0).any()
    images = nn.Sequential(FusedBatchNorm2d(3, act="relu"), nn.Flatten())
    assert predict(images, torch.randn(2, 3, 4, 4), 3, statistics=2).mean.shape == (2, 48)


def test_a_norm_without_running_statistics_sees_one_pass_at_a_time():
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3, track_running_stats=False))
    x = torch.randn(9, 3)
    outputs = predict(net, x, 6, seed=0, output=None).mean
    torch.testing.assert_close(outputs.mean(0), torch.zeros(3), rtol=0, atol=1e-5)


class Integers(nn.Module):
    def forward(self, x):
        return x.long()


NET, X = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)), torch.randn(4, 3)
ONE = torch.zeros(1, 3)


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"model": len}, TypeError, "model: expected a torch.nn.Module"),
        ({"model": nn.Linear(3, 3)}, ValueError, "nothing in it is random"),
        ({"model": nn.Linear(3, 3), "statistics": 4}, ValueError, "no BatchNorm"),
        ({"model": nn.Sequential(nn.Dropout(), nn.Flatten(0))}, TypeError, "a row for each of the input's"),
        ({"model": nn.Sequential(nn.Dropout(), Integers())}, TypeError, "expected it to give floats"),
        ({"model": nn.Sequential(nn.Dropout(), nn.LSTM(3, 3))}, TypeError, "but got tuple"),
        ({"input": [1.0]}, TypeError, "input: expected a tensor"),
        ({"input": torch.tensor(1.0)}, TypeError, "input: expected a tensor"),
        ({"samples": 0}, ValueError, "samples: expected a positive int"),
        ({"samples": True}, ValueError, "samples: expected a positive int"),
        ({"batch_size": -1}, ValueError, "batch_size: expected a positive int"),
        ({"output": "softmax"}, ValueError, "output: expected 'logits'"),
        ({"dim": 2}, ValueError, "dim: expected one of the 2 dimensions"),
        ({"dim": -2}, ValueError, "dim: expected one of the 2 dimensions"),
        ({"statistics": 1}, ValueError, "an int of 2 or more"),
        ({"statistics": True}, ValueError, "an int of 2 or more"),
        ({"statistics": {}}, ValueError, "expected those of '1' too"),
        ({"statistics": {"1": (ONE, torch.zeros(1, 2))}}, ValueError, "expected means and variances .B, 3. of '1'"),
        ({"statistics": {"1": (ONE[:0], ONE[:0])}}, ValueError, "those of a batch at least"),
    ],
)
def test_bad_arguments(change, error, says):
    with pytest.raises(error, match=says):
        predict(**{"model": NET, "input": X} | change)


def test_bad_batches():
    twice = nn.BatchNorm1d(3)
    for model, batches, error, says in (
        (NET, X, TypeError, "expected an iterable of batches"),
        (NET, [], ValueError, "expected at least one"),
        (nn.Linear(3, 3), [X], ValueError, "expected a BatchNorm"),
        (nn.Sequential(twice, twice), [X], ValueError, "was called 2 times in 1 batches"),
    ):
        with pytest.raises(error, match=says):
            batch_statistics(model, batches, progress=False)
    with pytest.raises(ValueError, match="two batches at least"):
        effective_batch_size({"norm": (ONE, ONE)})
    with pytest.raises(ValueError, match="two batches at least"):
        effective_batch_size({})
    for model, batches, says in (
        (FusedBatchNorm1d(3, ghost_batch_size=2), [X], "expected no ghost batches"),
        (FusedBatchNorm1d(3, allow_single_value=True), [X[:1]], "more than one value per channel"),
        (FusedBatchNorm1d(3).freeze(), [X], "expected a BatchNorm"),
    ):
        with pytest.raises(ValueError, match=says):
            batch_statistics(model, batches, progress=False)
    assert uncertainty.Prediction._fields == ("mean", "variance", "entropy", "mutual_information")
