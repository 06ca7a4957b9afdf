"""`fold`: BatchNorms of an evaluated model in the weights of the convolution or linear layer beside them.

With s = weight / sqrt(running_var + eps) and t = bias - running_mean * s, a norm behind a layer makes W * s_o of its
weight and b * s_o + t_o of its bias; one ahead makes W * s_i, and b + sum W t_i. There zero padding is an obstacle:
the norm never shifts the zeros, and what its t gives is less at the border. A map of what it gives is added then.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import _children, modules
from . import foreign
from .chains import NORMS, kind, outermost
from .compare import differ
from .record import Call, Record, observe
from .report import Report, Row
from .rewire import replace
from .study import study

_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_LINEAR = *_CONVOLUTIONS, *_TRANSPOSED, nn.Linear

Into: TypeAlias = tuple[Any, bool] | str  # the layer that takes a norm in, and whether the norm is behind; or why none


class ShiftedConv(nn.Module):
    """A convolution with zero padding, and what each tap gives of its own where it does not fall on the padding.

    Args:
        conv: the convolution.
        taps: (C_out, 1, *kernel_size).

    Shape: that of `conv`.
    """

    def __init__(self, conv: Any, taps: Tensor) -> None:
        super().__init__()
        same = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        self.conv = conv
        self.border = type(conv)(1, len(taps), *same, bias=False, device="meta")
        self.border.weight = nn.Parameter(taps, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input) + self.border(torch.ones_like(input[:1, :1]))  # type: ignore[no-any-return]


def fold(model: nn.Module, example: Any = None, *, inplace: bool = False) -> nn.Module:
    """An evaluated model with its BatchNorms folded into convolutions and linear layers, for deployment.

    A norm goes into the layer that it follows, or else into the one that follows it, where what stands between them
    has no other use; an activation between them ends it. Of a fused layer the activation stays, as a stock module.
    Outputs are those of `model.eval()` up to rounding: with an example the folded model is tried, and all is as it was
    where it gives anything else.

    Args:
        model: in evaluation: a norm that is training is left as it is.
        example: as in :func:`fuse`; without one, only what follows one another in an nn.Sequential is found, and
            convolutions are taken to be given batches.
        inplace: change `model` itself. Its weights are changed then.

    Returns:
        The model; its `fusednorm_report` says of each BatchNorm where it went, or why it stayed.

    Raises:
        TypeError: `model` is no module, is scripted or compiled.
        ValueError: `model` is lazy, and has seen no input yet.
        What the model raises with `example`; it is unchanged then.
    """
    model, names, record = study(model, example, inplace, _is_leaf)
    weights = [weight for module in model.modules() for weight in module._parameters.values() if weight is not None]
    norms = [m for m in outermost(model) if kind(m) in ("norm", "whole") or isinstance(m, modules._FusedBatchNorm)]
    opened = {id(norm): foreign.opened(norm) for norm in norms}
    found = {id(norm): _into(record, weights, norm, opened[id(norm)]) for norm in norms}
    original, held = model, [(module, module._parameters.copy(), module._modules.copy()) for module in model.modules()]
    model = _folded(model, norms, opened, found)
    folded = [names[id(norm)] for norm in norms if isinstance(found[id(norm)], tuple)]
    wrong = _found_wrong(model, example, record, folded) if folded and example is not None else None
    if wrong is not None:
        for module, parameters, children in held:
            module._parameters.update(parameters)
            module._modules.update(children)
        model, found = original, {norm: into if isinstance(into, str) else wrong for norm, into in found.items()}
    rows = []
    for norm in norms:
        into = found[id(norm)]
        name = names[id(norm)]
        rows.append(Row(name, None, (), into) if isinstance(into, str) else Row(name, "folded", (names[id(into[0])],)))
    model.fusednorm_report = Report(rows, done="folded")  # type: ignore[assignment]
    return model


def _folded(
    model: nn.Module, norms: Sequence[nn.Module], opened: Mapping[int, Any], found: Mapping[int, Into]
) -> nn.Module:
    # Those behind a layer first: they scale what a map of the border adds, too.
    for norm in sorted(norms, key=lambda norm: isinstance(into := found[id(norm)], tuple) and not into[1]):
        into = found[id(norm)]
        if not isinstance(into, str):
            layer, behind = into
            if behind:
                _fold_behind(layer, opened[id(norm)])
            else:
                model = _fold_ahead(model, layer, opened[id(norm)])
            model = replace(model, norm, _left_of(opened[id(norm)]))
    return model


def _found_wrong(model: nn.Module, example: Any, stock: Record, folded: Sequence[str]) -> str | None:
    """Why the model is not to be folded, if a forward of what it would be shows that."""
    try:
        found = observe(model, example, _is_leaf)
    except Exception as error:  # of the model: it looked at what it calls
        return f"the model's own code fails without {_all(folded)}: {error}"
    if not all(found.calls_of(model.get_submodule(name)) for name in folded):
        return f"the model calls {_all(folded)} by a reference of its own"
    return f"the model gives something else without {_all(folded)}" if differ(stock.values, found.values) else None


def _all(norms: Sequence[str]) -> str:
    return "it" if len(norms) == 1 else "it or others"  # and which of them is to blame cannot be told


def _is_leaf(module: nn.Module) -> bool:
    return kind(module) is not None or type(module) in _LINEAR


def _into(record: Record, weights: Sequence[Tensor], called: nn.Module, norm: Any) -> Into:
    """The layer that takes the norm in, and whether the norm is behind it; or why there is none.

    Args:
        called: the norm as it stands in the model.
    """
    own = record.calls_of(called)
    if len(own) != 1:
        return "it is called several times" if own else record.uncalled
    if norm.running_mean is None:
        return "it has no running statistics"
    if norm.training:
        return "it normalises by the batch: call eval() first"
    ours = isinstance(norm, modules._FusedBatchNorm)
    if not _children._is_plain(called):
        return "it has hooks or a forward of its own"
    if any(record.reads(tensor) for tensor in (*called.parameters(), *called.buffers())):
        return "the model reads its tensors elsewhere, too"
    if ours and norm.drop is not None and norm.drop.training:
        return "its dropout is live"
    if ours and norm.domains > 1:
        return "it has several domains"
    order = norm.order.split("-") if ours else ["norm"]
    if "add" in order:
        return "it adds"
    stages = [stage for stage in order if stage == "norm" or getattr(norm, stage) is not None]
    reason = "no convolution or linear layer beside it"
    (call,) = own
    if stages[0] == "norm" and len(call.takes) == 1:
        maker = record.makers.get(call.takes[0])
        if maker is not None and type(maker.what) in _LINEAR:
            if len(record.takers[call.takes[0]]) > 1 or call.takes[0] in record.results:
                reason = "what the layer ahead of it gives has other uses"
            elif (problem := _unfit(record, weights, maker.what, norm, True)) is not None:
                reason = problem
            else:
                return maker.what, True
    if stages[-1] == "norm" and len(call.gives) == 1 and not (ours and len(stages) > 1):
        takers = record.takers[call.gives[0]]
        layer = takers[0].what if len(takers) == 1 else None
        if type(layer) in (*_CONVOLUTIONS, nn.Linear) and call.gives[0] not in record.results:
            return (
                _unfit(record, weights, layer, norm, False) or _does_not_pay(layer, norm, takers[0]) or (layer, False)
            )
    return reason


def _unfit(record: Record, weights: Sequence[Tensor], layer: Any, norm: Any, behind: bool) -> str | None:
    """Why a layer cannot take a norm in, which is behind it or ahead."""
    name = type(layer).__name__
    likes = record.calls_of(layer)[0].likes
    if isinstance(layer, nn.Linear):
        if likes is None:
            return "without an example it cannot be told whether the features of the Linear beside it are its channels"
        channels = layer.out_features if behind else layer.in_features
    else:
        channels = layer.out_channels if behind else layer.in_channels
    # A convolution of one sample, without a batch, has as many dimensions as its norm, but not the same.
    if likes is not None:
        elsewhere = len(likes[0].shape) != layer.weight.dim()
    else:
        elsewhere = any(isinstance(norm, stock) and not name.endswith(rank) for stock, rank in NORMS.items())
    if elsewhere or channels != norm.num_features:
        return f"the {name} beside it has its features in another dimension"
    if len(record.calls_of(layer)) > 1:
        return f"the {name} beside it is called several times"
    if layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "parametrizations"):
        return f"the {name} beside it has hooks or parametrisations"
    if {"forward", "_conv_forward"} & vars(layer).keys():
        return f"the {name} beside it has a forward of its own"
    own = [weight for weight in (layer.weight, layer.bias) if weight is not None]
    if any(sum(w is weight for w in weights) > 1 or record.reads(weight) for weight in own):
        return f"the {name} beside it has a weight that is not its alone"
    return None


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _pads_with_zeros(layer: Any) -> bool:
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def _shifts(shift: Tensor) -> bool:
    """Whether a norm makes something else of zeros; of values that are not known, it may."""
    return shift.is_meta or bool(shift.any())


def _does_not_pay(layer: Any, norm: Any, call: Call) -> str | None:
    """Why a norm ahead of a convolution with zero padding stays: the map is a pass over the output."""
    if not _pads_with_zeros(layer) or not _shifts(_scale_and_shift(norm)[1]):
        return None
    if call.likes is None:
        return "the convolution behind it pads with zeros, and without an example it cannot be told whether that pays"
    if call.likes[1].numel >= call.likes[0].numel:
        return "the convolution behind it pads with zeros; to correct the border would cost as much as the norm"
    return None


def _fold_behind(layer: Any, norm: Any) -> None:
    scale, shift = _scale_and_shift(norm)
    weight = layer.weight.detach().double()
    if isinstance(layer, _TRANSPOSED):  # (inputs, outputs of a group, taps)
        taps = [1] * (weight.dim() - 2)
        groups = weight.view(layer.groups, -1, *weight.shape[1:])
        scaled = (groups * scale.view(layer.groups, 1, -1, *taps)).view_as(weight)
    else:
        scaled = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    _set(layer, scaled, shift if layer.bias is None else layer.bias.detach().double() * scale + shift)


def _fold_ahead(model: nn.Module, layer: Any, norm: Any) -> nn.Module:
    scale, shift = _scale_and_shift(norm)
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Linear):
        given = weight @ shift
        scaled = weight * scale
    else:
        groups, (out, inside, *kernel) = layer.groups, weight.shape
        by_input = [groups, 1, inside, *[1] * len(kernel)]  # (groups, outputs, inputs, taps) has a channel's factor
        grouped = weight.view(groups, out // groups, inside, *kernel)
        scaled = (grouped * scale.view(by_input)).view_as(weight)
        taps = (grouped * shift.view(by_input)).sum(2).view(out, 1, *kernel)
        given = taps.flatten(1).sum(1)
    old = None if layer.bias is None else layer.bias.detach().double()
    if _pads_with_zeros(layer) and _shifts(shift):
        _set(layer, scaled, old)
        return replace(model, layer, ShiftedConv(layer, taps.to(layer.weight)))
    _set(layer, scaled, given if old is None else old + given)
    return model


def _set(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    like = layer.weight
    layer.weight = nn.Parameter(weight.to(like), like.requires_grad)
    layer.bias = None if bias is None else nn.Parameter(bias.to(like), like.requires_grad)


def _left_of(norm: Any) -> nn.Module:
    """What stays where a norm was: the activation of a fused layer."""
    act = norm.act if isinstance(norm, modules._FusedBatchNorm) else None
    return (act if act is not None else nn.Identity()).train(norm.training)
