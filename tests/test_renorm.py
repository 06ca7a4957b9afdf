"""Statistics that are corrected towards others, given from outside, or of a domain."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

import fusednorm
from fusednorm import FusedBatchNorm1d, FusedBatchNorm2d, LazyFusedBatchNorm1d, functional, reference


# ---- batch renormalisation -------------------------------------------------------------------------------------------
class Renorm(nn.Module):
    """Ioffe 2017, algorithm 1, line by line, around torch's running variance."""

    def __init__(self, like, r_max, d_max):
        super().__init__()
        self.act, self.order, self.limits = like.act, like.order, (r_max, d_max)
        self.norm = nn.BatchNorm1d(4, affine=like.affine).double()
        self.norm.load_state_dict(like.state_dict())

    def forward(self, x, residual=None, m=None):
        (before, after), n = reference.parse_order(self.order), self.norm
        name = None if self.act is None else self.act.__class__.__name__.lower()
        u = reference.run_stages(before, x, name, m)
        rows = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(u, rows, correction=0)
        std, running = (var + n.eps).sqrt(), (n.running_var + n.eps).sqrt()
        r_max, d_max = self.limits
        r = (std / running).clamp(1 / r_max, r_max).detach()
        d = ((mean - n.running_mean) / running).clamp(-d_max, d_max).detach()
        each = lambda v: reference.per_channel(v, u)  # noqa: E731
        xhat = (u - each(mean)) / each(std) * each(r) + each(d)
        z = xhat if n.weight is None else xhat * each(n.weight) + each(n.bias)
        count = u.numel() // u.size(1)
        with torch.no_grad():
            n.running_mean.lerp_(mean, n.momentum)
            n.running_var.lerp_(var * count / (count - 1), n.momentum)
        return reference.run_stages(after, z, name, m, residual)


@pytest.mark.parametrize("order", ["norm-act-drop", "act-norm", "drop-norm-act", "norm-add-act", "norm"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 6)], ids=str)
def test_renorm(shape, affine, order):
    torch.manual_seed(2)
    act, drop = ("tanh" if "act" in order else None), (0.4 if "drop" in order else None)
    layer = FusedBatchNorm1d(4, act=act, drop=drop, order=order, affine=affine, renorm=(1.5, 0.5)).double()
    expected = Renorm(layer, 1.5, 0.5)
    for step in range(4):
        x = torch.randn(shape, dtype=torch.float64) * (1 + step) + step / 3
        residual = torch.randn(shape, dtype=torch.float64) if "add" in order else None
        m = fusednorm.noise(shape, 0.4, seed=step, dtype=x.dtype) if drop else None
        a, b = (x.clone().requires_grad_() for _ in range(2))
        y, z = layer(a, residual, seed=step), expected(b, residual, m)
        torch.testing.assert_close(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        if affine:
            torch.testing.assert_close(layer.weight.grad, expected.norm.weight.grad)
            torch.testing.assert_close(layer.bias.grad, expected.norm.bias.grad)
        torch.testing.assert_close(layer.running_mean, expected.norm.running_mean)
        torch.testing.assert_close(layer.running_var, expected.norm.running_var)
        layer.zero_grad()
        expected.zero_grad()
    assert layer.num_batches_tracked == 4
    layer.eval()
    plain = FusedBatchNorm1d(4, act=act, drop=drop, order=order, affine=affine).double().eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, residual), plain(x, residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_room_it_is_batch_norm(dtype):
    x = torch.randn(8, 4, 5, 5).to(dtype)
    outputs = []
    for renorm in (None, (1, 0)):
        layer = FusedBatchNorm2d(4, act="relu", drop=0.3, renorm=renorm)
        leaf = x.clone().requires_grad_()
        y = layer(leaf, seed=1)
        y.float().square().sum().backward()
        outputs.append((y.detach(), leaf.grad, layer.weight.grad, layer.running_var))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)


