"""Public models with their BatchNorms, activations and residual additions fused, as a user would convert them by hand.

Where the modules stand in a row, `FusedBatchNorm*d.from_torch` takes them over and nn.Identity stays in their place.
Where a block's own code joins them, the block gets a forward that says the same with one call less.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fusednorm

_RANKS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
_ACTS = nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.GELU


def _fused(norm: nn.Module, act: nn.Module | None = None, order: str = "norm-act-drop") -> nn.Module:
    layer = getattr(fusednorm, f"FusedBatchNorm{_RANKS[type(norm)]}d")
    return layer.from_torch(norm, act=act, order=order)


def _fuse(module: nn.Module, norm: str, act: str) -> None:
    """Two attributes that the module calls one after the other."""
    setattr(module, norm, _fused(getattr(module, norm), getattr(module, act)))
    setattr(module, act, nn.Identity())


def _rows(model: nn.Module) -> None:
    """Norm and activation side by side in any nn.Sequential."""
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            names = list(module._modules)
            for norm, act in zip(names, names[1:], strict=False):
                if type(getattr(module, norm)) in _RANKS and isinstance(getattr(module, act), _ACTS):
                    _fuse(module, norm, act)


def _rest(model: nn.Module) -> None:
    """What no activation follows is fused all the same: one kernel for the statistics and the values."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in _RANKS:
                setattr(module, name, _fused(child))


def resnet(model: nn.Module) -> None:
    """torchvision's, or an encoder made of it."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    class FusedBasicBlock(BasicBlock):
        def forward(self, x):
            identity = x if self.downsample is None else self.downsample(x)
            return self.bn2(self.conv2(self.bn1(self.conv1(x))), identity)

    class FusedBottleneck(Bottleneck):
        def forward(self, x):
            identity = x if self.downsample is None else self.downsample(x)
            out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
            return self.bn3(self.conv3(out), identity)

    for module in list(model.modules()):
        if isinstance(module, ResNet):
            _fuse(module, "bn1", "relu")
        elif isinstance(module, (BasicBlock, Bottleneck)):
            last = "bn2" if isinstance(module, BasicBlock) else "bn3"
            for name in ("bn1", "bn2", "bn3"):
                if hasattr(module, name):
                    order = "norm-add-act" if name == last else "norm-act-drop"
                    setattr(module, name, _fused(getattr(module, name), module.relu, order))
            module.relu = nn.Identity()
            module.__class__ = FusedBasicBlock if isinstance(module, BasicBlock) else FusedBottleneck
    _rows(model)
    _rest(model)


def densenet(model: nn.Module) -> None:
    """The last norm stays alone, as the model's own code has its activation."""
    for module in list(model.modules()):
        for i in ("", 0, 1, 2):
            if type(getattr(module, f"norm{i}", None)) in _RANKS and hasattr(module, f"relu{i}"):
                _fuse(module, f"norm{i}", f"relu{i}")
    _rest(model)


def googlenet(model: nn.Module) -> None:
    from torchvision.models.googlenet import BasicConv2d

    class FusedConv2d(BasicConv2d):
        def forward(self, x):
            return self.bn(self.conv(x))

    for module in list(model.modules()):
        if isinstance(module, BasicConv2d):
            module.bn = _fused(module.bn, nn.ReLU())
            module.__class__ = FusedConv2d


def yolo(model: nn.Module) -> None:
    from ultralytics.nn.modules.block import Bottleneck
    from ultralytics.nn.modules.conv import Conv

    class FusedBottleneck(Bottleneck):
        def forward(self, x):
            return self.cv2.bn(self.cv2.conv(self.cv1(x)), x)

    blocks = [module for module in model.modules() if type(module) is Bottleneck and module.add]
    ends = [block.cv2 for block in blocks]
    for module in list(model.modules()):
        if isinstance(module, Conv):
            module.bn = _fused(module.bn, module.act, "norm-act-add" if module in ends else "norm-act-drop")
            module.act = nn.Identity()
    for block in blocks:
        block.__class__ = FusedBottleneck


def ecapa(model: nn.Module) -> None:
    """Its blocks have the activation ahead of the norm."""
    from speechbrain.lobes.models.ECAPA_TDNN import TDNNBlock

    for module in list(model.modules()):
        if isinstance(module, TDNNBlock):
            # speechbrain wraps torch's layer.
            module.norm.norm = _fused(module.norm.norm, module.activation, "act-norm")
            module.activation = nn.Identity()
    _rest(model)


def leftovers(model: nn.Module) -> int:
    """BatchNorms that no conversion reached."""
    return sum(isinstance(m, _BatchNorm) and not _is_ours(m) for m in model.modules())


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fusednorm")


def compare(stock: nn.Module, ours: nn.Module, inputs: tuple[torch.Tensor, ...], loss) -> float:
    """Largest difference of outputs, trained and evaluated, and of gradients, each in units of its largest value.

    To be called with models in float64, where rounding does not hide a wrong conversion. Dropouts are switched off.
    """
    found = []
    for training in (True, False):
        each = []
        for model in (stock, ours):
            model.train(training).zero_grad()
            for module in model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.p = 0.0
            value, outputs = loss(model, inputs)
            if training:
                value.backward()
                outputs = [*outputs, *(p.grad for p in model.parameters() if p.grad is not None)]
            each.append([tensor.detach() for tensor in outputs])
        # Beside the largest of all: a gradient that is zero but for rounding (a bias ahead of a softmax) has no scale.
        least = 1e-6 * max(tensor.abs().amax() for tensor in each[0])
        found += [(b - a).abs().amax() / a.abs().amax().clamp_min(least) for a, b in zip(*each, strict=True)]
    return max(map(float, found))
