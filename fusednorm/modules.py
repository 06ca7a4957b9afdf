"""Drop-in modules: BatchNorm subclasses with an activation and a dropout as real children.

The children say what to compute: forward reads their types, parameters and `training` flags each time, so everything
people do to a stock `nn.Dropout` (schedules on `p`, `m.eval(); m.drop.train()`) works here. Children that the operator
does not know exactly (subclasses, hooks, parametrisations) are called, one after the other, after the fused norm.
"""

from torch import nn

from . import functional, reference

_DEFAULT_ORDER = "norm-act-drop"

# Exact type -> (operator's name, parameters) from a live module.
_ACTIVATIONS = {
    nn.Identity: lambda m: ("identity", ()),
    nn.ReLU: lambda m: ("relu", ()),
    nn.LeakyReLU: lambda m: ("leaky_relu", (m.negative_slope,)),
    nn.ELU: lambda m: ("elu", (m.alpha,)),
    nn.GELU: lambda m: reference.resolve_activation(("gelu", m.approximate)),
    nn.SiLU: lambda m: ("silu", ()),
    nn.Tanh: lambda m: ("tanh", ()),
    nn.Sigmoid: lambda m: ("sigmoid", ()),
    nn.Hardtanh: lambda m: ("hardtanh", (m.min_val, m.max_val)),
    nn.ReLU6: lambda m: ("relu6", ()),
    nn.Hardswish: lambda m: ("hardswish", ()),
    nn.Mish: lambda m: ("mish", ()),
    nn.Softplus: lambda m: ("softplus", (m.beta, m.threshold)),
}
# Operator's name -> module, for act given by name.
_MODULES = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardtanh": nn.Hardtanh,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
}
# Exact type -> granularity, and the input rank at which the stock module drops whole (n, c) maps. At other ranks it
# means something else (nn.Dropout1d on (N, C) drops rows), and is called.
_DROPS = {
    nn.Dropout: ("element", (2, 3, 4, 5)),
    nn.Dropout1d: ("channel", (3,)),
    nn.Dropout2d: ("channel", (4,)),
    nn.Dropout3d: ("channel", (5,)),
}


def _is_plain(module):
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _make_act(act):
    if act is None or isinstance(act, nn.Module):
        return act
    name, parameters = reference.resolve_activation(act)
    return _MODULES[name](*parameters)


def _make_drop(drop):
    if drop is None or isinstance(drop, nn.Module):
        return drop
    if isinstance(drop, bool) or not isinstance(drop, (int, float)):
        raise ValueError(f"drop: expected a probability, a module or None, but got {drop!r}")
    return nn.Dropout(drop)


class _FusedBatchNorm:
    """What the three classes add to their torch base class."""

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        device=None,
        dtype=None,
        *,
        act=None,
        drop=None,
        order=_DEFAULT_ORDER,
        **newer,  # keywords that only a newer torch has (bias=, since 2.13)
    ):
        act, drop = _make_act(act), _make_drop(drop)
        functional._check_order(order)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **newer)
        self.act = act
        self.drop = drop
        self.order = order

    @classmethod
    def from_torch(cls, bn, act=None, drop=None, order=_DEFAULT_ORDER):
        """The fused layer of an existing BatchNorm and the modules that follow it.

        Parameters, buffers and children are shared, not copied: optimizers and references stay valid.

        Args:
            bn: an instance of the torch class that this class extends.
            act, drop: as in the constructor; typically the modules that stood behind `bn`.

        Raises:
            TypeError: `bn` is of another class (or a subclass with behaviour of its own, as SyncBatchNorm).
        """
        base = next(c for c in cls.__mro__ if c in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        if type(bn) not in (base, cls):
            raise TypeError(f"bn: expected {base.__name__}, but got {type(bn).__name__}")
        self = cls(1, bn.eps, bn.momentum, affine=False, track_running_stats=False, act=act, drop=drop, order=order)
        for name in ("num_features", "affine", "track_running_stats"):
            setattr(self, name, getattr(bn, name))
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(bn, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(bn, name))
        self.training = bn.training
        for child, given in ((self.act, act), (self.drop, drop)):
            if child is not None and child is not given:
                child.train(bn.training)
        return self

    def forward(self, input, residual=None, *, seed=None):
        """(N, C, ...) to (N, C, ...): norm, then activation, then dropout.

        Args:
            residual: None; no order with an addition is available.
            seed: of the noise; int, int64 scalar tensor, or None to draw one from torch's generator.

        Raises:
            ValueError: as the torch base class, or a seed where the dropout cannot be fused.
        """
        self._check_input_dim(input)
        if residual is not None:
            raise ValueError(f"residual: expected None for order {self.order!r}")
        name, parameters, p, granularity, rest = self._chain(input.dim())
        if rest and seed is not None:
            raise ValueError(f"seed: expected None, as {type(rest[-1]).__name__} is called and not fused")
        track = self.training and self.track_running_stats
        training = self.training or (self.running_mean is None and self.running_var is None)
        use_running = not training or track
        output = functional.apply(
            input,
            self.running_mean if use_running else None,
            self.running_var if use_running else None,
            self.num_batches_tracked if track else None,
            self.weight,
            self.bias,
            training,
            self.momentum,
            (self.eps, self.order, name, parameters, "bernoulli", p, granularity, 1),
            seed,
        )
        for module in rest:
            output = module(output)
        return output

    def _chain(self, rank):
        """What is fused (activation, parameters, p, granularity) and which children are called afterwards."""
        act, drop = self.act, self.drop
        name, parameters = "identity", ()
        if act is not None:
            read = _ACTIVATIONS.get(type(act))
            if read is None or not _is_plain(act):
                return name, parameters, 0.0, "element", [m for m in (act, drop) if m is not None]
            name, parameters = read(act)
        if drop is None:
            return name, parameters, 0.0, "element", []
        granularity, ranks = _DROPS.get(type(drop), ("element", ()))
        if rank not in ranks or not _is_plain(drop):
            return name, parameters, 0.0, "element", [drop]
        return name, parameters, float(drop.p) if drop.training else 0.0, granularity, []

    def extra_repr(self):
        return f"{super().extra_repr()}, order={self.order!r}"


class FusedBatchNorm1d(_FusedBatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` over (N, C) or (N, C, L), followed by an activation and dropout, in one operator.

    Constructor arguments up to `dtype` are torch's, state dicts are interchangeable, and with `act=None, drop=None`
    it is BatchNorm.

    Args:
        act: an activation's name, `(name, *parameters)`, a module, or None.
        drop: a probability (makes an :class:`torch.nn.Dropout`), a module, or None.
        order: "norm-act-drop".

    Raises:
        ValueError: an unknown activation, a probability outside [0, 1], an unknown order.
    """


class FusedBatchNorm2d(_FusedBatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` over (N, C, H, W), then activation and dropout. See :class:`FusedBatchNorm1d`."""


class FusedBatchNorm3d(_FusedBatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` over (N, C, D, H, W), activation and dropout. See :class:`FusedBatchNorm1d`."""
