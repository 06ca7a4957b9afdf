"""Drop-in modules: BatchNorm subclasses with an activation and a dropout as real children, in any order.

The children say what to compute: forward reads their types, parameters and `training` flags each time, so everything
people do to a stock `nn.Dropout` (schedules on `p`, `m.eval(); m.drop.train()`) works here. Children that the operator
does not know exactly (subclasses, hooks, parametrisations) are called; what stands between them and the norm is fused.
"""

from torch import nn

from . import functional, reference
from .noises import DropPath, GaussianDropout, UniformDropout

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
    nn.PReLU: lambda m: ("prelu", (m.weight,)),
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
    "prelu": nn.PReLU,
}
# Exact type -> (kind, strength, granularity) of a live module, and the input ranks at which it means that: torch's
# modules for channels mean something else at other ranks (nn.Dropout1d on (N, C) drops rows), and are called.
_ANY_RANK = (2, 3, 4, 5)
_DROPS = {
    nn.Dropout: (lambda m: ("bernoulli", m.p, "element"), _ANY_RANK),
    nn.Dropout1d: (lambda m: ("bernoulli", m.p, "channel"), (3,)),
    nn.Dropout2d: (lambda m: ("bernoulli", m.p, "channel"), (4,)),
    nn.Dropout3d: (lambda m: ("bernoulli", m.p, "channel"), (5,)),
} | {
    noise: (lambda m: (m.kind, m.strength, m.granularity), _ANY_RANK)
    for noise in (UniformDropout, GaussianDropout, DropPath)
}


_NO_NOISE = ("bernoulli", 0.0, "element")


def _is_plain(module):
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _make_act(act, device=None, dtype=None):
    if act is None or isinstance(act, nn.Module):
        return act
    if act == "prelu":
        return nn.PReLU(device=device, dtype=dtype)
    name, parameters = reference.resolve_activation(act)
    if name == "prelu":
        raise ValueError("act: expected nn.PReLU(...) or 'prelu', as a layer has the weight as its own parameter")
    return _MODULES[name](*parameters)


