"""The vocabulary of the tests: layouts, tolerances, activations, and `Problem`, one call of the layer with its answer.

The oracle is always `fusednorm.reference` in float64, fed the noise that `fusednorm.noise` says the layer drew, so that
outputs and gradients are compared number by number although the noise is random.

The suite runs on one device, `DEVICE`: the CPU, or what FUSEDNORM_TEST_DEVICE names. conftest.py makes it torch's
default, so that tests create tensors as usual; generators and the oracle's noise are put there by functions below.
"""

import math
import os

import torch

import fusednorm
from fusednorm import functional, reference

# With its index, as tensors report it.
DEVICE = torch.empty(0, device=os.environ.get("FUSEDNORM_TEST_DEVICE", "cpu")).device

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# What rounding alone may do, relative to the magnitude that a result is summed from. For the 16-bit types it is the
# rounding of the result (all else is computed in float32); for float32 about fifty roundings of float32.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 5e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}

LAYOUTS = ("first", "last", "sliced", "transposed", "expanded")

# Beside every name with its defaults, the ones that take parameters with other values.
PARAMETRISED = (
    ("leaky_relu", 0.2),
    ("leaky_relu", -0.5),
    ("elu", 0.7),
    ("gelu", "tanh"),
    ("hardtanh", 0.0, 1.5),
    ("softplus", 2.0, 1.0),
)
ACTIVATIONS = (None, *functional.activations(), *PARAMETRISED)


def act_id(act):
    return "none" if act is None else act if isinstance(act, str) else "-".join(map(str, act))


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def generator(seed):
    """A generator of the device under test."""
    return torch.Generator(DEVICE).manual_seed(seed)


def rng_state():
    """The state of the default generator of the device under test."""
    return torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()


def set_rng_state(state):
    (torch.cuda.set_rng_state if DEVICE.type == "cuda" else torch.set_rng_state)(state)


def spread(shape, generator):
    """Values of standard deviation one in every channel, even where a channel has two of them.

    Plain normal values of tiny batches lie close together now and then; their normalisation then loses digits in any
    implementation, and the tolerances would have to allow for it everywhere.
    """
    channels, count = shape[1], shape[0] * math.prod(shape[2:])
    rank = torch.rand(channels, count, generator=generator, dtype=torch.float64).argsort(1)
    jitter = torch.rand(channels, count, generator=generator, dtype=torch.float64)
    x = (rank + 0.25 + 0.5 * jitter) / max(count, 1) * 3.4 - 1.7
    return x.reshape(channels, shape[0], *shape[2:]).transpose(0, 1).contiguous()


