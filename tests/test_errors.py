"""Hostile arguments, at the operators themselves: a sentence that names the argument, never a crash or a wrong read."""

import math

import pytest
import torch
from common import raw_backward, raw_forward

import fusednorm
from fusednorm import functional

N, C = 6, 5
REFUSED = (RuntimeError, ValueError, TypeError, IndexError)  # of the first is what torch says of a missing kernel


def forward_arguments():
    return {
        "x": torch.randn(N, C, 3),
        "weight": torch.ones(C),
        "bias": torch.zeros(C),
        "running_mean": torch.zeros(C),
        "running_var": torch.ones(C),
        "seed": torch.tensor(1),
        "p": 0.5,
        "act": "relu",
    }


VECTORS = ("weight", "bias", "running_mean", "running_var")
BAD_VECTORS = {
    "short": lambda: torch.ones(C - 1),
    "long": lambda: torch.ones(C + 1),
    "empty": lambda: torch.ones(0),
    "scalar": lambda: torch.ones(()),
    "int": lambda: torch.ones(C, dtype=torch.int64),
    "bool": lambda: torch.ones(C, dtype=torch.bool),
    "complex": lambda: torch.ones(C, dtype=torch.complex64),
    "meta": lambda: torch.ones(C, device="meta"),
    "sparse": lambda: torch.ones(C).to_sparse(),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bad", BAD_VECTORS)
@pytest.mark.parametrize("name", VECTORS)
def test_forward_vectors(name, bad, training):
    arguments = forward_arguments() | {name: BAD_VECTORS[bad](), "training": training}
    with pytest.raises(REFUSED) as error:
        raw_forward(**arguments)
    if bad not in ("meta", "sparse"):
        assert name in str(error.value)


@pytest.mark.parametrize("bad", ["short", "long", "int"])
@pytest.mark.parametrize("name", VECTORS)
def test_functional_vectors(name, bad):
    arguments = {key: value for key, value in forward_arguments().items() if key not in ("x", "p", "act", "seed")}
    arguments[name] = BAD_VECTORS[bad]()
    with pytest.raises(REFUSED, match=name):
        functional.batch_norm_act_drop(torch.randn(N, C, 3), **arguments, training=True)


@pytest.mark.parametrize("bad", ["short", "long", "int"])
def test_functional_prelu_weight(bad):
    with pytest.raises(REFUSED, match="prelu weight"):
        functional.batch_norm_act_drop(
            torch.randn(N, C, 3), None, None, act=("prelu", BAD_VECTORS[bad]()), training=True
        )


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_missing(name):
    with pytest.raises(REFUSED, match=name):
        raw_forward(**forward_arguments() | {name: None, "training": False})


def test_vectors_need_not_be_dense_or_aligned():
    """The running statistics may be slices of a larger buffer: legal, and read right."""
    arguments = forward_arguments() | {"training": False}
    expected = raw_forward(**arguments)[0]
    for name in VECTORS:
        room = torch.full((3 * C + 1,), math.nan)
        room[1::3] = arguments[name]
        arguments[name] = room[1::3]
    assert torch.equal(raw_forward(**arguments)[0], expected)


BAD_INPUTS = {
    "0-D": lambda: torch.tensor(1.0),
    "1-D": lambda: torch.randn(C),
    "6-D": lambda: torch.randn(2, C, 1, 1, 1, 1),
    "int": lambda: torch.ones(N, C, dtype=torch.int64),
    "bool": lambda: torch.ones(N, C, dtype=torch.bool),
    "complex": lambda: torch.ones(N, C, dtype=torch.complex64),
    "sparse": lambda: torch.ones(N, C).to_sparse(),
    "float8": lambda: torch.ones(N, C).to(torch.float8_e4m3fn),
    "no channels": lambda: torch.ones(N, 0),
    "other channels": lambda: torch.ones(N, C + 1),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_forward_inputs(bad):
    with pytest.raises(REFUSED):
        raw_forward(**forward_arguments() | {"x": BAD_INPUTS[bad]()})


@pytest.mark.parametrize("bad", sorted(set(BAD_INPUTS) - {"other channels"}))
def test_functional_inputs(bad):
    with pytest.raises(REFUSED):
        functional.batch_norm_act_drop(BAD_INPUTS[bad](), None, None, training=True)


BAD_SEEDS = {
    "none": lambda: None,
    "int32": lambda: torch.tensor(1, dtype=torch.int32),
    "float": lambda: torch.tensor(1.0),
    "uint64": lambda: torch.tensor(1, dtype=torch.uint64),
    "three": lambda: torch.tensor([1, 2, 3]),
    "empty": lambda: torch.empty(0, dtype=torch.int64),
    "meta": lambda: torch.empty((), dtype=torch.int64, device="meta"),
}


@pytest.mark.parametrize("bad", BAD_SEEDS)
def test_forward_seeds(bad):
    with pytest.raises(REFUSED, match=None if bad == "meta" else "seed"):
        raw_forward(**forward_arguments() | {"seed": BAD_SEEDS[bad]()})


@pytest.mark.parametrize("bad", sorted(set(BAD_SEEDS) - {"none"}))
def test_functional_seeds(bad):
    with pytest.raises((ValueError, RuntimeError), match="seed"):
        functional.batch_norm_act_drop(torch.randn(N, C), None, None, training=True, p=0.5, seed=BAD_SEEDS[bad]())


@pytest.mark.parametrize("bad", BAD_SEEDS)
def test_noise_seeds(bad):
    with pytest.raises(REFUSED):
        torch.ops.fusednorm.noise(BAD_SEEDS[bad](), [4, 4], 0.5, "bernoulli", "element", torch.float32).sum().item()


BAD_OPTIONS = {
    "p negative": {"p": -0.1},
    "p above one": {"p": 1.0000001},
    "p nan": {"p": math.nan},
    "p infinite": {"p": math.inf},
    "act unknown": {"act": "nope"},
    "act empty": {"act": ""},
    "act missing parameters": {"act": "leaky_relu"},
    "act too many parameters": {"act": "relu", "act_params": [1.0]},
    "act far too many parameters": {"act": "leaky_relu", "act_params": [1.0] * 100},
    "order without norm": {"order": "act-drop"},
    "order with add ahead": {"order": "add-norm", "residual": torch.zeros(N, C, 3)},
    "order with a strange word": {"order": "norm-pool"},
    "order with an act twice": {"order": "act-norm-act"},
    "order with a dash too many": {"order": "norm-act-"},
    "order senseless": {"order": "norm-norm"},
    "order empty": {"order": ""},
    "noise unknown": {"noise": "pink"},
    "beta above one": {"noise": "uniform", "p": 1.1},
    "beta nan": {"noise": "uniform", "p": math.nan},
    "alpha negative": {"noise": "gaussian", "p": -0.5},
    "alpha infinite": {"noise": "gaussian", "p": math.inf},
    "granularity unknown": {"granularity": "pixel"},
    "ghost batches negative": {"ghost_batch_size": -1},
    "residual without add": {"residual": torch.zeros(N, C, 3)},
    "residual missing": {"order": "norm-add-act", "act": "tanh"},
    "residual of another shape": {"order": "norm-add-act", "act": "tanh", "residual": torch.zeros(N, C, 4)},
    "residual of another dtype": {"order": "norm-add-act", "act": "tanh", "residual": torch.zeros(N, C, 3).double()},
    "act_weight missing": {"act": "prelu"},
    "act_weight superfluous": {"act_weight": torch.ones(C)},
    "act_weight of another size": {"act": "prelu", "act_weight": torch.ones(C + 1)},
    "act_weight of integers": {"act": "prelu", "act_weight": torch.ones(C).long()},
}


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_forward_options(bad):
    with pytest.raises((ValueError, RuntimeError)):
        raw_forward(**forward_arguments() | BAD_OPTIONS[bad])


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_backward_options(bad):
    x, arguments = torch.randn(N, C, 3), {"p": 0.5, "act": "relu"}
    with pytest.raises((ValueError, RuntimeError)):
        raw_backward(
            x,
            x,
            None,
            None,
            torch.zeros(C),
            torch.ones(C),
            torch.empty(0, dtype=torch.int32),
            torch.tensor(1),
            **arguments | BAD_OPTIONS[bad],
        )


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"p": -0.1}, "between 0 and 1"),
        ({"p": 2.0}, "between 0 and 1"),
        ({"p": math.nan}, "between 0 and 1"),
        ({"act": "nope"}, "softplus"),
        ({"act": ("nope", 1.0)}, "softplus"),
        ({"act": ("gelu", "nope")}, "tanh"),
        ({"act": ("relu", 1.0)}, "relu"),
        ({"act": ("elu", 1.0, 2.0)}, "elu"),
        ({"act": ("hardtanh", 2.0, 1.0)}, "min_val"),
        ({"order": "norm-norm"}, "order: expected 'norm'"),
        ({"order": "act-drop"}, "order: expected 'norm'"),
        ({"order": "add-norm", "residual": torch.zeros(N, C)}, "order: expected 'norm'"),
        ({"order": None}, "order: expected 'norm'"),
        ({"order": ["norm"]}, "order: expected 'norm'"),
        ({"p": "0.5"}, "between 0 and 1, but got <class 'str'>"),
        ({"order": "norm-add"}, "residual: expected a tensor"),
        ({"order": "norm-add", "residual": torch.zeros(N, C + 1)}, "residual: expected shape"),
        ({"noise": "uniform", "p": 1.5}, "beta"),
        ({"noise": "gaussian", "p": -1.0}, "alpha"),
        ({"act": "prelu"}, "weight"),
        ({"act": ("prelu", 0.25)}, "weight"),
        ({"ghost_batch_size": 0}, "ghost_batch_size"),
        ({"ghost_batch_size": 2.0}, "ghost_batch_size"),
        ({"noise": "pink"}, "bernoulli"),
        ({"granularity": "pixel"}, "channel"),
        ({"residual": torch.zeros(N, C)}, "residual"),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_options(bad, says, training):
    """The sentence says what is available, whether or not the option would be used."""
    with pytest.raises(ValueError, match=says):
        functional.batch_norm_act_drop(torch.randn(N, C), torch.zeros(C), torch.ones(C), training=training, **bad)


