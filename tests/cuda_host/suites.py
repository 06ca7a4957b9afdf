"""Which calls are made: every kernel, order, noise, grouping and width, at the sizes where kernels go wrong."""

import random
import re

import torch
from common import ACTIVATIONS, FLOATS
from cuda_host.cases import (
    GRANULARITIES,
    KINDS,
    STREAMING,
    DrawSeed,
    Layer,
    Machine,
    NoiseItself,
    Statistics,
)
from cuda_host.compiling import SOURCES, run

from fusednorm import reference

ONE_BLOCK = Machine(residency=2)
# So little shared memory that some hundred rows need a cluster.
PAIRS = Machine(residency=2, cluster=2, shared=9728)
FOURS = Machine(residency=2, cluster=4, shared=6144)
# A warp for each of the 8 channels that flat kernels take.
WIDE, WIDE_PAIRS, WIDE_FOURS = (
    Machine(residency=2, threads=256, **more)
    for more in ({}, {"cluster": 2, "shared": 9728}, {"cluster": 4, "shared": 40000})
)
CROWDED = Machine(residency=2, cluster=4, shared=6144, crowded=1)
MACHINES = (STREAMING, ONE_BLOCK, PAIRS, FOURS, Machine(mp=1), Machine(mp=7, threads=128), Machine(threads=32))

# The numbers of rows lie around those of a Philox call (8), a warp (32), a tile (256) and a chunk (512); S is one, odd,
# a multiple of every vector, longer than a tile, longer than a chunk.
SHAPES = (
    (2, 1, 1), (1, 3, 2), (1, 1, 7), (1, 8, 8), (9, 1, 1), (1, 3, 31), (2, 8, 16), (3, 33, 11), (5, 3, 49), (2, 64, 49),
    (4, 3, 64), (1, 33, 255), (2, 2, 128), (1, 1, 257), (20, 5, 13), (3, 8, 96), (2, 3, 300), (1, 8, 512),
    (2, 3, 520), (1, 1, 1300), (41, 1, 49), (3, 2, 700), (17, 2, 128), (1, 2, 2051), (2, 9, 64), (33, 3, 8),
    (64, 2, 16), (8, 1, 333),
)  # fmt: skip
# Channels-last has a loop of its own over columns; C is 1, odd, a multiple of every vector, more than a block takes.
COLUMNS = (
    (1, 3, 2), (2, 8, 1), (7, 1, 1), (9, 3, 1), (31, 8, 1), (5, 33, 7), (3, 64, 13), (2, 64, 49), (33, 8, 9),
    (1, 5, 300), (2, 128, 20), (3, 131, 8), (64, 16, 13), (2, 264, 9), (4, 2, 512),
)  # fmt: skip


CHANNEL = ("element", "channel")
ORDERS_OF_STAGES = [order for order in reference.ORDERS if order != "norm-act-drop"]


# Rows of a group that are and are not multiples of 8, or of a vector; groups of one sample, a last one that is short, a
# single channel.
GROUPED = (
    ((9, 3, 10), 3), ((9, 3, 12), 1), ((7, 2, 4), 3), ((5, 3, 49), 2), ((6, 2, 200), 2), ((20, 1, 1), 3),
    ((9, 8, 8), 2), ((30, 16, 13), 4), ((13, 6, 1), 5), ((40, 4, 1), 8), ((3, 2, 520), 1), ((100, 2, 3), 1),
)  # fmt: skip


def split_cases(draw):
    """The passes apart, as statistics of several processes have them: in one process, the same results."""
    cases = []
    for shape in ((4, 3, 24), (37, 2, 49), (2, 8, 600), (3, 1, 500), (30, 16, 1)):
        for last in (False, True) if shape[2] > 1 else (True,):
            for dtype in FLOATS:
                act, machine = draw.choice((None, "relu", "silu")), draw.choice(MACHINES if not last else MACHINES[4:])
                options = {"mask": draw.random() < 0.5, "dx": draw.random() < 0.9, "dw": draw.random() < 0.8}
                cases.append(Layer(shape, last, dtype, act, 0.3, machine=machine, split=True, **options))
    return cases + staged_cases(draw, split=True)


