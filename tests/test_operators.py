"""torch.library.opcheck on every operator: schema, registration, fake kernel, ahead-of-time dispatch."""

import pytest
import torch
from common import DEVICE, backward_arguments, forward_arguments, lay_out, raw_forward
from torch.library import opcheck

ops = torch.ops.fusednorm

FORWARD = {
    "plain": dict(shape=(4, 5, 3, 3)),
    "channels-last": dict(shape=(4, 5, 3, 3), layout="last"),
    "rows": dict(shape=(9, 40), act="tanh"),
    "channels innermost": dict(shape=(3, 33, 7), layout="last"),
    "five dimensions": dict(shape=(2, 3, 2, 3, 2), act="gelu"),
    "sliced": dict(shape=(4, 5, 3, 3), layout="sliced"),
    "transposed": dict(shape=(4, 5, 3, 3), layout="transposed"),
    "transposed rows": dict(shape=(9, 5), layout="transposed"),
    "expanded": dict(shape=(4, 5, 3, 3), layout="expanded"),
    "one channel": dict(shape=(4, 1, 3, 3)),
    "one channel, channels-last": dict(shape=(4, 1, 3, 3), layout="last"),
    "one position": dict(shape=(4, 5, 1, 1)),
    "one sample": dict(shape=(1, 5, 3, 3), layout="last"),
    "one value per channel": dict(shape=(1, 5), training=False),
    "empty": dict(shape=(0, 5, 3, 3)),
    "running statistics": dict(shape=(4, 5, 3, 3), training=False),
    "bfloat16": dict(shape=(4, 64, 4, 4), dtype=torch.bfloat16),
    "float64": dict(shape=(64, 5), dtype=torch.float64),
    "float16": dict(shape=(4, 64, 4, 4), dtype=torch.float16, layout="last"),
    "no noise": dict(shape=(4, 5, 3, 3), p=0.0),
    "all dropped": dict(shape=(4, 5, 3, 3), p=1.0),
    "channel noise": dict(shape=(4, 5, 3, 3), granularity="channel"),
    "no mask": dict(shape=(4, 64, 4, 4), save_mask=False),
    "mask": dict(shape=(4, 64, 8, 8)),
    "mask, channels-last": dict(shape=(4, 64, 8, 8), layout="last"),
    "leaky": dict(shape=(4, 5, 3, 3), act="leaky_relu", act_params=[0.1]),
    "not affine": dict(shape=(4, 5, 3, 3), affine=False),
    "short rows": dict(shape=(4, 70, 3, 3), p=0.0),
}
cases = pytest.mark.parametrize("case", FORWARD.values(), ids=FORWARD.keys())


def arguments(shape, dtype=torch.float32, layout="first", affine=True, save_mask=True, **options):
    """Tensors of the forward operator, and its other options."""
    c = shape[1]
    x = lay_out(torch.randn(shape).to(dtype), layout)
    weight, bias = (torch.rand(c) + 0.5, torch.randn(c)) if affine else (None, None)
    return (x, weight, bias, torch.zeros(c), torch.ones(c), torch.tensor(3)), {"act": "relu", "p": 0.5} | options


@cases
def test_forward(case):
    tensors, options = arguments(**case)
    save = case.get("save_mask", True)
    opcheck(ops.forward.default, (), forward_arguments(*tensors, **options, save_mask=save))


@cases
@pytest.mark.parametrize("grad_layout", ["first", "last", "expanded"])
def test_backward(case, grad_layout):
    if grad_layout == "expanded" and case["shape"][0] == 0:
        pytest.skip("nothing to expand")
    tensors, options = arguments(**case)
    x, weight, bias, _, _, seed = tensors
    _, mean, invstd, *_, mask = raw_forward(*tensors, **options, save_mask=case.get("save_mask", True))
    g = lay_out(torch.randn(x.shape).to(x.dtype), grad_layout)
    opcheck(ops.backward.default, (), backward_arguments(g, x, weight, bias, mean, invstd, mask, seed, **options))


