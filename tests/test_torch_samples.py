"""Torch's own samples of its own layers, run through ours.

Of each of its functions and modules torch keeps a list of inputs (`op_db`, `module_db`), which its own tests run. Those
of `F.batch_norm`, `native_batch_norm`, the dropouts and nn.BatchNorm1d/2d/3d are given to our functions and modules,
bare and as a part of chains, and what torch asks of any module (layouts, derivatives, pickles, factory keywords,
conversions) is asked of ours. The answer is that of the stock layers on the same values, in float64 where numbers are
compared.
"""

import copy
import functools
import io
import itertools
import math
import pickle
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, FLOATS, close, double, dtype_id, leaf, noise, raw_forward
from torch import nn

import fusednorm
from fusednorm import functional, reference

REASON = "torch's samples need the package expecttest"
# Their import would forbid the whole process to set a flag of torch.backends; other tests are not theirs to command.
with mock.patch.object(torch.backends, "disable_global_flags"):
    common_modules = pytest.importorskip("torch.testing._internal.common_modules", reason=REASON, exc_type=ImportError)
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_utils import noncontiguous_like

CLASSES = {
    nn.BatchNorm1d: (fusednorm.FusedBatchNorm1d, fusednorm.LazyFusedBatchNorm1d),
    nn.BatchNorm2d: (fusednorm.FusedBatchNorm2d, fusednorm.LazyFusedBatchNorm2d),
    nn.BatchNorm3d: (fusednorm.FusedBatchNorm3d, fusednorm.LazyFusedBatchNorm3d),
}
SEED = 3


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """Each sample is a handful of numbers, for which threads would only wait."""
    threads(1)


dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def leaves(tensors, dtype=None):
    """Of the same values, and requiring gradients where those do; None stays None."""
    return [
        t if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in tensors
    ]


def results(function, tensors, grad):
    """The output, the gradients of what requires one, and the other tensors, which the call may have updated."""
    y = function(*tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    others = [t for t in tensors if t is not None and not t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, grad.to(y.dtype)), *others]


def agree(got, exact):
    """Up to roundings: the samples are numbers of up to nine, in no channel close together."""
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        if a.dtype.is_floating_point:
            close(a, double(b), 1 + double(b).abs().max() if b.numel() else 1, f"result {i}")
        else:
            assert torch.equal(a, b)


def chain(order, norm, x, residual, act, m):
    """The stages of an order around a stock norm."""
    before, after = reference.parse_order(order)
    return reference.run_stages(after, norm(reference.run_stages(before, x, act, m)), act, m, residual)


# ---- functions -------------------------------------------------------------------------------------------------------
@functools.cache
def samples(name, dtype=torch.float32):
    torch.manual_seed(0)
    (op,) = (op for op in op_db if op.name == name and not op.variant_test_name)
    return list(op.sample_inputs(DEVICE, dtype, requires_grad=True))


def each_sample(*names, where=lambda sample: True):
    """Parametrises by (name, index); a test takes its sample in the dtype that it wants."""
    table = {
        f"{name.removeprefix('nn.functional.')}-{i}-{tuple(sample.input.shape)}": (name, i)
        for name in names
        for i, sample in enumerate(samples(name))
        if where(sample)
    }
    return pytest.mark.parametrize("at", table.values(), ids=table)


def take(at, dtype):
    name, index = at
    sample = samples(name, dtype)[index]
    tensors = [t for t in (sample.input, *sample.args) if t is None or isinstance(t, torch.Tensor)]
    return leaves(tensors), sample.args[len(tensors) - 1 :], sample.kwargs


@dtypes
@each_sample("nn.functional.batch_norm", where=lambda sample: sample.input.dim() < 2)
def test_batch_norm_without_channels(at, dtype):
    """An empty vector, which torch lets through."""
    tensors, _, options = take(at, dtype)
    with pytest.raises(RuntimeError, match="input: expected 2 to 5 dimensions"):
        functional.batch_norm_act_drop(*tensors, **options)


@dtypes
@each_sample("nn.functional.batch_norm", where=lambda sample: sample.input.dim() > 1)
def test_batch_norm(at, dtype):
    tensors, _, options = take(at, dtype)
    grad = torch.randn_like(tensors[0])
    stock = results(lambda *t: F.batch_norm(*t, **options), leaves(tensors), grad)
    exact = results(lambda *t: F.batch_norm(*t, **options), leaves(tensors, torch.float64), grad)
    got = results(lambda *t: functional.batch_norm_act_drop(*t, **options), leaves(tensors), grad)
    agree(got, exact)
    for a, b in zip(got, stock, strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())


