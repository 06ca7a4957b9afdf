"""Is the fused layer right on this workload, and is a rival? Asked before anything is timed.

The oracle is fusednorm.reference in float64, fed the noise that fusednorm.noise gives for the same seed. It runs on a
few channels at a time: channels are independent, and float64 copies of the largest tensors would not fit.
"""

from __future__ import annotations

import torch
from torch import nn

import fusednorm
from benchmarks.providers import build
from benchmarks.workloads import Workload

SEED = 20240229

# (relative to the value, relative to the largest value, the same for the parameters' gradients, which are long sums).
# float32: a few roundings, and sums of up to 200,000 terms; bfloat16: outputs are rounded once, by up to 2**-8.
TOLERANCE = {torch.float32: (1e-6, 2e-6, 1e-5), torch.bfloat16: (4e-3, 1e-4, 1e-5)}
# The unfused layers sum less accurately in some layouts, and round to bfloat16 after every stage.
LOOSE = {torch.float32: (2e-5, 4e-5, 2e-4), torch.bfloat16: (4e-2, 8e-3, 1e-2)}

# Error of z where it passes through zero: mostly that of the stock layers' variance over 190,000 rows (measured 5e-6).
Z_ERROR = 2e-5
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}  # elements


class _Worst:
    """Largest error seen per quantity, in units of its tolerance: 1 is the limit."""

    def __init__(self, dtype: torch.dtype, who: str = "the fused layer"):
        self.dtype, self.who, self.seen = dtype, who, {}

    def add(self, name: str, actual, expected, tolerance=TOLERANCE, slack=0.0) -> None:
        relative, of_scale, of_scale_sum = tolerance[self.dtype]
        if actual.dim() == 1:
            of_scale = of_scale_sum
        actual, expected = actual.double(), expected.double()
        scale = expected.abs().amax() if expected.numel() else 0.0
        error = (actual - expected).abs() / (relative * expected.abs() + of_scale * scale + slack + 1e-30)
        # amax keeps NaN, and NaN <= 1 is false: a NaN fails.
        worst = error.amax().item() if error.numel() else 0.0
        self.seen[name] = worst if worst != worst else max(worst, self.seen.get(name, 0.0))

    def verdict(self) -> dict[str, float]:
        wrong = {name: worst for name, worst in self.seen.items() if not worst <= 1}
        if wrong:
            text = ", ".join(f"{name} is off by {worst:.3g} tolerances" for name, worst in wrong.items())
            raise AssertionError(f"{self.who} is wrong, not timed: {text}")
        return {name: round(worst, 4) for name, worst in self.seen.items()}