@pytest.mark.parametrize("wanted", [[True] + [False] * 4, [False, True, True, False, False], [False] * 5], ids=str)
def test_backward_subsets(wanted):
    tensors, options = arguments((4, 5, 3, 3))
    x, weight, bias, _, _, seed = tensors
    _, mean, invstd, *_, mask = raw_forward(*tensors, **options)
    options["output_mask"] = wanted
    opcheck(ops.backward.default, (), backward_arguments(x, x, weight, bias, mean, invstd, mask, seed, **options))


FAMILY = {
    "before": dict(order="act-drop-norm", act="tanh"),
    "matched": dict(order="drop-norm-act", eval_matched_stats=True),
    "matched, nothing dropped": dict(order="drop-norm-act", p=0.0, eval_matched_stats=True),
    "matched, evaluation": dict(order="drop-norm-act", training=False, eval_matched_stats=True),
    "prelu": dict(act="prelu"),
    "add": dict(order="norm-add"),
    "bits of the activation": dict(order="norm-drop-add-act"),
    "bits of both": dict(order="norm-add-act-drop", act="hardtanh", act_params=[-1.0, 1.0]),
    "bits without noise": dict(order="norm-add-act", p=0.0),
    "no bits": dict(order="norm-add-act", act="tanh", p=0.0),
    "bits of the noise": dict(order="norm-act-add-drop"),
    "uniform": dict(noise="uniform"),
    "gaussian": dict(noise="gaussian", order="norm-drop-add-act"),
    "sample": dict(granularity="sample"),
    "ghost": dict(ghost_batch_size=3),
    "ghost of all": dict(ghost_batch_size=8),
    "ghost matched": dict(ghost_batch_size=3, order="drop-norm-act", eval_matched_stats=True),
}


@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(8, 64, 9, 9), (70, 32), (4, 3, 600)], ids=str)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(
    "case",
    [{}, {"p": 0.0}, {"order": "norm-add-act-drop"}, {"ghost_batch_size": 3}, {"order": "act-drop-norm"}],
    ids=str,
)
def test_rows_and_strengths(case, layout, shape):
    tensors, options = arguments(shape, layout=layout, **case)
    x, weight, bias, _, _, seed = tensors
    if "add" in options.get("order", ""):
        options["residual"] = torch.randn(shape)
    extras = {"valid": torch.rand(shape[0], *shape[2:]) < 0.7}
    if options["p"]:
        extras["strength"] = torch.tensor(0.3)
    forward = forward_arguments(*tensors, **options, save_mask=True) | extras
    opcheck(ops.forward.default, (), forward)
    _, mean, invstd, *_, mask = ops.forward(**forward)
    grads = [True, True, True, "residual" in options, False]
    backward = backward_arguments(x, x, weight, bias, mean, invstd, mask, seed, **options, output_mask=grads) | extras
    opcheck(ops.backward.default, (), backward)
    if not options.get("ghost_batch_size"):
        check_apart(forward, backward, [grads[0], *grads[3:]])


@pytest.mark.parametrize("shape", [(8, 64, 9, 9), (70, 32)], ids=str)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("case", FAMILY.values(), ids=FAMILY.keys())
def test_family(case, layout, shape):
    tensors, options = arguments(shape, layout=layout, **case)
    x, weight, bias, _, _, seed = tensors
    if "add" in options.get("order", ""):
        options["residual"] = torch.randn(shape)
    if options["act"] == "prelu":
        options["act_weight"] = torch.rand(1)
    matched = options.pop("eval_matched_stats", False)
    forward = forward_arguments(*tensors, **options, eval_matched_stats=matched, save_mask=True)
    opcheck(ops.forward.default, (), forward)
    _, mean, invstd, *_, mask = ops.forward(**forward)
    grads = [True, True, True, "residual" in options, "act_weight" in options]
    backward = backward_arguments(x, x, weight, bias, mean, invstd, mask, seed, **options, output_mask=grads)
    opcheck(ops.backward.default, (), backward)
    if options.get("training", True) and not options.get("ghost_batch_size"):
        check_apart(forward, backward, [grads[0], *grads[3:]])