@pytest.mark.parametrize("value", ["x", 3, [1.0] * C, False], ids=str)
@pytest.mark.parametrize("name", ["input", "running_mean", "running_var", "weight", "bias"])
def test_not_a_tensor(name, value):
    arguments = {"input": torch.randn(N, C), "running_mean": torch.zeros(C), "running_var": torch.ones(C)}
    with pytest.raises(TypeError, match=f"{name}: expected a tensor.* but got {type(value).__name__}"):
        functional.batch_norm_act_drop(**arguments | {name: value})


@pytest.mark.parametrize(
    "bad",
    [
        {"shape": (4,)},
        {"shape": ()},
        {"shape": (-1, 4)},
        {"p": 1.5},
        {"p": math.nan},
        {"kind": "pink"},
        {"granularity": "pixel"},
        {"dtype": torch.int32},
        {"dtype": torch.complex64},
        {"seed": 1.5},
        {"seed": None},
    ],
    ids=str,
)
def test_noise_options(bad):
    arguments = {"shape": (4, 4), "p": 0.5, "seed": 1} | bad
    with pytest.raises(REFUSED):
        fusednorm.noise(arguments.pop("shape"), arguments.pop("p"), **arguments)


def test_huge_noise_is_refused():
    """More elements than an int64 can count."""
    with pytest.raises(REFUSED):
        torch.ops.fusednorm.noise(torch.tensor(1), [2**40, 2**40], 0.5, "bernoulli", "element", torch.float32)