def channels_last(x):
    """The same values with the channels innermost in memory, whatever the rank."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def lay_out(x, layout):
    """The same values in memory of the named layout; `expanded` repeats the first sample (2-D: channel)."""
    if layout == "first":
        return x.contiguous()
    if layout == "last":
        return channels_last(x)
    if layout == "sliced":
        # Starts one element off any alignment and leaves gaps in every dimension.
        room = torch.full([size + 2 for size in x.shape], math.nan, dtype=x.dtype, device=x.device)
        inner = room[tuple(slice(1, size + 1) for size in x.shape)]
        return inner.copy_(x)
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        dim = 0 if x.dim() > 2 else 1
        return x.narrow(dim, 0, 1).contiguous().expand(x.shape)
    raise ValueError(layout)


def leaf(x):
    return x.detach().requires_grad_()


def double(x):
    return None if x is None else x.detach().to(torch.float64).contiguous()


def activate(act, z):
    if act is None:
        return z
    name, *parameters = (act,) if isinstance(act, str) else act
    return reference.activation(name, z, *(p.detach() if isinstance(p, torch.Tensor) else p for p in parameters))


def slope(act, z):
    with torch.enable_grad():
        z = leaf(z)
        return torch.autograd.grad(activate(act, z).sum(), z)[0]


class Problem:
    """One call of `batch_norm_act_drop`, its gradients, and the same in float64 by the reference.

    dtype is the input's, param_dtype and stat_dtype those of the parameters and of the running statistics (default:
    float32, float64 with a float64 input). grad_layout is a layout of `lay_out`, or "scalar" for the gradient of
    `out.sum()`, all of whose strides are zero. act may be ("prelu", "shared") or ("prelu", "channel"); an order with
    "add" gets a residual, in the layout residual_layout. rows: (N, ...) bool, those that count.
    """

    def __init__(
        self,
        shape,
        dtype=torch.float32,
        layout="first",
        act=None,
        p=0.0,
        granularity="element",
        training=True,
        *,
        order="norm-act-drop",
        kind="bernoulli",
        ghost_batch_size=None,
        eval_matched_stats=False,
        residual_layout=None,
        param_dtype=None,
        stat_dtype=None,
        weight=True,
        bias=True,
        grad_layout=None,
        momentum=0.1,
        eps=1e-5,
        seed=7,
        offset=0.0,
        rows=None,
    ):
        self.opmath = opmath = torch.float64 if dtype == torch.float64 else torch.float32
        param_dtype, stat_dtype = param_dtype or opmath, stat_dtype or opmath
        draw = generator(20 + seed)
        channels = shape[1]
        x = spread(shape, draw) * (0.5 + torch.rand(channels, generator=draw).view(-1, *[1] * (len(shape) - 2)))
        self.x = leaf(lay_out((x + offset + 0.3).to(dtype), layout))

        def vector(low, high, kind, count=channels):
            return (low + (high - low) * torch.rand(count, generator=draw, dtype=torch.float64)).to(kind)

        self.weight = leaf(vector(0.4, 1.6, param_dtype)) if weight else None
        self.bias = leaf(vector(-0.6, 0.6, param_dtype)) if bias else None
        self.running_mean = vector(offset - 0.5, offset + 0.5, stat_dtype)
        self.running_var = vector(0.5, 2.0, stat_dtype)
        self.training, self.momentum, self.eps, self.seed, self.order = training, momentum, eps, seed, order
        self.act_weight = self.residual = None
        act, p = act if "act" in order else None, p if "drop" in order else 0.0
        if isinstance(act, tuple) and act[0] == "prelu":
            self.act_weight = leaf(vector(-0.4, 0.6, param_dtype, 1 if act[1] == "shared" else channels))
        self.act = act
        grad = torch.randn(shape, generator=draw, dtype=torch.float64)
        if "add" in order:
            residual = torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
            self.residual = leaf(lay_out(residual, residual_layout or layout))
        self.options = {
            "p": p,
            "noise": kind,
            "granularity": granularity,
            "drop_training": True,
            "order": order,
            "ghost_batch_size": ghost_batch_size,
            "eval_matched_stats": eval_matched_stats,
            "mask": rows,
            "seed": seed,
        }
        self.rows = None if rows is None else rows.unsqueeze(1)
        self._exact(noise(shape, p, seed, granularity, kind=kind), grad, dtype, grad_layout)

    @property
    def inputs(self):
        """Name -> tensor of all that gets a gradient."""
        names = ("x", "weight", "bias", "residual", "act_weight")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _exact(self, m, grad, dtype, grad_layout):
        exact = {name: leaf(double(value)) for name, value in self.inputs.items()}
        x, residual = exact["x"], exact.get("residual")
        act = ("prelu", exact["act_weight"]) if "act_weight" in exact else self.act
        mean, var = double(self.running_mean), double(self.running_var)
        before, after = reference.parse_order(self.order)

        def norm(u, weight, bias):
            return reference.batch_norm_act_drop(
                u,
                mean,
                var,
                weight,
                bias,
                self.training,
                eps=self.eps,
                order="norm",
                ghost_batch_size=self.options["ghost_batch_size"],
                mask=self.rows,
            )

        self.u = u = reference.run_stages(before, x, act, m)
        z = norm(u, exact.get("weight"), exact.get("bias"))
        y = reference.run_stages(after, z, act, m, residual)
        if self.rows is not None:
            y = torch.where(self.rows, y, 0)
        if "act" in after:
            # Near a kink of the activation the slope hangs on the last bit of z: those elements get no gradient.
            with torch.no_grad():
                v = reference.run_stages(after[: after.index("act")], z, act, m, residual)
            kink = (slope(act, v - 1e-3) - slope(act, v + 1e-3)).abs() > 0.01
            grad = grad.masked_fill(kink, 0)
        if grad_layout == "scalar":
            grad = torch.ones((), dtype=torch.float64).expand(z.shape)
        self.grad = grad.to(dtype) if grad_layout == "scalar" else lay_out(grad.to(dtype), grad_layout or "first")
        grad = double(self.grad)
        *grads, dz, du = torch.autograd.grad(y, [*exact.values(), z, u], grad)
        self.expected = {"y": y.detach()} | dict(zip(exact, grads, strict=True))

        # The magnitude that each result is summed from: what its rounding errors scale with.
        with torch.no_grad():
            rows = [0, *range(2, z.dim())]
            xhat = norm(u, None, None)
            gain = (u.var(rows, correction=0) if self.training else var).add(self.eps).rsqrt()
            gain = gain if self.weight is None else gain * exact["weight"].abs()
            noisy, count = m.abs().max().clamp_min(1), math.prod(z.shape) / z.size(1)
            du = (gain.max() * dz.abs().max()).maximum(du.abs().max()) * (noisy * 1.2 if before else 1)
            self.scale = {
                "y": z.abs().max() * noisy + (0 if residual is None else residual.abs().max() * noisy),
                "x": du,
                "weight": (dz * xhat).square().sum(rows).sqrt().max(),
                "bias": dz.square().sum(rows).sqrt().max(),
                "residual": grad.abs().max() * noisy,
                "act_weight": du * x.abs().max() * noisy * count**0.5 * z.size(1) ** 0.5
                + (grad * y).abs().max() * noisy * count**0.5,
            }

    def forward(self):
        return functional.batch_norm_act_drop(
            self.x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            act=self.act if self.act_weight is None else ("prelu", self.act_weight),
            residual=self.residual,
            **self.options,
        )

    def fused(self):
        y = self.forward()
        inputs = {name: value for name, value in self.inputs.items() if value.requires_grad}
        out = {"y": y}
        return out | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), self.grad), strict=True))

    def check(self):
        got = self.fused()
        for name, value in got.items():
            like = self.x if name == "y" else self.inputs[name]
            assert value.dtype == like.dtype, f"{name}: {value.dtype}"
            # A float64 parameter beside a float32 input gets a gradient that was computed in float32.
            tolerance = max(TOLERANCE[value.dtype], TOLERANCE[self.opmath])
            close(value, self.expected[name], self.scale[name], name, tolerance)
        return got


def close(got, expected, scale, name="result", tolerance=None):
    """Compare with a float64 answer: |got - expected| <= tolerance (got's dtype's) * (|expected| + scale)."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    allowed = (tolerance or TOLERANCE[got.dtype]) * (expected.abs() + scale)
    error = (got.detach().double() - expected).abs()
    bad = ~(error <= allowed)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} differ, first at {at}: got {got[at].item()!r}, expected "
            f"{expected[at].item()!r}, allowed {allowed[at].item():.3g}; largest error {error[bad].max().item():.3g}"
        )


