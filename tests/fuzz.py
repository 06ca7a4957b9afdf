"""Random calls over all axes against the reference in float64: `make fuzz SECONDS=60 [SEED=] [SANITIZE=1]`.

A case is a number: everything in it is drawn from a generator seeded with that number, so the line that a failure
prints reproduces it. Sizes are small, because what breaks kernels is edges: tails of vectors, words and tiles, single
rows and channels, strides, groups that do not divide. One case in fifty is larger than a tile.

What is compared: the output, every gradient, the running statistics, and that no input was written. The noise of the
oracle is `fusednorm.noise`, which tests/test_noise.py holds to its definition.
"""

import argparse
import math
import random
import sys
import time

import torch

import fusednorm
from fusednorm import functional, reference

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Roundings of the result that a sum may be off by; what it may cancel from is in the scale of each comparison.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
ACTIVATIONS = tuple(functional.activations())


class Case:
    """The arguments of one call."""

    def __init__(self, number):
        self.number, self.random = number, random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        pick, chance = self.random.choice, lambda p: self.random.random() < p
        self.dtype = pick(DTYPES)
        self.param_dtype = pick((None, None, torch.float32, torch.bfloat16, torch.float64))
        self.shape = self._shape()
        self.order = pick(tuple(reference.ORDERS))
        self.act = self._act() if "act" in self.order else None
        self.noise = pick(("bernoulli", "bernoulli", "uniform", "gaussian"))
        self.granularity = pick(("element", "element", "channel", "sample"))
        strength = pick((0.0, 0.1, 0.5, 0.9, 1.0, self.random.random()))
        self.p = strength if "drop" in self.order else 0.0
        self.training, self.drop_training = chance(0.7), pick((None, True))
        self.ghost = pick((None, None, None, self.random.randint(1, 9)))
        self.even, self.matched = chance(0.3), chance(0.3)
        self.threads = self.random.randint(1, 3)
        self.layouts = [pick(("first", "last", "transposed", "sliced", "expanded")) for _ in range(3)]
        self.weight, self.bias, self.running = chance(0.8), chance(0.8), chance(0.8) or not self.training
        self.seed = self.random.getrandbits(64)
        self.needs = [chance(0.85) for _ in range(5)]
        self.offset = pick((0.0, 0.0, 3.0, -50.0))
        self.rows, self.tensor_p = pick((None, None, None, "holes", "padding")), chance(0.2)

    def _shape(self):
        rank, large = self.random.choice((2, 3, 4, 4, 5)), self.random.random() < 0.02
        sizes = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129)
        while True:
            shape = [self.random.choice(sizes) for _ in range(rank)]
            count = math.prod(shape)
            if count <= (60_000 if large else 2_500):
                return tuple(shape)

    def _act(self):
        act = self.random.choice((*ACTIVATIONS, "prelu", "leaky_relu", "elu"))
        if act in ("leaky_relu", "elu"):
            return act, self.random.choice((0.2, 1.0, 0.01, 0.7))
        return act

    def __str__(self):
        hidden = ("random", "generator", "number")
        return ", ".join(f"{name}={value}" for name, value in vars(self).items() if name not in hidden)

    def tensor(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def mask(self):
        """(N, 1, ...) of the rows that count; None: all."""
        if self.rows is None:
            return None
        mask = torch.rand(self.shape[0], *self.shape[2:], generator=self.generator) < 0.7
        if self.rows == "padding":
            mask = mask.cumprod(-1).bool() if mask.dim() > 1 else mask
        return mask.unsqueeze(1)

    def lay_out(self, x, layout):
        if layout == "last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        if layout == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "sliced":
            room = torch.full([size + 2 for size in x.shape], math.nan, dtype=x.dtype)
            return room[tuple(slice(1, size + 1) for size in x.shape)].copy_(x)
        if layout == "expanded":
            return x.narrow(0, 0, 1).contiguous().expand(x.shape)
        return x.contiguous()

    def leaf(self, x, need):
        return None if x is None else x.detach().requires_grad_(need)


def groups_of(values, mask, size):
    """(values, mask) of each group of the batch."""
    groups = reference.ghosts(values, size)
    return list(zip(groups, [None] * len(groups) if mask is None else reference.ghosts(mask, size), strict=True))


def values_of_a_group(case, x, mask):
    """Fewest values that a channel's statistics are taken over."""
    size = functional.ghost_batches(case.shape[0], case.ghost, case.even, math.prod(case.shape[2:]))
    groups = groups_of(x, mask, size if case.training else 0)
    return min(g.numel() // g.size(1) if rows is None else int(rows.sum()) for g, rows in groups)


def check(case):
    """Raises AssertionError where the call is not what the reference says; returns whether it was a call at all."""
    channels = case.shape[1]
    torch.set_num_threads(case.threads)
    x = case.lay_out((case.tensor(*case.shape) * 1.5 + case.offset).to(case.dtype), case.layouts[0])
    opmath = torch.float64 if case.dtype == torch.float64 else torch.float32
    vector = lambda low, high: (  # noqa: E731
        low + (high - low) * torch.rand(channels, generator=case.generator, dtype=torch.float64)
    ).to(case.param_dtype or opmath)
    weight, bias = (vector(0.5, 1.5) if case.weight else None), (vector(-0.5, 0.5) if case.bias else None)
    statistics = (vector(-0.5, 0.5) + case.offset, vector(0.5, 2.0)) if case.running else (None, None)
    residual = case.lay_out(case.tensor(*case.shape).to(case.dtype), case.layouts[1]) if "add" in case.order else None
    act_weight = vector(-0.3, 0.6)[: case.random.choice((1, channels))] if case.act == "prelu" else None
    tensors = [x, weight, bias, residual, act_weight]
    leaves = [case.leaf(t, n) for t, n in zip(tensors, case.needs, strict=True)]
    grad = case.lay_out(case.tensor(*case.shape).to(case.dtype), case.layouts[2])
    before = [None if t is None else t.clone() for t in tensors]
    running = [None if s is None else s.clone() for s in statistics]
    live = case.training if case.drop_training is None else case.drop_training
    mask = case.mask()
    if case.training and values_of_a_group(case, x, mask) < 2:
        return False

    def call():
        act = case.act if leaves[4] is None else ("prelu", leaves[4])
        return functional.batch_norm_act_drop(
            *(leaves[0], *running, leaves[1], leaves[2], case.training, 0.3, 1e-3),
            **{"act": act, "noise": case.noise, "granularity": case.granularity, "mask": mask},
            p=torch.tensor(case.p, dtype=torch.float64) if case.tensor_p and "drop" in case.order else case.p,
            **{"drop_training": case.drop_training, "order": case.order, "residual": leaves[3]},
            **{"ghost_batch_size": case.ghost, "even_ghost_batches": case.even},
            **{"eval_matched_stats": case.matched, "seed": case.seed},
        )

    y = call()
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad(y, wanted, grad) if wanted else ()

    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    p = case.p if live else 0.0
    kind = {"kind": case.noise, "granularity": case.granularity}
    m = fusednorm.noise(case.shape, p, seed=case.seed, dtype=opmath, **kind).double() if p else None
    act = case.act if exact[4] is None else ("prelu", exact[4])
    groups = functional.ghost_batches(case.shape[0], case.ghost, case.even, math.prod(case.shape[2:]))
    options = {"eps": 1e-3, "ghost_batch_size": groups if case.training else None, "mask": mask}
    own = [None if s is None else s.double() for s in statistics]
    stages, after = reference.parse_order(case.order)

    u = reference.run_stages(stages, exact[0], act, m)
    z = reference.batch_norm_act_drop(u, *own, exact[1], exact[2], case.training, order="norm", **options)
    expected = reference.run_stages(after, z, act, m, exact[3])
    expected = expected if mask is None else torch.where(mask, expected, 0)
    found = [t for t in exact if t is not None and t.requires_grad]
    # Through z, so that what a gradient is summed from is known: it may cancel to nothing.
    answers = torch.autograd.grad(expected, found, grad.double(), allow_unused=True) if found else ()

    tolerance = max(TOLERANCE[case.dtype], TOLERANCE[opmath])
    with torch.no_grad():
        noisy = 1.0 if m is None else float(m.abs().max().clamp_min(1))
        spread = float(u.abs().max() + 1) * noisy
        gain = _gain(case, u, own, groups, mask) * (1 if weight is None else float(weight.abs().max().double()))
        # What rounding the input of a steep norm does to its output; and an element near a kink of the activation.
        rounding = 2.0**-52 if case.dtype == torch.float64 else 2.0**-23
        slack = spread * gain * rounding * 64 + noisy * tolerance * float(z.abs().max() + 1)
        xhat = reference.batch_norm_act_drop(u, *own, None, None, case.training, order="norm", **options)
        steepest = float(xhat.abs().max()) + 1 + spread * gain * rounding / tolerance * 8
    compare("output", y, expected, slack + noisy * tolerance * float(expected.detach().abs().max() + 1))
    rows = math.prod(case.shape) / channels
    cotangent = float(grad.double().abs().max() + 1) * noisy * noisy
    kinks = near_kinks(case, act, z, u, m, exact[3], slack)
    for name, got, answer in zip(names(leaves), grads, answers, strict=True):
        answer = torch.zeros_like(got, dtype=torch.float64) if answer is None else answer
        summed = name in ("weight", "bias", "act_weight")
        factor = {"weight": steepest, "act_weight": spread * (gain + 1)}.get(name, 1 if name == "bias" else gain + 1)
        scale = cotangent * factor * (rows**0.5 if summed else 1) * (channels**0.5 if name == "act_weight" else 1)
        allowed = tolerance * scale * 4 + float(answer.abs().max()) * TOLERANCE[got.dtype]
        allowed += kinks * cotangent * (gain + 1) * 4 * (spread if summed else 1)
        compare(f"gradient of {name}", got, answer, allowed)
    if case.training and case.running:
        check_statistics(case, running, statistics, exact[0].detach(), act, m, stages, groups, mask)
    elif case.running:
        assert all(torch.equal(a, b) for a, b in zip(running, statistics, strict=True)), "statistics moved"
    for name, old, new in zip(("x", "weight", "bias", "residual", "act_weight"), before, leaves, strict=True):
        assert old is None or torch.equal(old, new.detach()), f"{name} was written"
    return True


def _gain(case, u, own, groups, mask):
    """The largest factor from a value to what it is normalised to."""
    if not case.training:
        return float((own[1] + 1e-3).rsqrt().max())
    moments = [reference.moments(*group) for group in groups_of(u, mask, groups)]
    return max(float((var + 1e-3).rsqrt().max()) for _, var in moments)


def near_kinks(case, act, z, u, m, residual, slack):
    """How many elements lie so near a kink of the activation that rounding decides on which side."""
    kinks = {"relu": (0,), "leaky_relu": (0,), "prelu": (0,), "elu": (0,), "relu6": (0, 6), "hardtanh": (-1, 1)}
    kinks |= {"hardswish": (-3, 3)}
    name = act if isinstance(act, str) or act is None else act[0]
    if name not in kinks:
        return 0
    before, after = reference.parse_order(case.order)
    with torch.no_grad():
        if "act" in before:  # noise ahead of it is multiplied by m: exact zeros are on the same side for both
            v = reference.run_stages(before[: before.index("act")], case_input(u, case), act, m)
        else:
            v = reference.run_stages(after[: after.index("act")], z, act, m, residual)
        return sum(int(((v - k).abs() < slack).sum()) for k in kinks[name]) if v is not None else 0


def case_input(u, case):
    # An activation ahead of the norm acts on x itself, up to noise: rounding moves nothing across a kink.
    return torch.full((1, 1), math.inf, dtype=u.dtype)


def check_statistics(case, running, statistics, x, act, m, stages, groups, mask):
    mean, var = (s.double() for s in statistics)
    values = reference.run_stages(stages, x, act, None if case.matched else m).detach()
    for group, rows in groups_of(values, mask, groups):
        batch_mean, batch_var = reference.moments(group, rows)
        count = group.numel() / group.size(1) if rows is None else int(rows.sum())
        mean, var = mean + 0.3 * (batch_mean - mean), var + 0.3 * (batch_var * count / (count - 1) - var)
    loose = max(TOLERANCE[running[0].dtype], TOLERANCE[torch.float64 if x.dtype == torch.float64 else torch.float32])
    rounds = 1 if not groups else -(-case.shape[0] // groups)
    largest = float(values.abs().max() + statistics[0].double().abs().max() + 1)
    rounding = 1e-12 if case.dtype == torch.float64 else 2e-5
    compare("running_mean", running[0], mean, (loose * rounds + rounding) * largest)
    compare("running_var", running[1], var, loose * rounds * float(var.abs().max() + 1) + rounding * largest**2)


def names(leaves):
    all_names = ("x", "weight", "bias", "residual", "act_weight")
    return [name for name, t in zip(all_names, leaves, strict=True) if t is not None and t.requires_grad]


def compare(name, got, expected, allowed):
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = (got.detach().double() - expected.detach()).abs()
    if error.numel() and not float(error.max()) <= allowed:
        at = tuple((error.nan_to_num(math.inf) == error.nan_to_num(math.inf).max()).nonzero()[0].tolist())
        raise AssertionError(
            f"{name} at {at}: got {got[at].item()!r}, expected {expected[at].item()!r}, allowed {allowed:.3g}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="number of the first case; default: from the clock")
    parser.add_argument("--cases", type=int, default=None, help="stop after so many")
    arguments = parser.parse_args()
    first = time.time_ns() % 10**12 if arguments.seed is None else arguments.seed
    end, done, calls, failures = time.monotonic() + arguments.seconds, 0, 0, 0
    while time.monotonic() < end and done != arguments.cases and failures < 10:
        case = Case(first + done)
        try:
            calls += check(case)
        except Exception as error:
            failures += 1
            print(f"make fuzz SEED={case.number} CASES=1   # {type(error).__name__}: {error}\n    {case}", flush=True)
        done += 1
    print(f"fuzz: {done} cases from {first}, {calls} of them calls that run, {failures} failed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