@pytest.mark.parametrize("order", [order for order in reference.ORDERS if order != "norm"])
@each_sample("nn.functional.batch_norm", where=lambda sample: sample.input.dim() > 1)
def test_batch_norm_in_every_order(at, order):
    tensors, _, options = take(at, torch.float64)
    x, *vectors = tensors
    residual = leaf(torch.randn_like(x)) if "add" in order else None
    grad, m, p = torch.randn_like(x), noise(x.shape, 0.4, SEED), 0.4 if "drop" in order else 0.0
    act = "silu" if "act" in order else None
    more = {"act": act, "p": p, "order": order, "drop_training": True, "seed": SEED}

    def ours(x, residual, *vectors):
        return functional.batch_norm_act_drop(x, *vectors, **options, **more, residual=residual)

    def stock(x, residual, *vectors):
        return chain(order, lambda u: F.batch_norm(u, *vectors, **options), x, residual, act, m)

    agree(*(results(each, leaves([x, residual, *vectors]), grad) for each in (ours, stock)))


@dtypes
@each_sample("native_batch_norm")
def test_native_batch_norm(at, dtype):
    """The saved mean and 1/sqrt(var + eps) too; at evaluation torch has none."""
    (x, weight, bias, mean, var), (training, momentum, eps), _ = take(at, dtype)
    tensors = [t if t is None else t.detach() for t in (x, weight, bias, mean, var)]
    got = raw_forward(*tensors, training=training, eps=eps, order="norm")[:3]
    exact = torch.native_batch_norm(*leaves(tensors, torch.float64), training, momentum, eps)
    agree(got if training else got[:1], exact if training else exact[:1])


DROPOUTS = ("nn.functional.dropout", "nn.functional.dropout2d", "nn.functional.dropout3d")


def stock_dropout(name, x, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says what torch takes a three-dimensional input of dropout2d for
        return getattr(F, name.removeprefix("nn.functional."))(x, **options)


def our_dropout(name, x, options):
    """dropout3d takes four dimensions for one sample, whose channels come first."""
    channels = "sample" if name.endswith("3d") and x.dim() == 4 else "channel"
    return functional.dropout(x, **options, granularity=channels if name.endswith("d") else "element")


def varies(dropout, name, x, options):
    """In which dimensions elements are dropped one by one."""
    zeros = [dropout(name, x, options) == 0 for _ in range(20)]
    return [any(bool((zero != zero.narrow(dim, 0, 1)).any()) for zero in zeros) for dim in range(x.dim())]


@dtypes
@each_sample(*DROPOUTS)
def test_dropout(at, dtype):
    """What is kept, what becomes of it and of its gradient, and which elements share a fate; not the same ones."""
    name, ((x,), _, options) = at[0], take(at, dtype)
    y, stock = (dropout(name, x, options) for dropout in (our_dropout, stock_dropout))
    assert (y.shape, y.dtype, y.stride()) == (stock.shape, stock.dtype, stock.stride())
    p = options.get("p", 0.5)
    if p == 0 or not options.get("training", True):
        assert torch.equal(y, stock)
        return
    keeps = torch.zeros_like(x) if p == 1 else (y != 0) / torch.tensor(1 - p, dtype=dtype)
    grad = torch.randn_like(x)
    assert torch.equal(y, x * keeps)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], grad * keeps)
    assert varies(our_dropout, name, x, options) == varies(stock_dropout, name, x, options)


def is_random(sample):
    return sample.kwargs.get("training", True) and 0 < sample.kwargs.get("p", 0.5) < 1


@each_sample(*DROPOUTS, where=is_random)
def test_dropout_keeps_its_share(at):
    name, ((x,), _, options) = at[0], take(at, torch.float32)
    p, runs = options.get("p", 0.5), 1000
    free = varies(stock_dropout, name, x, options)
    kept = torch.stack([our_dropout(name, x, options) != 0 for _ in range(runs)]).float()
    draws = runs * math.prod(size for size, each in zip(x.shape, free, strict=True) if each)
    assert abs(kept.mean().item() - (1 - p)) < 4.5 * math.sqrt(p * (1 - p) / draws)


# ---- modules ---------------------------------------------------------------------------------------------------------
INFOS = {info.module_cls: info for info in common_modules.module_db if info.module_cls in CLASSES}
KINDS = {
    "bare": {},
    "norm-act-drop": {"act": "silu", "drop": 0.4},
    "act-drop-norm": {"act": "gelu", "drop": 0.4, "order": "act-drop-norm"},
    "drop-norm-act": {"act": "tanh", "drop": 0.4, "order": "drop-norm-act"},
    "norm-drop-add-act": {"act": "elu", "drop": 0.4, "order": "norm-drop-add-act"},
}


