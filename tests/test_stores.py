"""Results that are too large for the caches are stored past them, in whole lines: wherever rows begin and end."""

import math
from pathlib import Path

import pytest
import torch
from common import Problem, generator, lay_out

from fusednorm.functional import batch_norm_act_drop, dropout, noise

pytestmark = pytest.mark.cpu


def cache_bytes():
    """As csrc/cpu/dispatch.cpp reads it."""
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().rstrip("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


# Rows of whole lines, of halves of a line and of no multiple of anything; blocks of short rows that end with a line and
# that do not; few channels side by side.
ROWS = {
    "whole lines": (16, 32, 32),
    "half lines": (24, 28, 28),
    "odd": (8, 55, 55),
    "a line too few": (3, 511),
    "many tiles": (5, 5003),
    "short, whole lines": (48, 16, 16),
    "short, half lines": (40, 14, 14),
    "short": (130, 7, 7),
    "short, odd": (64, 15, 15),
    "short, prime": (37, 19),
    "few channels": (50,),
    "many channels": (771,),
}


def samples_of(rows, dtype, training):
    return math.ceil((cache_bytes() // (8 if training else 2) + 64) / math.prod(rows) / dtype.itemsize)


KINDS = {
    "float32": pytest.param(torch.float32, {}, marks=pytest.mark.kernel),
    "float32, dropout": (torch.float32, {"p": 0.1}),
    "float32, evaluation": (torch.float32, {"training": False}),
    "float32, addition": (torch.float32, {"order": "norm-add-act"}),
    "float32, addition, evaluation": (torch.float32, {"order": "norm-add-act", "training": False}),
    "float32, act first, dropout": (torch.float32, {"order": "act-norm-drop", "p": 0.1}),
    "float32, drop first, Gaussian": (torch.float32, {"order": "drop-norm-act", "p": 0.1, "kind": "gaussian"}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, dropout": (torch.bfloat16, {"p": 0.1}),
    "bfloat16, evaluation": (torch.bfloat16, {"training": False}),
    "bfloat16, addition": (torch.bfloat16, {"order": "norm-add-act"}),
    "float16": (torch.float16, {}),
}


@pytest.mark.parametrize(("dtype", "options"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_past_the_caches(rows, layout, dtype, options):
    if layout == "last" and len(rows) == 1:
        pytest.skip("the same as first")
    samples = samples_of(rows, dtype, options.get("training", True))
    Problem((samples, *rows), dtype=dtype, layout=layout, act="relu", **options).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_same_bits_either_way(rows, dtype):
    """Sample by sample the results are small."""
    draw = generator(3)
    x = torch.randn(samples_of(rows, dtype, training=False), *rows, generator=draw).to(dtype)
    mean, var = torch.randn(rows[0], generator=draw), torch.rand(rows[0], generator=draw) + 0.5
    whole = batch_norm_act_drop(x, mean, var, act="silu")
    step = max(1, len(x) // 100)
    parts = torch.cat([batch_norm_act_drop(part, mean, var, act="silu") for part in x.split(step)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_noise_alone(rows, layout):
    if layout == "last" and len(rows) == 1:
        pytest.skip("the same as first")
    shape = (samples_of(rows, torch.float32, training=True), *rows)
    x = lay_out(torch.randn(shape, generator=generator(5)), layout)
    assert torch.equal(dropout(x, 0.3, seed=11), x * noise(shape, 0.3, seed=11))