def _make_drop(drop):
    if isinstance(drop, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
        raise TypeError(
            f"drop: expected a multiplicative noise, but {type(drop).__name__} adds as well, and keeps the variance of "
            "selu's output only"
        )
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
        order=functional.DEFAULT_ORDER,
        ghost_batch_size=None,
        eval_matched_stats=False,
        **newer,  # keywords that only a newer torch has (bias=, since 2.13)
    ):
        act, drop = _make_act(act, device, dtype), _make_drop(drop)
        before, after = reference.parse_order(order)
        for name, child in (("act", act), ("drop", drop)):
            if child is not None and name not in before + after:
                raise ValueError(f"{name}: expected None, as order {order!r} has no {name!r}")
        functional.check_ghost_batch_size(ghost_batch_size)
        if eval_matched_stats and "drop" not in before:
            raise ValueError(f"eval_matched_stats: expected False, as order {order!r} has no 'drop' before 'norm'")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **newer)
        self.act = act
        self.drop = drop
        self.order = order
        self.ghost_batch_size = ghost_batch_size
        self.eval_matched_stats = eval_matched_stats

    _torch_classes = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    @classmethod
    def from_torch(cls, bn, act=None, drop=None, order=functional.DEFAULT_ORDER, **options):
        """The fused layer of an existing BatchNorm and the modules around it.

        Parameters, buffers and children are shared, not copied: optimizers and references stay valid.

        Args:
            bn: an instance of the torch class that this class extends.
            act, drop, order: as in the constructor; typically the modules that stood around `bn`.
            options: `ghost_batch_size`, `eval_matched_stats`.

        Raises:
            TypeError: `bn` is of another class (or a subclass with behaviour of its own, as SyncBatchNorm).
        """
        like = next((t for t in (getattr(bn, n, None) for n in ("weight", "running_mean")) if t is not None), None)
        place = {} if like is None else {"device": like.device, "dtype": like.dtype}
        own = cls(1, affine=False, track_running_stats=False, act=act, drop=drop, order=order, **place, **options)
        return own._adopt(bn, act, drop)

    def _adopt(self, bn, *given):
        classes = [c for c in self._torch_classes if isinstance(self, c)] or self._torch_classes
        if type(bn) not in classes:
            expected = " or ".join(c.__name__ for c in classes)
            raise TypeError(f"bn: expected {expected}, but got {type(bn).__name__}")
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            setattr(self, name, getattr(bn, name))
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(bn, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(bn, name))
        self.training = bn.training
        for child in (self.act, self.drop):
            if child is not None and not any(child is g for g in given):
                child.train(bn.training)
        return self

    def forward(self, input, residual=None, *, seed=None):
        """(N, C, ...) to (N, C, ...): the stages of `order`.

        Args:
            residual: (N, C, ...) of the input's dtype, what "add" adds; needed exactly for an order with "add".
            seed: of the noise; int, int64 scalar tensor, or None to draw one from torch's generator.

        Raises:
            ValueError: as the torch base class; a residual that is missing or not expected; a seed, or
                `eval_matched_stats`, where the dropout cannot be fused.
        """
        self._check_input_dim(input)
        before, after = reference.parse_order(self.order)
        if (residual is not None) != ("add" in after):
            expected = "a tensor" if "add" in after else "None"
            raise ValueError(f"residual: expected {expected} for order {self.order!r}")
        act, drop = self._read_act(), self._read_drop(input.dim())
        order, called = self.order, ()
        if act is None or drop is None:
            first, last = self._fusable(before, after, act is not None, drop is not None)
            order = "-".join([*before[first:], "norm", *after[:last]])
            called = before[:first] + after[last:]
            if "drop" in called and self.drop is not None:
                if seed is not None:
                    raise ValueError(f"seed: expected None, as {type(self.drop).__name__} is called and not fused")
                if self.eval_matched_stats and self.training and "drop" in before:
                    raise ValueError(
                        f"eval_matched_stats: expected False, as {type(self.drop).__name__} is called and not fused"
                    )
            for stage in before[:first]:
                child = getattr(self, stage)
                if child is not None:
                    input = child(input.clone() if getattr(child, "inplace", False) else input)
            after = after[last:]
        name, parameters = act if act is not None and "act" not in called else ("identity", ())
        act_weight, parameters = (parameters[0], ()) if name == "prelu" else (None, parameters)
        kind, p, granularity = drop if drop is not None and "drop" not in called else _NO_NOISE
        track = self.training and self.track_running_stats
        training = self.training or (self.running_mean is None and self.running_var is None)
        use_running = not training or track
        chain = (self.eps, order, name, parameters, kind, p, granularity, self.ghost_batch_size or 0)
        output = functional.apply(
            input,
            self.running_mean if use_running else None,
            self.running_var if use_running else None,
            self.num_batches_tracked if track else None,
            self.weight,
            self.bias,
            training,
            0.0 if self.momentum is None and self.num_batches_tracked is None else self.momentum,  # as torch has it
            functional.Chain(*chain),
            seed,
            residual if "add" in order else None,
            act_weight,
            self.eval_matched_stats,
        )
        for stage in after if called else ():
            if stage == "add":
                if residual.shape != output.shape or residual.dtype != output.dtype:
                    raise ValueError(
                        f"residual: expected shape {list(output.shape)} of {output.dtype}, but got "
                        f"{list(residual.shape)} of {residual.dtype}"
                    )
                output = output + residual
            elif getattr(self, stage) is not None:
                output = getattr(self, stage)(output)
        return output

    @staticmethod
    def _fusable(before, after, act, drop):
        """The stages around the norm that are fused, before[first:] and after[:last]: as far as children can be."""
        can = {"act": act, "drop": drop, "add": True}
        first, last = len(before), 0
        while first > 0 and can[before[first - 1]]:
            first -= 1
        while last < len(after) and can[after[last]]:
            last += 1
        return first, last

    def _no_place(self, stage):  # the constructor refuses it, too
        return ValueError(f"{stage}: expected None, as order {self.order!r} has no {stage!r}")

    def _read_act(self):
        """(name, parameters) as the operator takes them, or None: it has to be called."""
        act = self.act
        if act is None:
            return "identity", ()
        if "act" not in self.order:
            raise self._no_place("act")
        read = _ACTIVATIONS.get(type(act))
        return read(act) if read is not None and _is_plain(act) else None

    def _read_drop(self, rank):
        """(kind, strength, granularity) as the operator takes them, or None: it has to be called."""
        drop = self.drop
        if drop is None:
            return _NO_NOISE
        if "drop" not in self.order:
            raise self._no_place("drop")
        read, ranks = _DROPS.get(type(drop), (None, ()))
        if rank not in ranks or not _is_plain(drop):
            return None
        kind, strength, granularity = read(drop)
        return kind, float(strength) if drop.training else 0.0, granularity

    def extra_repr(self):
        ghost = f", ghost_batch_size={self.ghost_batch_size}" if self.ghost_batch_size else ""
        matched = ", eval_matched_stats=True" if self.eval_matched_stats else ""
        return f"{super().extra_repr()}, order={self.order!r}{ghost}{matched}"