def counting_cases(draw):
    """Rows that do not count, and strengths that only the device knows, in every order and both layouts."""
    cases = []
    strengths = {"bernoulli": (0.3, 0.3, 0.0, 1.0), "uniform": (0.3, 0.0), "gaussian": (0.3, 0.0)}
    for order in [*ORDERS_OF_STAGES, "norm-act-drop", "norm-act-drop"]:
        for last in (False, True):
            shape, ghost = draw.choice(SHAPES + COLUMNS), 0
            if draw.random() < 0.3:
                shape, ghost = draw.choice(GROUPED)
            last = shape[1] > 1 if shape[2] == 1 else last
            kind, live = draw.choice(KINDS), draw.random() < 0.5
            p = draw.choice(strengths[kind]) if live else 0.3
            if p == 1 and order.find("drop") < order.find("norm"):
                p = 0.3  # statistics of zeros
            cases.append(
                Layer(
                    shape, last, draw.choice(FLOATS), draw.choice(("relu", "prelu", "gelu", None)), p,
                    draw.choice(GRANULARITIES), draw.random() < 0.9,
                    machine=draw.choice(MACHINES if not last else MACHINES[4:]), mask=draw.random() < 0.7,
                    shift=int(draw.random() < 0.25), dx=draw.random() < 0.9, dr=draw.random() < 0.8, order=order,
                    kind=kind, ghost=ghost, matched=draw.random() < 0.5, seed=draw.randrange(100),
                    split=not ghost and p not in (0, 1) and draw.random() < 0.2, live=live,
                    rows=draw.choice(("padding", "holes", "holes", None if live else "padding")),
                    sample=draw.choice((0, 3, 8, 10_003)),
                )
            )  # fmt: skip
    for shape, last in (((4, 3, 24), False), ((3, 8, 300), False), ((5, 8, 9), True)):
        for machine in (STREAMING, ONE_BLOCK, FOURS):
            cases.append(Layer(shape, last, torch.float32, "relu", 0.3, machine=machine, rows="none"))
    return cases


def staged_cases(draw, split=False):
    """Every order in both layouts, with everything else drawn."""
    cases = []
    acts = ("relu", "relu", "prelu", "prelu", "gelu", ("hardtanh", -0.5, 1.0), "elu")
    for order in ORDERS_OF_STAGES * (1 if split else 2):
        for last in (False, True):
            shape, ghost = draw.choice(SHAPES + COLUMNS), 0
            if not split and draw.random() < 0.4:
                shape, ghost = draw.choice(GROUPED)
            last = shape[1] > 1 if shape[2] == 1 else last
            kind = draw.choice(KINDS)
            p = draw.choice((0.3, 0.3, 0.3, 0.0, 1.0)) if kind == "bernoulli" else 0.3
            if p == 1 and order.find("drop") < order.find("norm"):
                p = 0.3  # statistics of zeros
            narrow = draw.choice((None, None, torch.bfloat16, torch.float64))
            cases.append(
                Layer(
                    shape, last, draw.choice(FLOATS), draw.choice(acts), p, draw.choice(GRANULARITIES),
                    split or draw.random() < 0.85, machine=draw.choice(MACHINES if not last else MACHINES[4:]),
                    mask=draw.random() < 0.7, shift=int(draw.random() < 0.25), param_dtype=narrow,
                    stat_dtype=narrow, weight=draw.random() < 0.8, bias=draw.random() < 0.8, dx=draw.random() < 0.9,
                    dw=draw.random() < 0.8, dr=draw.random() < 0.8, da=draw.random() < 0.8, order=order, kind=kind,
                    ghost=ghost, matched=draw.random() < 0.5, seed=draw.randrange(100), split=split,
                )
            )  # fmt: skip
    return cases