def _column(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return vector.view(-1, *[1] * (like.dim() - 2))


def _jump(z: torch.Tensor, act) -> torch.Tensor:
    """How far the activation's derivative jumps within a rounding error of z: there, either side is right."""
    name, *parameters = act if isinstance(act, tuple) else (act,)
    if name is None:
        return torch.zeros_like(z)
    slopes = []
    for shift in (-Z_ERROR, Z_ERROR):
        with torch.enable_grad():
            point = (z + shift).requires_grad_()
            slopes.append(torch.autograd.grad(fusednorm.reference.activation(name, point, *parameters).sum(), point)[0])
    jump = (slopes[0] - slopes[1]).abs()
    return jump.masked_fill_(jump < 1e-2, 0.0)


def _parts(workload: Workload, chunk: int, sample: int | None = None) -> list[slice]:
    """Channels to check, about `chunk` elements at a time: all, or `sample` elements at both ends."""
    channels, each = workload.channels, workload.numel // workload.channels
    ends = max(1, sample // each // 2) if sample else channels
    width = max(1, chunk // each)
    if 2 * ends >= channels:
        return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]
    return [slice(0, ends), slice(channels - ends, channels)]


def fused(
    module: nn.Module, workload: Workload, p: float, inputs: tuple, grad: torch.Tensor, sample: int | None = None
) -> dict[str, float]:
    """Forward, gradients and evaluation of `module` against the reference; at p = 0 against the unfused layers as well.

    With `sample`, of as many elements as that, a few channels' worth, where the workload has more.

    Returns the errors in units of the tolerance. Raises AssertionError naming every quantity that is off.
    """
    worst = _Worst(workload.dtype)
    inputs = [t.detach().requires_grad_() for t in inputs]
    x = inputs[0]
    y = module(*inputs, seed=SEED)
    y.backward(grad)
    noise = None
    if p:
        noise = fusednorm.noise(
            workload.shape, p, seed=SEED, kind=workload.noise, granularity=workload.granularity, device=x.device
        )
    if workload.order == "drop":
        worst.add("output", y.detach(), x.detach() * noise)
        worst.add("grad_x", x.grad, grad * noise)
        return worst.verdict()
    stock = None
    if p == 0:
        stock = build("eager", workload, p, x.device)
        stock_norm = next(m for m in stock.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        x_stock, *more_stock = (t.detach().requires_grad_() for t in inputs)
        y_stock = stock(x_stock, *more_stock)
        y_stock.backward(grad)
    with torch.no_grad():
        evaluated = module.eval()(*inputs)
    module.train()

    before, after = fusednorm.reference.parse_order(workload.order)
    eps = workload.norm.get("eps", 1e-5)
    exact = {"grad_weight": [], "grad_bias": []}
    slack = {"grad_weight": [], "grad_bias": []}
    parts = _parts(workload, CHUNK[x.device.type], sample)
    kept = torch.cat([torch.arange(part.start, part.stop, device=x.device) for part in parts])
    for part in parts:
        weight, bias = (v.detach()[part].double().requires_grad_() for v in (module.weight, module.bias))
        stats = module.running_mean[part].double(), module.running_var[part].double()
        leaf, *residual = (t.detach()[:, part].double().requires_grad_() for t in inputs)
        residual = residual[0] if residual else None
        noised = None if noise is None else noise[:, part].double()
        u = fusednorm.reference.run_stages(before, leaf.detach(), workload.act, noised)

        def reference(x, order, stats=stats, weight=weight, bias=bias, **arguments):
            return fusednorm.reference.batch_norm_act_drop(
                x, *stats, weight, bias, eps=eps, act=workload.act, order=order, **arguments
            )

        expected = reference(leaf, workload.order, training=True, residual=residual, noise=noised)
        incoming = grad[:, part].double()
        expected.backward(incoming)
        with torch.no_grad():
            z = reference(u, "norm", training=True)
            if "act" in after:
                entering = after[: after.index("act")]
                v = fusednorm.reference.run_stages(entering, z, workload.act, noised, residual)
                noisy = noised is not None and "drop" in after
                flip = _jump(v, workload.act).mul_((incoming * noised if noisy else incoming).abs())
            else:
                flip = torch.zeros_like(z)
            xhat = (z - _column(bias, z)) / _column(weight, z)
            over = [d for d in range(z.dim()) if d != 1]
            slack["grad_x"] = flip * _column(weight / (u.var(over, correction=0) + eps).sqrt(), z)
            slack["grad_bias"].append(flip.sum(over))
            slack["grad_weight"].append((flip * xhat.abs()).sum(over))
            still = reference(leaf, workload.order, training=False, residual=residual)
            worst.add("eval output", evaluated[:, part], still)
        worst.add("output", y.detach()[:, part], expected.detach())
        worst.add("grad_x", x.grad[:, part], leaf.grad, slack=slack["grad_x"])
        if residual is not None:
            worst.add("grad_residual", inputs[1].grad[:, part], residual.grad, slack=flip)
        exact["grad_weight"].append(weight.grad)
        exact["grad_bias"].append(bias.grad)
        if stock is not None:
            worst.add("output vs eager", y.detach()[:, part], y_stock.detach()[:, part], LOOSE)
            worst.add("grad_x vs eager", x.grad[:, part], x_stock.grad[:, part], LOOSE, slack["grad_x"])
            if residual is not None:
                ours, theirs = inputs[1].grad[:, part], more_stock[0].grad[:, part]
                worst.add("grad_residual vs eager", ours, theirs, LOOSE, slack=flip)
    for name, parameter in (("grad_weight", module.weight), ("grad_bias", module.bias)):
        worst.add(name, parameter.grad[kept], torch.cat(exact[name]), slack=torch.cat(slack[name]))
    if stock is not None:
        for name in ("weight", "bias"):
            ours, theirs = getattr(module, name).grad[kept], getattr(stock_norm, name).grad[kept]
            worst.add(f"grad_{name} vs eager", ours, theirs, LOOSE, torch.cat(slack[f"grad_{name}"]))
        worst.add("running_mean vs eager", module.running_mean, stock_norm.running_mean, LOOSE)
        worst.add("running_var vs eager", module.running_var, stock_norm.running_var, LOOSE)
    module.zero_grad(set_to_none=True)
    return worst.verdict()


def against_stock(
    who: str, given: dict[str, torch.Tensor], stock: nn.Module, workload: Workload, x: torch.Tensor, grad: torch.Tensor
) -> dict[str, float]:
    """Output and gradients that `who` gave for a stock norm and activation (no noise) against those that torch gives.

    Returns and raises as `fused` does, of whose limits these are the loose ones.
    """
    worst = _Worst(workload.dtype, who)
    leaf, norm = x.detach().requires_grad_(), stock[0]
    y = stock.train()(leaf)
    expected = dict(
        zip(
            ("grad_x", "grad_weight", "grad_bias"),
            torch.autograd.grad(y, (leaf, norm.weight, norm.bias), grad),
            strict=True,
        )
    )
    y = y.detach()
    over = [d for d in range(x.dim()) if d != 1]
    flips = []
    for part in _parts(workload, CHUNK[x.device.type]):
        weight, bias = (_column(v.detach()[part].double(), x) for v in (norm.weight, norm.bias))
        inside = x[:, part].double()
        variance, mean = torch.var_mean(inside, over, correction=0, keepdim=True)
        z = (inside - mean) * (variance + norm.eps).rsqrt() * weight + bias
        flip = _jump(z, workload.act).mul_(grad[:, part].double().abs())
        flips.append((flip.sum(over), (flip * ((z - bias) / weight).abs()).sum(over)))
        worst.add("output", given["output"][:, part], y[:, part], LOOSE)
        slack = flip * weight * (variance + norm.eps).rsqrt()
        worst.add("grad_x", given["grad_x"][:, part], expected["grad_x"][:, part], LOOSE, slack)
    of_bias, of_weight = (torch.cat(slacks) for slacks in zip(*flips, strict=True))
    worst.add("grad_weight", given["grad_weight"], expected["grad_weight"], LOOSE, of_weight)
    worst.add("grad_bias", given["grad_bias"], expected["grad_bias"], LOOSE, of_bias)
    return worst.verdict()