def test_with_all_room_training_is_evaluation():
    """r and d undo what the batch's statistics did: the output is that by the running ones."""
    layer = FusedBatchNorm1d(4, act="tanh", renorm=(float("inf"), float("inf"))).double()
    layer(torch.randn(64, 4, dtype=torch.float64) * 3 + 1)
    x = torch.randn(64, 4, dtype=torch.float64)
    expected = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), expected)


def test_limits_may_change():
    layer, x = FusedBatchNorm1d(4, renorm=(1, 0)), torch.randn(16, 4) * 3
    first = layer(x)
    layer.renorm = (3.0, 5.0)
    assert not torch.allclose(layer(x), first)
    layer.renorm = (0.5, 1)
    with pytest.raises(ValueError, match="renorm: expected .* r_max >= 1"):
        layer(x)


def test_renorm_with_rows_that_count():
    x, mask = torch.randn(6, 4, 9), torch.arange(9) < torch.tensor([9, 2, 0, 5, 7, 1])[:, None]
    packed, padded = (FusedBatchNorm1d(4, act="relu", renorm=(2, 1)) for _ in range(2))
    y, z = padded(x, mask=mask), packed(x.movedim(1, -1)[mask])
    torch.testing.assert_close(y.movedim(1, -1)[mask], z)
    torch.testing.assert_close(padded.state_dict(), packed.state_dict())


def test_renorm_in_transforms_and_compiled():
    x = torch.randn(16, 4, dtype=torch.float64)
    layer = FusedBatchNorm1d(4, act="tanh", renorm=(2, 1), track_running_stats=True).double()
    leaf = x.clone().requires_grad_()
    copy.deepcopy(layer)(leaf).square().sum().backward()
    again = copy.deepcopy(layer)
    torch.testing.assert_close(torch.func.grad(lambda x: again(x).square().sum())(x), leaf.grad)
    torch.testing.assert_close(again.running_var, 0.9 + 0.1 * x.var(0))
    compiled, twin = copy.deepcopy(layer), copy.deepcopy(layer)
    torch._dynamo.reset()
    step = torch.compile(compiled, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(step(x), twin(x))
    torch.testing.assert_close(compiled.state_dict(), twin.state_dict())


def test_renorm_in_a_checkpoint_that_leaves_statistics_alone():
    from torch.utils.checkpoint import checkpoint

    layer = FusedBatchNorm1d(4, renorm=(2, 1), update_when_recomputed=False)
    x = torch.randn(16, 4, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, 0.1 * x.detach().mean(0))


def test_renorm_is_copied_pickled_and_shown():
    layer = FusedBatchNorm2d(4, renorm=(3, 5))
    assert "renorm=(3.0, 5.0)" in repr(layer) and "renorm" not in repr(FusedBatchNorm2d(4))
    assert copy.deepcopy(layer).renorm == (3, 5)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).renorm == (3, 5)
    assert FusedBatchNorm2d.from_torch(nn.BatchNorm2d(4), renorm=(2, 0)).renorm == (2, 0)
    lazy = LazyFusedBatchNorm1d(renorm=(2, 0))
    lazy(torch.randn(4, 3))
    assert lazy.renorm == (2, 0)


@pytest.mark.parametrize("renorm", [3, (3,), (0.5, 1), (2, -1), ("a", 1), (float("nan"), 1), (2, True)])
def test_bad_limits(renorm):
    with pytest.raises(ValueError, match="renorm: expected"):
        FusedBatchNorm1d(4, renorm=renorm)