def noise(shape, p, seed, granularity="element", dtype=torch.float64, kind="bernoulli"):
    """m as the CPU draws it, for the device under test: other devices must draw the same."""
    return fusednorm.noise(shape, p, seed=seed, granularity=granularity, dtype=dtype, kind=kind).to(DEVICE)


def same_bits(a, b):
    """Equal shape, dtype and bits (a NaN equals itself, -0 differs from 0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integer), b.detach().contiguous().view(integer))


# The arguments that both long schemas share, with defaults for what a test leaves open.
CHAIN = {
    "residual": None,
    "act_weight": None,
    "training": True,
    "eps": 1e-5,
    "order": "norm-act-drop",
    "act": "identity",
    "act_params": [],
    "noise": "bernoulli",
    "p": 0.0,
    "granularity": "element",
    "ghost_batch_size": 0,
}


def raw_forward(x, weight=None, bias=None, running_mean=None, running_var=None, seed=None, **options):
    """The operator; returns (output, mean, invstd, stat_var, stat_mean, mask)."""
    return torch.ops.fusednorm.forward(**forward_arguments(x, weight, bias, running_mean, running_var, seed, **options))


def forward_arguments(x, weight=None, bias=None, running_mean=None, running_var=None, seed=None, **options):
    return {
        "input": x,
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "seed": seed,
        **CHAIN,
        "eval_matched_stats": False,
        "save_mask": False,
    } | options


def raw_backward(grad, x, weight, bias, mean, invstd, mask, seed=None, **options):
    """The backward operator; returns (grad_input, grad_weight, grad_bias, grad_residual, grad_act_weight)."""
    return torch.ops.fusednorm.backward(
        **backward_arguments(grad, x, weight, bias, mean, invstd, mask, seed, **options)
    )


def backward_arguments(grad, x, weight, bias, mean, invstd, mask, seed=None, **options):
    return {
        "grad_output": grad,
        "input": x,
        "weight": weight,
        "bias": bias,
        "save_mean": mean,
        "save_invstd": invstd,
        "mask": mask,
        "seed": seed,
        **CHAIN,
        "output_mask": [True, weight is not None, bias is not None, False, False],
    } | options


def right_or_raises(function, expected, scale=1.0):
    """A result may be refused with a sentence, but never be wrong: silent zeros, a lost tangent, a constant."""
    try:
        got = function()
    except (RuntimeError, ValueError, TypeError) as error:
        if len(str(error)) < 10:
            raise
        return False
    for value, answer in zip(got, expected, strict=True):
        assert value is not None
        close(value, double(answer), scale)
    return True