def all_cases():
    draw = random.Random(1)
    cases = []
    for shape in SHAPES + COLUMNS:
        # Where both layouts are the same memory, backends are given channels-last, but for a single channel.
        for last in (False, True) if shape[2] > 1 else (shape[1] > 1,):
            # Two of the types for the shapes of the other layout.
            for dtype in FLOATS if (shape in COLUMNS) == last else draw.sample(FLOATS, 2):
                p = draw.choice((0.0, 0.3, 0.3, 0.3, 1.0))
                narrow = draw.choice((None, None, torch.bfloat16, torch.float64, torch.float16))
                training = draw.random() < 0.75
                cases.append(
                    Layer(
                        shape, last, dtype, draw.choice((None, None, "relu", "gelu", "silu")), p,
                        draw.choice(("element",) * 3 + ("channel",)), training,
                        machine=draw.choice(MACHINES if not last else MACHINES[4:]),
                        mask=draw.random() < 0.5, shift=int(draw.random() < 0.25), param_dtype=narrow,
                        stat_dtype=narrow, weight=draw.random() < 0.8, bias=draw.random() < 0.8,
                        dx=draw.random() < 0.9, dw=draw.random() < 0.8,
                    )
                )  # fmt: skip
    for i, act in enumerate(ACTIVATIONS):
        for last in (False, True):
            for dtype in (torch.float32, torch.float64):
                cases.append(Layer((3, 4, 24), last, dtype, act, 0.3, training=i % 3 > 0, machine=MACHINES[i % 2]))
    # Resident, in clusters of every size up to 4, with a short last block; streaming, in several chunks.
    for dtype in FLOATS:
        for machine in (STREAMING, ONE_BLOCK, PAIRS, FOURS):
            for shape in ((1, 2, 900), (4, 3, 256), (37, 2, 49), (3, 1, 500)):
                for shift in (0, 1):
                    mask, granularity = shift == 0, "channel" if shape[0] == 37 else "element"
                    cases.append(
                        Layer(shape, False, dtype, "relu", 0.3, granularity, machine=machine, mask=mask, shift=shift)
                    )
    # Several visits of a warp to a channel of many samples: more channels than blocks in a few waves.
    for dtype in FLOATS:
        for shape in ((4, 16, 300), (9, 16, 128), (30, 16, 49)):
            cases.append(Layer(shape, False, dtype, "relu", 0.3, CHANNEL[shape[2] == 49], machine=Machine(mp=1)))
    # Channel noise where each sample is one value: that of the elements.
    for c in (1, 4):
        cases += [Layer((9, c, 1), c > 1, torch.float32, None, 0.3, "channel", machine=m) for m in MACHINES[:2]]
    # A mean far from zero.
    cases += [
        Layer((4, 3, 256), last, torch.float32, machine=m, offset=100.0) for last, m in ((0, PAIRS), (1, STREAMING))
    ]
    for i, dtype in enumerate(FLOATS):
        for shape in ((1, 1, 1), (3, 5, 7), (2, 3, 600), (300, 4, 1)):
            cases.append(NoiseItself(shape, dtype, (0.3, 0.0, 1.0, 0.9)[i]))
    cases += staged_cases(random.Random(2)) + split_cases(random.Random(3))
    for dtype in FLOATS:
        for kind in KINDS:
            for granularity in GRANULARITIES:
                for shape in ((9, 3, 12), (3, 8, 200), (20, 4, 1)):
                    last = shape[2] == 1 or draw.random() < 0.5
                    cases.append(
                        NoiseItself(
                            shape, dtype, 0.4, kind, granularity, last=last, times_x=draw.random() < 0.6,
                            shift=int(draw.random() < 0.3),
                        )
                    )  # fmt: skip
    for running in FLOATS:
        for momentum, batches in ((0.1, None), (0.3, 4), (None, 2), (1.0, 0)):
            cases.append(Statistics(70, running, torch.float32, 12, momentum, batches))
    cases += [Statistics(3, torch.float32, torch.float64, count, None, 0) for count in (0, 1, 2)]
    cases += [
        Statistics(70, torch.float32, torch.float32, 12, momentum, 3, groups=groups, last_count=last_count)
        for momentum, groups, last_count in ((0.1, 2, 5), (None, 9, 1), (0.3, 4, 12))
    ]
    cases += [
        Statistics(70, torch.float32, torch.float32, 0, momentum, 3, groups=len(counts), counts=counts)
        for momentum, counts in ((0.1, [7]), (0.2, [0]), (None, [4, 0, 1, 9, 2]), (0.3, [3, 3, 0, 0, 5]))
    ]
    cases += counting_cases(random.Random(2))
    return cases + widths(FLOATS) + flat(FLOATS) + [DrawSeed(7, 8), DrawSeed(-1, 2**40, 12)]