def test_renorm_where_it_cannot_be():
    x = torch.randn(8, 4)
    with pytest.raises(ValueError, match="track_running_stats: expected True with renorm"):
        FusedBatchNorm1d(4, track_running_stats=False, renorm=(2, 1))
    with pytest.raises(ValueError, match="ghost_batch_size: expected None with renorm"):
        FusedBatchNorm1d(4, ghost_batch_size=4, renorm=(2, 1))
    for layer in (FusedBatchNorm1d(4, track_running_stats=False), FusedBatchNorm1d(4, ghost_batch_size=4)):
        layer.renorm = (2, 1)
        with pytest.raises(ValueError, match="renorm: expected running statistics|ghost_batch_size: expected None"):
            layer(x)
    with pytest.raises(ValueError, match="weights: expected None with renorm"):
        FusedBatchNorm1d(4, renorm=(2, 1))(x, weights=torch.ones(8))


# ---- statistics from outside -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["norm-act-drop", "act-norm", "drop-norm-act", "norm-add-act"])
@pytest.mark.parametrize("affine", [True, False])
def test_given_statistics_have_gradients(order, affine):
    act, p = ("tanh" if "act" in order else None), (0.3 if "drop" in order else 0.0)
    x, r = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    mean, weight, bias = torch.randn(3, 3, dtype=torch.float64)
    var = torch.rand(3, dtype=torch.float64) + 0.5
    given = [x, mean, var] + ([weight, bias] if affine else [])
    residual = r if "add" in order else None

    def call(x, mean, var, weight=None, bias=None):
        return functional.batch_norm_act_drop(
            x, mean, var, weight, bias, act=act, p=p, order=order, drop_training=True, seed=4, residual=residual
        )

    plain = call(*given)
    inputs = [t.clone().requires_grad_() for t in given]
    assert torch.equal(call(*inputs), plain)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_batch_norm_from_its_two_halves():
    """Statistics in torch, the rest by us: the gradient of batch norm."""
    x = torch.randn(16, 4, 5, dtype=torch.float64)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    var, mean = torch.var_mean(a, [0, 2], correction=0)
    y = functional.batch_norm_act_drop(a, mean, var, act="silu")
    z = functional.batch_norm_act_drop(b, None, None, training=True, act="silu")
    torch.testing.assert_close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_statistics_to_be_updated_have_none():
    mean, var = torch.zeros(4, requires_grad=True), torch.ones(4)
    with pytest.raises(RuntimeError, match="running_mean: expected a tensor that requires no gradient when training"):
        functional.batch_norm_act_drop(torch.randn(8, 4), mean, var, training=True)
    with pytest.raises(RuntimeError, match="running_var should contain 4 elements not 3"):
        functional.batch_norm_act_drop(torch.randn(8, 4), mean, torch.ones(3))


# ---- domains ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("affine", [False, True])
def test_domains_are_several_stock_layers(affine):
    layer = FusedBatchNorm2d(4, act="relu", domains=3, domain_affine=affine)
    stock = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
    if not affine:
        for bn in stock[1:]:
            bn.weight, bn.bias = stock[0].weight, stock[0].bias
    for i, bn in enumerate(stock):
        nn.init.uniform_(bn.running_mean)
        if i == 0 or affine:
            nn.init.uniform_(bn.weight)
        layer.domain(i).load_state_dict(bn.state_dict())
    for step, domain in itertools.product(range(2), (2, 0, 1, 1)):
        x = torch.randn(6, 4, 3, 3) * (1 + domain) + step
        y, z = layer(x, domain=domain), stock[domain](x).relu()
        torch.testing.assert_close(y, z)
        y.square().mean().backward()
        z.square().mean().backward()
    layer.eval()
    for i, bn in enumerate(stock.eval()):
        torch.testing.assert_close(layer.domain(i).state_dict(), bn.state_dict())
        torch.testing.assert_close(layer(x, domain=i), bn(x).relu())
        if i == 0 or affine:
            torch.testing.assert_close(layer.domain(i).weight.grad, bn.weight.grad)
    assert len(list(layer.parameters())) == (6 if affine else 2)