def module_inputs(stock, training, dtype=torch.float32):
    torch.manual_seed(0)
    options = {"device": DEVICE, "dtype": dtype, "requires_grad": True, "training": training}
    return INFOS[stock].module_inputs_func(INFOS[stock], **options)


CASES = {
    f"{stock.__name__}-{each.desc or 'default'}": (stock, i)
    for stock in CLASSES
    for i, each in enumerate(module_inputs(stock, True))
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
kinds = pytest.mark.parametrize("kind", KINDS)
two_kinds = pytest.mark.parametrize("kind", ["bare", "norm-act-drop"])


def random_state(layer):
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return layer


def build(case, training=True, kind="bare", dtype=torch.float64, param_dtype=None):
    """Our layer of a sample and the stock one with the same state, in float64, and what forward takes."""
    stock, index = case
    sample = module_inputs(stock, training, dtype)[index]
    args, options = sample.constructor_input.args, sample.constructor_input.kwargs
    ours = random_state(CLASSES[stock][0](*args, **options, dtype=param_dtype or dtype, **KINDS[kind])).train(training)
    theirs = stock(*args, **options, dtype=torch.float64).train(training)
    theirs.load_state_dict(ours.state_dict())
    if ours.drop is not None:
        ours.drop.train()
    (x,) = sample.forward_input.args
    return ours, theirs, [leaf(x), leaf(torch.randn_like(x))][: 1 + ("add" in ours.order)]


def call(layer, *inputs):
    return layer(*inputs, seed=SEED)


def outcome(layer, inputs, grad, function=None):
    """The output, all gradients and all buffers of a layer, which `function` calls."""
    y = function(*inputs) if function else call(layer, *inputs)
    return [y, *torch.autograd.grad(y, [*inputs, *layer.parameters()], grad.to(y.dtype)), *layer.buffers()]


@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [*((dtype, dtype) for dtype in FLOATS), *((dtype, torch.float32) for dtype in FLOATS[2:])],
    ids=dtype_id,
)
@training
@kinds
@cases
def test_forward_and_backward(case, kind, training, dtype, param_dtype):
    """Of the types that stock layers take: all alike, or 16-bit inputs beside float32 parameters."""
    ours, theirs, inputs = build(case, training, kind, dtype, param_dtype)
    grad, m = torch.randn_like(inputs[0]), noise(inputs[0].shape, 0.4, SEED)
    order, act = ("norm", None) if kind == "bare" else (ours.order, KINDS[kind]["act"])

    def stock(x, residual=None):
        return chain(order, theirs, x, residual, act, m)

    agree(outcome(ours, inputs, grad), outcome(theirs, leaves(inputs, torch.float64), grad, stock))


@training
@cases
def test_lazy(case, training):
    """The arguments behind num_features, which the first input tells."""
    stock, index = case
    sample = module_inputs(stock, training)[index]
    (features, *args), options = sample.constructor_input.args, sample.constructor_input.kwargs
    (x,) = sample.forward_input.args
    fused, lazy = CLASSES[stock]
    layers = [fused(features, *args, **options, act="relu"), lazy(*args, **options, act="relu")]
    assert torch.equal(*(layer.train(training)(x) for layer in layers))
    assert type(layers[1]) is fused
    assert repr(layers[0]) == repr(layers[1])
    for a, b in zip(*(layer.state_dict().values() for layer in layers), strict=True):
        assert torch.equal(a, b)


@training
@kinds
@cases
def test_strided_inputs_and_gradients(case, kind, training):
    """Every second number of a tensor whose others are NaN."""
    ours, _, inputs = build(case, training, kind)
    grad, expected = torch.randn_like(inputs[0]), None
    for strided in itertools.product([False, True], repeat=len(inputs) + 1):
        layer = copy.deepcopy(ours)
        *values, g = (noncontiguous_like(t) if s else t for s, t in zip(strided, [*inputs, grad], strict=True))
        got = outcome(layer, values, g)
        expected = expected or got
        agree(got, expected)


@training
@two_kinds
@cases
def test_derivatives(case, kind, training):
    """By finite differences, first and second, of the input and all parameters."""
    ours, _, inputs = build(case, training, kind)
    names = [name for name, _ in ours.named_parameters()]

    def function(x, *parameters):
        state = dict(zip(names, parameters, strict=True)) | {n: b.clone() for n, b in ours.named_buffers()}
        return torch.func.functional_call(ours, state, (x,), {"seed": SEED})

    arguments = (*inputs, *ours.parameters())
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