def widths(dtypes):
    """Lengths of samples and numbers of channels that 4 divides, or 2, but not 8."""
    cases = []
    for dtype in dtypes:
        for length, channels in ((260, 12), (130, 6)):
            shape = (4, 2, length)
            for machine in (STREAMING, FOURS):
                cases.append(Layer(shape, False, dtype, "relu", 0.3, machine=machine, mask=True))
                cases.append(Layer(shape, False, dtype, "prelu", 0.3, order="norm-add-drop-act", machine=machine))
            cases.append(Layer((5, channels, 13), True, dtype, "relu", 0.3, mask=True))
            cases.append(NoiseItself((2, 3, length), dtype, 0.3, times_x=True))
    return cases


def flat(dtypes):
    """Short samples of as many channels as vectors have values, or more: of one block and of clusters, the last one
    short; more than a tile; addresses that are and are not multiples of 16 bytes and of a sector; draws of samples."""
    cases = []
    for dtype in dtypes:
        for (n, s), machine in (
            ((30, 13), WIDE_PAIRS),
            ((20, 11), WIDE_PAIRS),
            ((9, 49), WIDE),
            ((2, 25), WIDE),
            ((40, 9), WIDE_FOURS),
        ):
            for c in (8, 24):
                cases.append(Layer((n, c, s), False, dtype, "relu", 0.3, machine=machine, mask=c == 8))
        cases.append(Layer((20, 16, 13), False, dtype, None, 0.3, machine=WIDE, shift=1))
        cases.append(Layer((20, 16, 13), False, dtype, "gelu", 0.3, "channel", machine=WIDE))
        cases.append(Layer((20, 16, 13), False, dtype, "silu", 0.0, machine=WIDE, dx=False))
        cases.append(Layer((20, 16, 13), False, dtype, None, 1.0, machine=WIDE))
    return cases


def few_staged(dtype, other):
    """Orders, noises and groups: a case or two for each place where they differ. other: a granularity."""

    def layer(shape, last, act, order, granularity="element", **options):
        return Layer(shape, last, dtype, act, 0.3, granularity, order=order, **options)

    return [
        layer((5, 3, 49), False, "prelu", "act-drop-norm-add", kind="gaussian", ghost=2, matched=True),
        layer((9, 3, 12), False, "prelu", "norm-drop-act", ghost=1),
        layer((2, 1, 300), False, "prelu", "norm-drop-act", ghost=1),
        layer((9, 3, 8), False, "relu", "norm-add-act-drop", mask=True),
        layer((3, 2, 200), False, "prelu", "norm-add-drop-act", kind="uniform", ghost=2, machine=ONE_BLOCK),
        layer((2, 2, 512), False, "gelu", "drop-norm-add-act", "sample", kind="gaussian", machine=FOURS),
        layer((2, 2, 512), False, "elu", "drop-act-norm", matched=True, mask=True, machine=FOURS),
        layer((20, 3, 49), False, None, "norm-drop-add", other, kind="gaussian"),
        layer((2, 2, 264), False, "relu", "norm-drop-add-act", mask=True),
        layer((30, 16, 13), True, "prelu", "drop-act-norm-add", kind="gaussian", ghost=4, matched=True),
        layer((9, 8, 24), True, "relu", "norm-add-act-drop", mask=True, machine=Machine(mp=1, threads=32)),
        layer((5, 3, 49), True, "prelu", "norm-drop-add-act", other, kind="uniform"),
        layer((2, 16, 64), True, ("hardtanh", -0.5, 1.0), "drop-norm-add-act", mask=True),
        layer((9, 3, 1), True, "elu", "drop-norm-act", "sample", training=False),
        *(layer((5, 8, 24), last, "prelu", "drop-act-norm-add", split=True, matched=True) for last in (False, True)),
        layer((9, 3, 12), False, "prelu", "norm-drop-add-act", rows="holes", ghost=2),
        layer((3, 2, 200), False, "gelu", "act-norm-drop", rows="padding", live=True, machine=ONE_BLOCK),
        layer((9, 8, 13), True, "relu", "norm-add-act-drop", rows="holes", mask=True),
        Layer((3, 2, 40), False, dtype, "gelu", 0.0, order="norm-drop-act", live=True),
        layer((5, 3, 49), True, "prelu", "drop-act-norm", kind="uniform", rows="holes", live=True, ghost=2, sample=3),
        layer((5, 3, 49), False, "relu", "norm-act-drop", mask=True, sample=3),
        layer((9, 3, 12), False, "relu", "norm-act-drop", sample=8),
        layer((9, 3, 12), False, None, "norm-act-drop", "channel", kind="gaussian", sample=5),
        layer((9, 3, 13), True, None, "norm-act-drop", other, kind="gaussian", sample=5),
        NoiseItself((2, 3, 300), dtype, 0.3, "gaussian", times_x=True),
        NoiseItself((9, 4, 13), dtype, 0.3, "uniform", "sample", last=True, times_x=True),
    ]