def test_eps():
    """As the running torch: not positive is refused in training."""
    x = torch.randn(N, C)
    for eps in (0.0, -1.0):
        try:
            torch.nn.functional.batch_norm(x, None, None, training=True, eps=eps)
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error)):
                functional.batch_norm_act_drop(x, None, None, training=True, eps=eps)


class TestBackward:
    @staticmethod
    def saved(shape=(N, 64, 3, 11), layout=torch.contiguous_format):
        x = torch.randn(shape).to(memory_format=layout)
        c = shape[1]
        weight, bias, seed = torch.ones(c), torch.zeros(c), torch.tensor(1)
        _, mean, invstd, *_, mask = raw_forward(x, weight, bias, seed=seed, p=0.5, act="relu", save_mask=True)
        return {
            "grad": torch.randn(shape),
            "x": x,
            "weight": weight,
            "bias": bias,
            "mean": mean,
            "invstd": invstd,
            "mask": mask,
            "seed": seed,
        }

    def refuse(self, **bad):
        with pytest.raises(REFUSED):
            raw_backward(**self.saved() | bad, p=0.5, act="relu")

    def test_good(self):
        assert torch.isfinite(raw_backward(**self.saved(), p=0.5, act="relu")[0]).all()

    @pytest.mark.parametrize(
        "grad",
        [
            torch.randn(N, 64, 3),
            torch.randn(N, 64, 3, 10),
            torch.randn(N - 1, 64, 3, 11),
            torch.randn(1),
            torch.randn(N, 64, 3, 11, dtype=torch.float64),
            torch.ones(N, 64, 3, 11, dtype=torch.int64),
            torch.ones(N, 64, 3, 11, device="meta"),
        ],
        ids=lambda grad: f"{tuple(grad.shape)}-{grad.dtype}-{grad.device}",
    )
    def test_gradients(self, grad):
        self.refuse(grad=grad)

    @pytest.mark.parametrize("name", ["weight", "bias", "mean", "invstd"])
    @pytest.mark.parametrize("size", [0, 1, 63, 65])
    def test_vectors(self, name, size):
        self.refuse(**{name: torch.ones(size)})

    @pytest.mark.parametrize("name", ["weight", "mean", "invstd"])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_dtypes(self, name, dtype):
        self.refuse(**{name: torch.ones(64, dtype=dtype)})

    @pytest.mark.parametrize(
        "mask",
        [
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(64, 6, dtype=torch.int32),
            torch.zeros(63, 7, dtype=torch.int32),
            torch.zeros(64, 7, dtype=torch.int64),
            torch.zeros(64, 7, dtype=torch.bool),
            torch.zeros(64, 7),
            torch.zeros(N, 33, 1, dtype=torch.int32),
            torch.zeros(N, 32, 2, dtype=torch.int32),
            torch.zeros(64, 7, 1, 1, dtype=torch.int32),
            torch.zeros(64, 7, dtype=torch.int32, device="meta"),
        ],
        ids=lambda mask: f"{tuple(mask.shape)}-{mask.dtype}-{mask.device}",
    )
    def test_masks(self, mask):
        self.refuse(mask=mask)

    @pytest.mark.parametrize("bad", BAD_SEEDS)
    def test_seeds(self, bad):
        """Even where a saved mask makes the seed superfluous, a wrong one is a mistake of the caller's."""
        empty = torch.empty(0, dtype=torch.int32)
        self.refuse(seed=BAD_SEEDS[bad](), mask=empty)

    @pytest.mark.parametrize("x", [torch.randn(64), torch.randn(N, 63, 3, 11), torch.ones(N, 64, 3, 11).long()])
    def test_inputs(self, x):
        self.refuse(x=x, grad=x)