WITH_FORMATS = {name: case for name, case in CASES.items() if case[0] is not nn.BatchNorm1d}
FORMATS = {4: (torch.contiguous_format, torch.channels_last), 5: (torch.contiguous_format, torch.channels_last_3d)}


@pytest.mark.cpu  # other backends of torch choose formats in their own way
@training
@kinds
@pytest.mark.parametrize("case", WITH_FORMATS.values(), ids=WITH_FORMATS)
def test_memory_formats(case, kind, training):
    """Of input, gradient and module, the output in the input's format; no format has a say in the numbers."""
    ours, theirs, inputs = build(case, training, kind)
    grad, expected = torch.randn_like(inputs[0]), None
    for of_module, of_input, of_grad in itertools.product(FORMATS[inputs[0].dim()], repeat=3):
        layer = copy.deepcopy(ours).to(memory_format=of_module)
        values = [leaf(t.detach().to(memory_format=of_input)) for t in inputs]
        g = grad.to(memory_format=of_grad)
        got = outcome(layer, values, g)
        expected = expected or got
        agree(got, expected)
        assert got[0].stride() == got[1].stride() == values[0].stride() == theirs(values[0]).stride()


@cases
def test_factory_keywords(case):
    """By keyword, by context and by default: parameters and buffers are made as those of the stock layer."""
    stock, index = case
    sample = module_inputs(stock, True)[index].constructor_input

    def made(cls, **keywords):
        layer = cls(*sample.args, **sample.kwargs, **keywords)
        return {n: (t.shape, t.dtype, t.device, type(t)) for n, t in layer.state_dict(keep_vars=True).items()}

    fused = CLASSES[stock][0]
    for dtype, device in itertools.product([None, torch.bfloat16, torch.float64], [None, "meta"]):
        assert made(fused, dtype=dtype, device=device) == made(stock, dtype=dtype, device=device)
    with torch.device("meta"):
        assert made(fused) == made(stock)
        assert {device.type for _, _, device, _ in made(fused, act="prelu").values()} <= {"meta"}
    torch.set_default_dtype(torch.float64)
    try:
        assert made(fused) == made(stock)
    finally:
        torch.set_default_dtype(torch.float32)


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(layer):
    """A new layer of the same kind that takes the saved state."""
    file, other = io.BytesIO(), copy.deepcopy(layer)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    random_state(other).load_state_dict(torch.load(file, weights_only=True))
    return other


@training
@kinds
@cases
def test_copies(case, kind, training):
    ours, _, inputs = build(case, training, kind)
    others = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), saved(ours), loaded(ours)]
    expected = call(ours, *inputs)
    for other in others:
        assert torch.equal(call(other, *inputs), expected)
        assert repr(other) == repr(ours)
        assert all(torch.equal(a, b) for a, b in zip(other.buffers(), ours.buffers(), strict=True))


@cases
def test_repr(case):
    """What the stock layer says of itself, and then what it lacks."""
    ours, theirs, _ = build(case)
    assert repr(ours).startswith(f"Fused{repr(theirs).removesuffix(')')}, order=")


@two_kinds
@pytest.mark.parametrize("stock", CLASSES)
def test_errors(stock, kind):
    info = INFOS[stock]
    if info.module_error_inputs_func is None:
        pytest.skip("this torch has no such samples")
    options = {"device": DEVICE, "dtype": torch.float32, "requires_grad": True, "training": True}
    for each in info.module_error_inputs_func(info, **options):
        built, given = each.module_error_input.constructor_input, each.module_error_input.forward_input
        for cls, extra in ((stock, {}), (CLASSES[stock][0], KINDS[kind])):
            with pytest.raises(each.error_type, match=each.error_regex):
                cls(*built.args, **built.kwargs, **extra)(*given.args, **given.kwargs)


TO_META, BACK = ("to", {"device": "meta"}), ("to_empty", {"device": DEVICE})
CONVERSIONS = (("to", {"dtype": torch.bfloat16}), ("double", {}), TO_META, BACK)


@pytest.mark.parametrize("swap", [False, True], ids=["by data", "by swapping"])
@cases
def test_conversions(case, swap):
    """`to` and `to_empty` keep or replace tensors as they do in the stock layer, which may swap what they hold."""
    ours, theirs, inputs = build(case)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for method, arguments in CONVERSIONS:
            kept = []
            for layer in ours, theirs:
                before = layer.state_dict(keep_vars=True)
                after = getattr(layer, method)(**arguments).state_dict(keep_vars=True)
                kept.append([(n, after[n] is before[n], after[n].dtype, after[n].device) for n in before])
            assert kept[0] == kept[1]
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for layer in ours, theirs:
        layer.reset_parameters()
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