def few_cases(dtypes):
    """Every kernel once or twice, in few threads."""
    cases = []
    for i, dtype in enumerate(dtypes):
        for machine in (STREAMING, FOURS):
            cases.append(Layer((2, 2, 512), False, dtype, "relu", 0.3, machine=machine, mask=True))
            cases.append(Layer((5, 3, 49), False, dtype, "silu", 0.3, CHANNEL[i == 0], machine=machine))
        cases.append(Layer((1, 1, 700), False, dtype, "relu", 0.3, machine=FOURS, mask=True, shift=1))
        cases.append(Layer((1, 1, 1040), False, dtype, None, 0.3, machine=FOURS))
        cases.append(Layer((1, 2, 260), False, dtype, None, 0.3, machine=STREAMING))
        cases.append(Layer((4, 3, 256), False, dtype, None, 0.3, machine=ONE_BLOCK))
        cases.append(Layer((5, 8, 13), True, dtype, "relu", 0.3, mask=True))
        cases.append(Layer((3, 33, 30), True, dtype, None, 0.3, shift=1))
        cases.append(Layer((2, 16, 128), True, dtype, None, 0.3, CHANNEL[i == 0]))
        cases.append(Layer((5, 3, 49), False, dtype, "relu", 0.3, training=False, dx=bool(i)))
        cases.append(Layer((30, 8, 13), False, dtype, "relu", 0.3, machine=WIDE_PAIRS, mask=True))
        cases.append(Layer((9, 3, 1), True, dtype, "relu", 0.3, training=False, dw=False))
        cases += [Layer((5, 8, 13), last, dtype, "relu", 0.3, split=True, mask=True) for last in (False, True)]
        cases.append(NoiseItself((2, 3, 300), dtype, 0.3))
    for i, dtype in enumerate(dtypes):
        cases += few_staged(dtype, other=CHANNEL[i == 0])
    cases.append(Layer((2, 2, 512), False, dtypes[0], "relu", 0.3, machine=CROWDED))
    # Several visits of a warp, and a sample's end between them.
    cases.append(Layer((4, 16, 300), False, dtypes[0], "relu", 0.3, machine=Machine(mp=1), mask=True))
    cases += [Statistics(70, torch.float32, torch.float32, 12, 0.1, 3, groups=3, last_count=4), DrawSeed(7, 8)]
    cases.append(Statistics(70, torch.float32, torch.float32, 12, None, 3))
    return cases


class Suite:
    """A file of cases, and their check."""

    def __init__(self, cases, file):
        self.cases, self.file = cases, file
        with open(file, "wb") as f:
            for case in cases:
                case.write(f)

    def run(self, build, program, orders, check=True):
        """The kernels that ran. Raises where something is wrong, with the case in words."""
        results = program.parent / (program.name + ".results")
        code, out, text = run(build, program, self.file, results, *orders)
        assert code == 0, f"exit code {code}:\n{text[text.rfind('case ') :][:6000]}"
        with open(results, "rb") as f:
            for case in self.cases:
                got = case.read(f)
                try:
                    case.check(got)
                except AssertionError as error:
                    raise AssertionError(f"{case.operation} {case.words}: {error}") from None
        return out.decode().split()


def kernels():
    """The names of the kernels in the sources, as launches spell them."""
    text = "".join(path.read_text() for path in sorted((SOURCES / "cuda").glob("*.cu*")) if path.name != "device.cuh")
    names = re.findall(r"^FN_KERNEL\(.*\)\s*(\w+)\(", text, re.MULTILINE)
    return {name.removesuffix("_kernel") for name in names}


ORDERS = ("forward", "reverse", *(f"random:{seed}" for seed in range(1, 5)))
FEW_ORDERS = ("forward", "reverse", "random:1", "random:2", "random:3")