def check_apart(forward, backward, wanted):
    """The operators that are one pass each, with the arguments of those that are two."""
    order = forward["order"]
    names = ("input", "act_weight", "seed", "act", "act_params", "noise", "p", "granularity", "eval_matched_stats")
    ahead = {"order": order[: order.index("norm") + 4]}
    opcheck(ops.statistics.default, (), {name: forward[name] for name in names} | ahead)
    saved = {name: v for name, v in backward.items() if name not in ("training", "ghost_batch_size", "output_mask")}
    opcheck(ops.gradient_sums.default, (), saved)
    given = {"sums": ops.gradient_sums(**saved), "count": torch.tensor(9.0, dtype=torch.float64)}
    opcheck(ops.backward_given.default, (), saved | given | {"output_mask": wanted})


@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (9, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("layout", ["first", "last", "sliced", "transposed"])
@pytest.mark.parametrize(
    ("kind", "granularity"), [("bernoulli", "element"), ("uniform", "channel"), ("gaussian", "sample")]
)
def test_dropout(kind, granularity, layout, shape):
    x = lay_out(torch.randn(shape), layout)
    opcheck(ops.dropout.default, (x, torch.tensor(3), 0.4, kind, granularity))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_update_stats(dtype, tracked, momentum):
    counter = torch.tensor(3) if tracked else None
    if momentum is None and not tracked:
        pytest.skip("a cumulative average needs its counter")
    opcheck(
        ops.update_stats_.default,
        (
            torch.zeros(5, dtype=dtype),
            torch.ones(5, dtype=dtype),
            counter,
            torch.randn(5),
            torch.rand(5),
            9,
            9,
            momentum,
        ),
    )


@pytest.mark.parametrize("granularity", ["element", "channel", "sample"])
@pytest.mark.parametrize("size", [[6, 5, 3], [7, 3], [0, 3], [2, 3, 2, 2, 2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_noise(dtype, size, granularity):
    opcheck(ops.noise.default, (torch.tensor(3), size, 0.4, "bernoulli", granularity, dtype))


@pytest.mark.parametrize("like", [torch.empty(3), torch.empty(2, 2, dtype=torch.bfloat16)], ids=["3", "2x2"])
def test_draw_seed(like):
    opcheck(ops.draw_seed.default, (like,))


def test_saved_mask_is_a_bit_per_element():
    for layout, shape in (("first", (64, 8)), ("last", (4, 64, 2))):
        x = lay_out(torch.randn(4, 64, 8, 8), layout)
        mask = raw_forward(x, seed=torch.tensor(1), p=0.5, save_mask=True)[5]
        assert mask.numel() * mask.element_size() <= x.numel() // 8
        if DEVICE.type == "cpu":
            assert mask.dtype == torch.int32
            assert mask.shape == shape


def test_every_operator_is_tested():
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "fusednorm::" in name
    }
    # The last two are made of the others: the eager call, and a backward that is differentiated again.
    apart = {"statistics", "gradient_sums", "backward_given"}
    assert names == {"forward", "backward", "update_stats_", "noise", "dropout", "draw_seed"} | apart | {
        "batch_norm_act_drop",
        "differentiable_backward",
    }


@pytest.mark.parametrize("given", ["running_mean", "running_var"])
def test_eager_call_with_half_of_the_statistics(given):
    statistics = [torch.zeros(3) if given == name else None for name in ("running_mean", "running_var")]
    chain = (1e-5, "norm", "identity", [], "bernoulli", 0.0, "element", 0)
    with pytest.raises(ValueError, match="running_mean and running_var must either both be None or neither be None"):
        torch.ops.fusednorm.batch_norm_act_drop(
            torch.randn(4, 3, 5), None, None, *statistics, None, None, None, None, True, 0.1, *chain, False, True
        )
