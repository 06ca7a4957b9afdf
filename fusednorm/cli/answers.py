"""Answers that do not depend on this machine: noise at a seed, and gradients in float64 by the plain torch reference.

The literals are those of the noise's definition, computed without this library: `tests/definition.py` has it, and
`tests/test_cli.py` holds the two together.
"""

import torch
from torch import Tensor

from .. import functional, reference

SEED = 2**40 + 3  # both words of it count
# (16, 4) at p = 0.5, a bit for each element, the first one highest: 1 where it is kept.
KEPT = 0x962C5D7F1934DB1C
# (9, 2): the 16-bit draws. Two groups of rows, as eight share a counter.
DRAWS = (
    *(5718, 63556, 46818, 9044, 61455, 60507, 16422, 9756, 49490),
    *(31463, 5797, 7961, 48726, 1522, 7727, 21720, 48818, 47041),
)
# (9, 2) at alpha = 1.
NORMAL = (
    *(1.0030617, -0.1811064, 0.1798472, -0.6018019, -0.6250320, 2.0052046, -0.4864483, -0.7904003, 2.2467630),
    *(1.6490289, 1.9941979, -0.3124952, 1.3063084, 1.9506964, 1.6148545, 1.6283068, -1.9400133, 0.6808406),
)
NORMAL_ERROR = 3e-6  # of float32, and of the literals' last digit
GRADIENT_ERROR = 1e-5  # a hundred roundings of float32


def bernoulli(device: str) -> int:
    """How many elements of the known mask are wrong."""
    m = functional.noise((16, 4), 0.5, seed=SEED, device=device).cpu().flatten()
    expected = torch.tensor([2.0 * (KEPT >> (63 - i) & 1) for i in range(64)])
    return int((m != expected).sum())


def uniform(device: str) -> int:
    """How many elements are not 1 + beta t to the last bit, at beta = 1."""
    m = functional.noise((9, 2), 1.0, seed=SEED, kind="uniform", device=device).cpu().flatten()
    expected = torch.tensor([(2 * draw + 1) / 65536 for draw in DRAWS])
    return int((m != expected).sum())


def gaussian(device: str) -> float:
    """The largest error."""
    m = functional.noise((9, 2), 1.0, seed=SEED, kind="gaussian", device=device).cpu().flatten()
    return float((m.double() - torch.tensor(NORMAL, dtype=torch.float64)).abs().max())


def gradients(device: str, channels_last: bool) -> float:
    """The largest error of output and gradients in float32, over the largest value of each.

    norm-act-drop with tanh and the noise on, in training; sizes that fill no vector.
    """
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(6, 5, 9, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.rand(2, 5, generator=draw, dtype=torch.float64)
    noise = functional.noise(x.shape, 0.3, seed=SEED, dtype=torch.float64)
    form = torch.channels_last if channels_last else torch.contiguous_format

    def results(given: tuple[Tensor, Tensor, Tensor], double: bool) -> list[Tensor]:
        x, weight, bias = leaves = [tensor.detach().requires_grad_() for tensor in given]
        if double:
            y = reference.batch_norm_act_drop(x, None, None, weight, bias, True, act="tanh", noise=noise)
        else:
            y = functional.batch_norm_act_drop(x, None, None, weight, bias, True, act="tanh", p=0.3, seed=SEED)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y))]

    single = x.to(device, torch.float32, memory_format=form), weight.to(device).float(), bias.to(device).float()
    ours = results(single, False)
    exact = results((x, weight, bias), True)
    errors = [(a.cpu().double() - b).abs().max() / b.abs().max() for a, b in zip(ours, exact, strict=True)]
    return float(torch.stack(errors).max())  # Python's own max may lose a NaN