class TestUpdateStats:
    @staticmethod
    def call(**bad):
        arguments = {
            "running_mean": torch.zeros(C),
            "running_var": torch.ones(C),
            "num_batches_tracked": torch.tensor(0),
            "mean": torch.zeros(C),
            "var": torch.ones(C),
            "count": 9,
            "last_count": 9,
            "momentum": 0.1,
        } | bad
        torch.ops.fusednorm.update_stats_(*arguments.values())

    @pytest.mark.parametrize("shape", [(4, C), (2 * C, 1), (2 * C,), (C, 2)], ids=str)
    def test_other_groups(self, shape):
        var = torch.ones(1, 1).expand(shape) if len(shape) == 2 else torch.ones(shape)
        with pytest.raises(RuntimeError, match="mean and var"):
            self.call(mean=torch.zeros(2, C), var=var)

    def test_good(self):
        self.call()

    @pytest.mark.parametrize("name", ["running_mean", "running_var", "mean", "var"])
    @pytest.mark.parametrize("bad", ["short", "long", "empty", "int", "complex", "meta"])
    def test_vectors(self, name, bad):
        with pytest.raises(REFUSED):
            self.call(**{name: BAD_VECTORS[bad]()})

    @pytest.mark.parametrize(
        "counter", [torch.tensor([0, 1]), torch.tensor(0.5), torch.empty(0, dtype=torch.int64)], ids=str
    )
    def test_counters(self, counter):
        with pytest.raises(REFUSED):
            self.call(num_batches_tracked=counter)

    def test_cumulative_average_without_a_counter(self):
        with pytest.raises(REFUSED):
            self.call(num_batches_tracked=None, momentum=None)

    def test_strided_buffers(self):
        """Slices of a larger buffer are legal, and only they are written."""
        room = torch.zeros(3 * C)
        self.call(running_mean=room[::3], mean=torch.ones(C), momentum=0.5)
        assert torch.equal(room[::3], torch.full((C,), 0.5))
        assert torch.equal(room[1::3], torch.zeros(C))


def test_unsupported_devices_say_so():
    x = torch.randn(N, C, device="meta")
    y = functional.batch_norm_act_drop(x, None, None, training=True)
    assert y.device.type == "meta"
    assert y.shape == x.shape
