"""The operator in plain torch, with an explicit noise tensor.

The same formula as the kernels, one line per stage: oracle of the tests, baseline of the benchmarks, and the graph that
double backward differentiates. Imports only torch.
"""

import torch
import torch.nn.functional as F

# torch.nn.functional twin and default parameters of every activation of csrc/math/activations.h.
ACTIVATIONS = {
    "identity": (lambda z: z, ()),
    "relu": (F.relu, ()),
    "leaky_relu": (F.leaky_relu, (0.01,)),
    "elu": (F.elu, (1.0,)),
    "gelu": (F.gelu, ()),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), ()),
    "silu": (F.silu, ()),
    "tanh": (torch.tanh, ()),
    "sigmoid": (torch.sigmoid, ()),
    "hardtanh": (F.hardtanh, (-1.0, 1.0)),
    "relu6": (F.relu6, ()),
    "hardswish": (F.hardswish, ()),
    "mish": (F.mish, ()),
    "softplus": (F.softplus, (1.0, 20.0)),
}
_APPROXIMATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


def resolve_activation(act):
    """The operator's name and full parameters of `act`: a name, `(name, *parameters)` or None.

    Parameters left out take torch's defaults. `("gelu", "tanh")` is `gelu_tanh`.

    Raises:
        ValueError: unknown name, too many parameters, or one that is not a number.
    """
    if act is None:
        return "identity", ()
    name, *given = act if isinstance(act, (tuple, list)) and act else (act,)
    if name == "gelu" and len(given) == 1 and isinstance(given[0], str):
        if given[0] not in _APPROXIMATIONS:
            raise ValueError(f"act: expected 'none' or 'tanh' as the approximation of gelu, but got {given[0]!r}")
        return _APPROXIMATIONS[given[0]], ()
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, but got {name!r}")
    defaults = ACTIVATIONS[name][1]
    if len(given) > len(defaults) or not all(isinstance(g, (int, float)) for g in given):
        raise ValueError(f"act: expected at most {len(defaults)} numbers as parameters of {name!r}, but got {given}")
    return name, tuple(float(g) for g in given) + defaults[len(given) :]


def activation(name, z, *parameters):
    """The torch twin of an activation at the pre-activation `z`."""
    name, parameters = resolve_activation((name, *parameters))
    return ACTIVATIONS[name][0](z, *parameters)


def per_channel(v, like):
    """(C,) as (1, C, 1, ...), to broadcast against `like` (N, C, ...)."""
    return v.reshape(1, -1, *[1] * (like.dim() - 2))


def batch_norm_act_drop(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    act=None,
    order="norm-act-drop",
    residual=None,
    noise=None,
):
    """Batch norm, activation and multiplicative noise `noise`, differentiable any number of times.

    Computes in float32 (float64 for a float64 input) and rounds once, to the input's dtype, as the kernels do. Does not
    update the running statistics; `momentum` is accepted so that the arguments are those of the functional.

    Args:
        input: (N, C, ...), floating point.
        running_mean, running_var: (C,), used when not training.
        weight, bias: (C,) or None.
        noise: the multiplier m, broadcastable to `input`; None for none.

    Returns:
        (N, C, ...) in the input's dtype.

    Raises:
        ValueError: an order other than "norm-act-drop", or a residual.
    """
    if order != "norm-act-drop" or residual is not None:
        raise ValueError("order: expected 'norm-act-drop' without a residual")
    u = input.double() if input.dtype == torch.float64 else input.float()
    if training:
        axes = [0, *range(2, u.dim())]
        var, mean = torch.var_mean(u, axes, correction=0)
    else:
        mean, var = running_mean.to(u.dtype), running_var.to(u.dtype)
    z = (u - per_channel(mean, u)) * per_channel(torch.rsqrt(var + eps), u)
    if weight is not None:
        z = z * per_channel(weight.to(u.dtype), u)
    if bias is not None:
        z = z + per_channel(bias.to(u.dtype), u)
    name, parameters = resolve_activation(act)
    y = activation(name, z, *parameters)
    if noise is not None:
        y = y * noise.to(u.dtype)
    return y.to(input.dtype)