class FusedBatchNorm1d(_FusedBatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` over (N, C) or (N, C, L) with activation, noise and addition, in one call.

    Constructor arguments up to `dtype` are torch's, state dicts are interchangeable, and with `act=None, drop=None`
    it is BatchNorm.

    Args:
        act: an activation's name, `(name, *parameters)`, a module, or None.
        drop: a probability (makes an :class:`torch.nn.Dropout`), a module, or None. Fused are torch's Dropout and
            Dropout1d/2d/3d, and :class:`UniformDropout`, :class:`GaussianDropout` and :class:`DropPath`.
        order: "norm", with "act" and "drop" before or after it, and "add" after it, which adds the second argument of
            forward; joined by "-". "act-norm-drop" is the IC layer of Chen et al. (arXiv 1905.05928) after a ReLU.
        ghost_batch_size: statistics are taken over so many samples at a time, as by a BatchNorm called chunk by chunk
            (Hoffer et al. 2017); None: over the whole batch.
        eval_matched_stats: in an order with "drop" before "norm", the running statistics learn the values without the
            noise, which are what evaluation sees: no variance shift (Li et al., arXiv 1801.05134) in this layer.

    Raises:
        ValueError: an unknown activation, a probability outside [0, 1], an order that is none, an `act` or `drop` that
            the order has no place for.
        TypeError: a noise that is not multiplicative (alpha dropout).
    """


class FusedBatchNorm2d(_FusedBatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` over (N, C, H, W), and more around it. See :class:`FusedBatchNorm1d`."""


class FusedBatchNorm3d(_FusedBatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` over (N, C, D, H, W), and more around it. See :class:`FusedBatchNorm1d`."""


class ICLayer(_FusedBatchNorm, nn.modules.batchnorm._BatchNorm):
    """BatchNorm and dropout before a weight layer: the independent-component layer of Chen et al. (arXiv 1905.05928).

    Shape: (N, C) to (N, C, D, H, W); output like input.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm1d`.
        p: a probability or a dropout module; the paper's 0.05.

    Raises:
        ValueError: p outside [0, 1]; an input of other dimensions.
    """

    def __init__(
        self,
        num_features,
        p=0.05,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        device=None,
        dtype=None,
        **newer,
    ):
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, drop=p, order="norm-drop", **newer
        )

    @classmethod
    def from_torch(cls, bn, p=0.05):
        """The layer of an existing BatchNorm1d, 2d or 3d, whose parameters and buffers it shares.

        Raises:
            TypeError: `bn` is of another class.
        """
        return cls(1, p, affine=False, track_running_stats=False)._adopt(bn, p)

    def _check_input_dim(self, input):
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input)")