def test_domains_are_saved_moved_and_reset():
    layer, x = FusedBatchNorm1d(4, domains=2), torch.randn(8, 4)
    layer(x, domain=1)
    twin = FusedBatchNorm1d(4, domains=2)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.domain(1).running_mean, layer.domain(1).running_mean)
    assert not torch.equal(twin.domain(1).running_mean, twin.domain(0).running_mean)
    assert copy.deepcopy(layer).domains == 2 and "domains=2" in repr(layer)
    assert layer.double().domain(1).running_mean.dtype == torch.float64
    layer.freeze().reset_running_stats()
    assert layer.domain(1).num_batches_tracked == 1
    layer.unfreeze().reset_running_stats()
    assert layer.domain(1).num_batches_tracked == 0 and not layer.domain(1).running_mean.any()


def test_a_compiled_layer_of_domains():
    layer = FusedBatchNorm1d(4, act="relu", domains=2)
    eager = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for domain in (0, 1, 0):
        x = torch.randn(8, 4)
        torch.testing.assert_close(compiled(x, domain=domain), eager(x, domain=domain))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


@pytest.mark.parametrize("domain", [None, 2, -1, True, "a", 1.0])
def test_bad_domain(domain):
    with pytest.raises(ValueError, match="domain: expected an int from 0 to 1, but got"):
        FusedBatchNorm1d(4, domains=2)(torch.randn(8, 4), domain=domain)


def test_what_domains_cannot_do():
    for domains in (0, -1, 1.5, True, "two"):
        with pytest.raises(ValueError, match="domains: expected a positive int"):
            FusedBatchNorm1d(4, domains=domains)
    with pytest.raises(ValueError, match="domains: expected 1 with track_running_stats=False"):
        FusedBatchNorm1d(4, domains=2, track_running_stats=False)
    with pytest.raises(ValueError, match="domain: expected an int from 0 to 0, but got 1"):
        FusedBatchNorm1d(4)(torch.randn(8, 4), domain=1)
    with pytest.raises(ValueError, match=r"to_torch: expected a layer with one domain; .* layer.domain\(i\)"):
        FusedBatchNorm1d(4, domains=2).to_torch()
    assert FusedBatchNorm1d(4)(torch.randn(8, 4), domain=0).shape == (8, 4)


def test_tools_that_know_one_set_of_statistics():
    """They refuse, or say why they leave a layer alone: nothing is lost in silence."""
    net = nn.Sequential(nn.Linear(3, 4), FusedBatchNorm1d(4, domains=2))
    with pytest.raises(ValueError, match="model: 1 has several domains"):
        fusednorm.recalibrate(net, [torch.randn(8, 3)], progress=False)
    with pytest.raises(RuntimeError, match="would lose domains=2"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    with pytest.raises(RuntimeError, match=r"would lose renorm=\(2.0, 1.0\)"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(FusedBatchNorm1d(4, renorm=(2, 1))))
    nn.utils.fusion.fuse_linear_bn_eval(nn.Linear(3, 4).eval(), FusedBatchNorm1d(4, renorm=(2, 1)).eval())


def test_a_domain_has_its_own_parametrisation():
    class Hundredfold(nn.Module):
        def forward(self, weight):
            return 100 * weight

    layer, x = FusedBatchNorm1d(3, domains=2, domain_affine=True), torch.randn(8, 3)
    plain = layer(x, domain=1)
    nn.utils.parametrize.register_parametrization(layer.other_domains[0], "weight", Hundredfold())
    torch.testing.assert_close(layer(x, domain=1), 100 * plain)
    with pytest.raises(ValueError, match="domain: expected no parametrisation"):
        layer.domain(1)


def test_all_domains_are_reset():
    layer = FusedBatchNorm1d(3, domains=3, domain_affine=True)
    for p in layer.parameters():
        nn.init.constant_(p, 7.0)
    layer.reset_parameters()
    assert all(p.detach().eq(0 if "bias" in name else 1).all() for name, p in layer.named_parameters())
