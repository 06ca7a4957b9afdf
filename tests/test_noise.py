"""The noise is the function that the design defines, bit for bit, and its bits are as good as we rely on."""

import ctypes
import functools
import itertools
import math

import definition
import numpy as np
import pytest
import torch
from common import (
    DEVICE,
    FLOATS,
    LAYOUTS,
    dtype_id,
    lay_out,
    raw_backward,
    raw_forward,
    rng_state,
    same_bits,
    set_rng_state,
)
from torch import nn

import fusednorm
from fusednorm import _hooks, functional

# Here the noise of the device under test is in question; the other files' `common.noise` is the CPU's.
noise = functools.partial(fusednorm.noise, device=DEVICE)

SEEDS = (0, 1, 7, -1, 2**32 + 5, 2**40 + 3, -(2**40) - 9, 2**63 - 1, -(2**63))

# Philox4x32-10 in the known-answer file of Random123: counter, key, output.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

# Beyond this many standard errors a statistic counts as wrong; seeds are fixed, so a pass stays a pass.
SIGMAS = 4.5


def as_ints(words):
    return tuple(int(word) & 0xFFFFFFFF for word in words)


def philox4x32(rounds, counter, key):
    """One draw of the scalar template."""
    out = (ctypes.c_uint32 * 4)()
    _hooks.library().fusednorm_philox4x32(rounds, (ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
    return tuple(out)


def philox4x32_lanes(rounds, counter, key):
    """The draws of the vector template at the level in use, a lane each; lane i has counter word 0 + i."""
    out = (ctypes.c_uint32 * (64 * 4))()
    words = (ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key)
    lanes = _hooks.library().fusednorm_philox4x32_lanes(rounds, *words, out)
    return [tuple(out[4 * i : 4 * i + 4]) for i in range(lanes)]


@pytest.mark.cpu
@pytest.mark.kernel
class TestPhilox:
    @pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
    def test_known_answers_of_the_definition(self, counter, key, output):
        assert as_ints(definition.philox4x32(10, counter, key)) == output

    @pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
    def test_known_answers_of_the_scalar_template(self, counter, key, output):
        assert philox4x32(10, counter, key) == output

    @pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
    def test_known_answers_of_the_vector_template(self, counter, key, output):
        first, *others = philox4x32_lanes(10, counter, key)
        assert first == output
        for i, lane in enumerate(others, 1):
            moved = ((counter[0] + i) & 0xFFFFFFFF, *counter[1:])
            assert lane == as_ints(definition.philox4x32(10, moved, key)), f"lane {i}"

    @pytest.mark.parametrize("word", range(4))
    def test_seven_rounds_everywhere_alike(self, word):
        for step in range(64):
            counter = [(0x9E3779B9 * (step + 1) * (i + 1)) & 0xFFFFFFFF for i in range(4)]
            counter[word] = 0xFFFFFFFF - step
            key = [0xA4093822 ^ step, 0x299F31D0 * (step + 1) & 0xFFFFFFFF]
            expected = as_ints(definition.philox4x32(7, counter, key))
            assert philox4x32(7, counter, key) == expected
            assert philox4x32_lanes(7, counter, key)[0] == expected


@pytest.mark.kernel
class TestDefinition:
    @pytest.mark.parametrize("granularity", ["element", "channel"])
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize(
        "shape",
        [(1, 1), (5, 3), (8, 2, 1), (3, 5, 49), (2, 33, 4), (7, 2, 3, 5), (2, 3, 2, 3, 5), (513, 2), (1, 2, 1025)],
        ids=str,
    )
    def test_small(self, shape, seed, granularity):
        expected = definition.bernoulli(shape, 0.3, seed, granularity)
        got = noise(shape, 0.3, seed=seed, granularity=granularity, dtype=torch.float64)
        assert np.array_equal(got.cpu().numpy(), expected)

    @pytest.mark.parametrize(
        ("shape", "granularity"),
        [
            ((2, 3, 40_000), "element"),
            ((70_001, 2), "element"),
            ((66_000, 2, 1), "channel"),
            ((2, 100_000), "element"),
            ((3, 70_001, 2), "channel"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("seed", [3, -(2**35) - 1])
    def test_large(self, shape, granularity, seed):
        expected = definition.bernoulli(shape, 0.5, seed, granularity)
        got = noise(shape, 0.5, seed=seed, granularity=granularity, dtype=torch.float64)
        assert np.array_equal(got.cpu().numpy(), expected)

    @pytest.mark.parametrize("p", [1e-9, 1e-6, 1 / 65536, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1 - 1e-6, 1 - 1e-12])
    def test_every_strength(self, p):
        got = noise((300, 300), p, seed=11, dtype=torch.float64)
        assert np.array_equal(got.cpu().numpy(), definition.bernoulli((300, 300), p, 11, "element"))

    @pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
    def test_dtypes_hold_the_same_mask(self, dtype):
        m = noise((40, 7, 3), 0.3, seed=5, dtype=dtype)
        expected = torch.from_numpy(definition.bernoulli((40, 7, 3), 0.3, 5, "element").copy()).to(DEVICE)
        assert m.dtype == dtype
        assert same_bits(m, expected.to(torch.float32).to(dtype) if dtype != torch.float64 else expected)

    @pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
    @pytest.mark.parametrize("granularity", ["element", "channel"])
    def test_ends(self, dtype, granularity):
        shape = (9, 5, 7)
        assert torch.equal(
            noise(shape, 0.0, seed=1, granularity=granularity, dtype=dtype), torch.ones(shape, dtype=dtype)
        )
        assert torch.equal(
            noise(shape, 1.0, seed=1, granularity=granularity, dtype=dtype), torch.zeros(shape, dtype=dtype)
        )

    @pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (0, 2, 5, 5)], ids=str)
    def test_empty(self, shape):
        assert noise(shape, 0.5, seed=1).shape == shape

    def test_smallest_live_strength_still_drops(self):
        """T is clamped to 65535: a p below half a step is not silently the identity, and m keeps the mean at 1."""
        m = noise((2**20, 2), 1e-9, seed=2)
        assert 0 < int((m == 0).sum()) < 100
        assert m.max() == torch.tensor(65536 / 65535)

    def test_largest_live_strength_still_keeps(self):
        m = noise((2**20, 2), 1 - 1e-12, seed=2)
        assert 0 < int((m != 0).sum()) < 100
        assert m.max() == 65536

    def test_expectation_uses_the_realised_threshold(self):
        kept = noise((64, 64), 0.1, seed=4, dtype=torch.float64).max().item()
        assert kept == 65536 / math.floor(0.9 * 65536 + 0.5)


def mask_of(shape, layout, p, seed, granularity, dtype=torch.float32):
    """The multipliers that the layer itself applied: weight 0 and bias 1 leave nothing else in its output."""
    c = shape[1]
    x = lay_out(torch.randn(shape).to(dtype), layout)
    return functional.batch_norm_act_drop(
        x,
        torch.zeros(c),
        torch.ones(c),
        torch.zeros(c),
        torch.ones(c),
        False,
        p=p,
        granularity=granularity,
        drop_training=True,
        seed=seed,
    )


@pytest.mark.kernel
class TestLayer:
    """What the layer applies, forward and backward, is what `fusednorm.noise` says."""

    SHAPES = ((64, 5), (7, 33, 9), (4, 3, 7, 7), (2, 65, 2, 2), (2, 3, 3, 2, 5), (3, 2, 1025))

    @pytest.mark.parametrize("granularity", ["element", "channel"])
    @pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_forward(self, shape, layout, dtype, granularity):
        if layout == "expanded":
            pytest.skip("has the values of one sample")
        m = noise(shape, 0.4, seed=-3, granularity=granularity, dtype=dtype)
        assert torch.equal(mask_of(shape, layout, 0.4, -3, granularity, dtype), m)

    @pytest.mark.parametrize("granularity", ["element", "channel"])
    @pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
    @pytest.mark.parametrize(
        ("layout", "grad_layout"), [("first", "first"), ("last", "last"), ("first", "last"), ("last", "sliced")]
    )
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_backward(self, shape, layout, grad_layout, dtype, granularity):
        c = shape[1]
        x = lay_out(torch.randn(shape).to(dtype), layout).requires_grad_()
        y = functional.batch_norm_act_drop(
            x, torch.zeros(c), torch.ones(c), p=0.4, granularity=granularity, drop_training=True, seed=9
        )
        y.backward(lay_out(torch.ones(shape, dtype=dtype), grad_layout))
        m = noise(shape, 0.4, seed=9, granularity=granularity)
        assert torch.equal(x.grad != 0, m != 0)

    @pytest.mark.parametrize("act", ["relu", "tanh"])
    @pytest.mark.parametrize("layout", ["first", "last"])
    def test_saved_mask_or_redrawn(self, layout, act):
        """The operator's backward agrees with its forward whether or not forward saved bits."""
        shape, options, seed = (6, 5, 11), {"p": 0.5, "act": act}, torch.tensor(8)
        x, g = lay_out(torch.randn(shape), layout), torch.randn(shape)
        results = []
        for save in (True, False):
            _, mean, invstd, *_, mask = raw_forward(x, seed=seed, save_mask=save, **options)
            results.append(raw_backward(g, x, None, None, mean, invstd, mask, seed, **options)[0])
            assert save or not mask.numel()
            if DEVICE.type == "cpu":
                assert mask.dtype == torch.int32
                packed = (5, 3) if layout == "first" else (6, 11, 1)
                assert mask.shape in (((0,), packed) if save else ((0,),))
        torch.testing.assert_close(*results)

    @pytest.mark.cpu
    @pytest.mark.parametrize("granularity", ["element", "channel"])
    @pytest.mark.parametrize("shape", [(16, 1, 5000), (3, 7, 41, 43), (5001, 33), (20_000, 1)], ids=str)
    def test_thread_counts(self, shape, granularity, threads):
        masks = []
        for count in (1, 2):
            threads(count)
            masks.append(noise(shape, 0.5, seed=6, granularity=granularity))
            masks += [mask_of(shape, layout, 0.5, 6, granularity) for layout in ("first", "last")]
        assert all(torch.equal(masks[0], mask) for mask in masks[1:])


def bits(n, c, seed, p=0.5):
    """Standardised keep bits of (n, c) elements: mean 0 and variance 1 when the draws are what they claim."""
    q = definition.threshold(p) / 65536
    kept = (noise((n, c), p, seed=seed) != 0).to(torch.float64)
    return (kept - q) / math.sqrt(q * (1 - q))


def correlation(a, b):
    """In standard errors of the mean of products of independent standardised bits."""
    return float((a * b).mean()) * math.sqrt(a.numel())


@pytest.mark.kernel
class TestQuality:
    @pytest.mark.parametrize("seed", [0, 12345, -7])
    @pytest.mark.parametrize("p", [0.001, 0.03, 0.1, 0.25, 0.5, 0.9, 0.99])
    def test_drop_rate(self, p, seed):
        rate = bits(2**16, 16, seed, p)
        assert abs(float(rate.mean()) * math.sqrt(rate.numel())) < SIGMAS

    def test_drop_rate_of_each_channel_and_row(self):
        u = bits(4096, 512, 77)
        for along in (0, 1):
            z = u.sum(along) / math.sqrt(u.shape[along])
            assert z.abs().max() < SIGMAS + 0.7
            # The sums themselves must scatter like independent ones: variance 1, with error sqrt(2 / count).
            assert abs(float(z.square().mean()) - 1) < SIGMAS * math.sqrt(2 / z.numel())

    @pytest.mark.parametrize("p", [0.1, 0.5])
    @pytest.mark.parametrize("lag", [1, 2, 7, 8, 9, 16, 33, 64, 4096])
    def test_serial_correlation_along_rows(self, lag, p):
        u = bits(2**15, 33, 21, p)
        assert abs(correlation(u[lag:], u[:-lag])) < SIGMAS

    @pytest.mark.parametrize("lag", [1, 2, 4, 7, 8, 16, 31])
    def test_serial_correlation_along_channels(self, lag):
        u = bits(2**14, 64, 22)
        assert abs(correlation(u[:, lag:], u[:, :-lag])) < SIGMAS

    @pytest.mark.parametrize("lag", [1, 2, 7, 8, 9, 33])
    def test_serial_correlation_in_memory_order(self, lag):
        """In a channels-last walk: lag 33 is the next row of the same channel, lag 1 crosses channels."""
        u = bits(2**15, 33, 23).flatten()
        assert abs(correlation(u[lag:], u[:-lag])) < SIGMAS

    @pytest.mark.parametrize(
        "pair",
        [(0, 1), (1, 2), (5, -5), (3, 3 + 2**32), (3, 3 ^ 2**31), (-1, 0), (2**62, 2**62 + 1), (8, 16)],
        ids=str,
    )
    def test_seeds_are_independent(self, pair):
        a, b = (bits(2**15, 32, seed) for seed in pair)
        for shift in (0, 1, 8):
            assert abs(correlation(a[shift:], b[: len(b) - shift])) < SIGMAS
            assert abs(correlation(a[:, shift:], b[:, : 32 - shift])) < SIGMAS

    def test_consecutive_calls_are_independent(self):
        like = torch.empty(())
        seeds = [int(torch.ops.fusednorm.draw_seed(like)) for _ in range(6)]
        masks = [bits(2**14, 32, seed) for seed in seeds]
        for a, b in itertools.combinations(masks, 2):
            assert abs(correlation(a, b)) < SIGMAS

    @pytest.mark.parametrize("along", ["rows", "channels", "seeds"])
    def test_patterns_of_eight_bits(self, along):
        """Chi-square over the 256 patterns of eight neighbours, 255 degrees of freedom."""
        if along == "rows":
            kept = (bits(2**16, 16, 31) > 0).reshape(-1, 8, 16).movedim(1, -1)
        elif along == "channels":
            kept = (bits(2**16, 16, 32) > 0).reshape(2**16, 2, 8)
        else:
            kept = torch.stack([bits(2**12, 32, seed) > 0 for seed in range(8)], -1)
        pattern = (kept.reshape(-1, 8).long() << torch.arange(8)).sum(1)
        count = torch.bincount(pattern, minlength=256).double()
        mean = count.sum() / 256
        chi2 = float(((count - mean) ** 2 / mean).sum())
        assert abs(chi2 - 255) < SIGMAS * math.sqrt(2 * 255)

    @pytest.mark.cpu
    def test_stages_are_independent(self):
        """The last counter word tells the noises of one layer apart: no bit of stage 0 predicts one of stage 1."""
        key = [0x12345678, 0x9ABCDEF0]
        words = torch.tensor([[philox4x32(7, [i, 3, 0, s], key) for i in range(4096)] for s in (0, 1)])
        ones = ((words.unsqueeze(-1) >> torch.arange(32)) & 1).double() * 2 - 1
        for shift in (0, 1):
            assert abs(correlation(ones[0, shift:], ones[1, : 4096 - shift])) < SIGMAS

    def test_draws_are_uniform(self):
        """Not only one threshold of them: the drop sets at rising p are nested and every step of p takes its share."""
        steps = [i / 16 for i in range(1, 16)]
        n = 2**20
        dropped = torch.stack([(noise((n, 1), p, seed=13) == 0).flatten() for p in steps])
        assert bool((dropped[1:] >= dropped[:-1]).all())
        share = torch.diff(dropped.double().sum(1))
        assert (share - n / 16).abs().max() < SIGMAS * math.sqrt(n / 16)


class TestSeeds:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_int_and_tensor_are_the_same_seed(self, seed):
        tensor = torch.tensor(seed, dtype=torch.int64)
        assert torch.equal(noise((50, 3), 0.5, seed=seed), noise((50, 3), 0.5, seed=tensor))
        x, mean, var = torch.randn(50, 3), torch.zeros(3), torch.ones(3)
        a, b = (functional.batch_norm_act_drop(x, mean, var, p=0.5, drop_training=True, seed=s) for s in (seed, tensor))
        assert torch.equal(a, b)

    def test_value_not_address(self):
        """The mask hangs on the value of the seed, wherever its tensor lives."""
        many = torch.full((5,), 42)
        masks = [noise((50, 3), 0.5, seed=many[i]) for i in range(5)]
        assert all(torch.equal(masks[0], mask) for mask in masks[1:])

    def test_given_seed_leaves_the_generator_alone(self):
        layer = fusednorm.FusedBatchNorm1d(4, act="relu", drop=0.5)
        before = rng_state()
        layer(torch.ones(8, 4).cumsum(0), seed=3)
        noise((8, 4), 0.5, seed=3)
        assert torch.equal(rng_state(), before)

    def test_draw_seed(self):
        like = torch.empty(3)
        torch.manual_seed(5)
        first = [torch.ops.fusednorm.draw_seed(like) for _ in range(3)]
        torch.manual_seed(5)
        again = [torch.ops.fusednorm.draw_seed(like) for _ in range(3)]
        assert all(s.dtype == torch.int64 and s.shape == () and s.device == like.device for s in first)
        assert [int(s) for s in first] == [int(s) for s in again]
        assert len({int(s) for s in first}) == 3

    def test_draw_seed_fills_its_bits(self):
        seeds = torch.stack([torch.ops.fusednorm.draw_seed(torch.empty(())) for _ in range(4096)])
        share = torch.stack([((seeds >> bit) & 1).double().mean() for bit in range(62)])
        assert (share - 0.5).abs().max() * 2 * math.sqrt(4096) < SIGMAS

    def test_draw_seed_is_tagged(self):
        assert torch.Tag.nondeterministic_seeded in torch.ops.fusednorm.draw_seed.default.tags
        for name in ("forward", "backward", "noise"):
            tags = getattr(torch.ops.fusednorm, name).default.tags
            assert torch.Tag.nondeterministic_seeded not in tags, name


class TestGenerator:
    """The default generator is touched when a live noise needs a seed, and at no other time."""

    @pytest.mark.parametrize(
        ("drop", "mode"),
        [(None, "train"), (0.0, "train"), (1.0, "train"), (0.5, "eval"), (nn.Dropout1d(0.0), "train")],
        ids=str,
    )
    def test_dead_noise_draws_nothing(self, drop, mode):
        layer = getattr(fusednorm.FusedBatchNorm1d(4, act="relu", drop=drop), mode)()
        x = torch.randn(8, 4, 3)
        before = rng_state()
        layer(x).sum().backward()
        assert torch.equal(rng_state(), before)

    @pytest.mark.parametrize(("p", "training"), [(0.0, True), (1.0, True), (0.5, False)])
    def test_functional_alike(self, p, training):
        before = rng_state()
        functional.batch_norm_act_drop(torch.randn(8, 4), torch.zeros(4), torch.ones(4), training=training, p=p)
        state = rng_state()
        set_rng_state(before)
        torch.randn(8, 4)
        assert torch.equal(rng_state(), state)

    def test_manual_seed_rules_the_masks(self):
        layer, x = fusednorm.FusedBatchNorm1d(4, drop=0.5), torch.randn(64, 4)
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append([layer(x) for _ in range(3)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_consecutive_calls_differ(self):
        layer, x = fusednorm.FusedBatchNorm1d(4, drop=0.5), torch.randn(64, 4)
        masks = [layer(x) == 0 for _ in range(4)]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))

    def test_two_layers_differ(self):
        a, b = (fusednorm.FusedBatchNorm1d(4, drop=0.5) for _ in range(2))
        x = torch.randn(64, 4)
        assert not torch.equal(a(x) == 0, b(x) == 0)
