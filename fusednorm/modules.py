"""Drop-in modules: BatchNorm subclasses with an activation and a dropout as real children, in any order.

The children say what to compute: forward reads their types, parameters and `training` flags each time, so everything
people do to a stock `nn.Dropout` (schedules on `p`, `m.eval(); m.drop.train()`) works here. Children that the operator
does not know exactly (subclasses, hooks, parametrisations) are called; what stands between them and the norm is fused.
"""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.module import register_module_module_registration_hook

from . import _children, _domains, _rows, functional, reference
from ._guard import guarded, means_norm_alone
from ._unfused import AnyBatchNorm, unfused

Act: TypeAlias = str | tuple[str | float | Tensor, ...] | nn.Module | None
Drop: TypeAlias = float | nn.Module | None
Seed: TypeAlias = int | Tensor | None


class _Newer(TypedDict, total=False):
    """Keywords that only a newer torch has."""

    bias: bool  # since 2.13


class _Asked(NamedTuple):
    """What a call says of rows and statistics."""

    valid: Tensor | None = None  # rows that count, and
    weights: Tensor | None = None  # how much, as functional.apply takes them
    domain: Any = None  # whose statistics; None: the layer's own


_NOTHING = _Asked()


class _Options(TypedDict, total=False):
    order: str
    ghost_batch_size: int | None
    even_ghost_batches: bool
    eval_matched_stats: bool
    allow_single_value: bool
    update_when_recomputed: bool
    process_group: Any
    renorm: tuple[float, float] | None
    global_noise: bool


class _FusedBatchNorm(_BatchNorm):
    """What all the layers add to their torch base class."""

    order: str
    ghost_batch_size: int | None
    even_ghost_batches: bool = False
    eval_matched_stats: bool
    allow_single_value: bool = False
    update_when_recomputed: bool = True
    process_group: Any = None
    renorm: tuple[float, float] | None = None
    global_noise: bool = False
    training: bool
    frozen: bool = False  # see freeze()
    _in_model = False  # whether another module has it as a child

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: functional.Device = None,
        dtype: torch.dtype | None = None,
        *,
        act: Act = None,
        drop: Drop = None,
        order: str = functional.DEFAULT_ORDER,
        ghost_batch_size: int | None = None,
        even_ghost_batches: bool = False,
        eval_matched_stats: bool = False,
        allow_single_value: bool = False,
        update_when_recomputed: bool = True,
        process_group: Any = None,
        renorm: tuple[float, float] | None = None,
        global_noise: bool = False,
        domains: int = 1,
        domain_affine: bool = False,
        **newer: Unpack[_Newer],
    ) -> None:
        if isinstance(eps, (str, nn.Module)):
            raise TypeError(f"eps: expected a number, but got {eps!r}; an activation is given by name, as act={eps!r}")
        act, drop = _children.make_act(act, device, dtype), _children.make_drop(drop)
        before, after = reference.parse_order(order)
        for name, child in (("act", act), ("drop", drop)):
            if child is not None and name not in before + after:
                raise ValueError(f"{name}: expected None, as order {order!r} has no {name!r}")
        ghost_batch_size = functional.check_ghost_batch_size(ghost_batch_size)
        if eval_matched_stats and "drop" not in before:
            raise ValueError(f"eval_matched_stats: expected False, as order {order!r} has no 'drop' before 'norm'")
        domains, renorm = _domains.check_domains(domains), functional.check_renorm(renorm)
        if renorm is not None and (ghost_batch_size or not track_running_stats) and num_features:
            name = "ghost_batch_size" if ghost_batch_size else "track_running_stats"
            expected = "None" if ghost_batch_size else "True"
            raise ValueError(f"{name}: expected {expected} with renorm, between a batch's statistics and running ones")
        if not track_running_stats and domains > 1:
            raise ValueError("domains: expected 1 with track_running_stats=False, as each has running statistics")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **newer)
        self.act = act
        self.drop = drop
        self.order = order
        self.ghost_batch_size = ghost_batch_size
        self.even_ghost_batches = even_ghost_batches
        self.eval_matched_stats = eval_matched_stats
        self.allow_single_value = allow_single_value
        self.update_when_recomputed = update_when_recomputed
        self.process_group = process_group
        self.renorm = renorm
        self.global_noise = global_noise
        if domains > 1:
            self.other_domains = nn.ModuleList(
                _domains.DomainStatistics(self, domain_affine) for _ in range(domains - 1)
            )

    if TYPE_CHECKING:

        def __call__(
            self,
            input: Tensor,
            residual: Tensor | None = None,
            *,
            seed: Seed = None,
            mask: Tensor | None = None,
            lengths: Tensor | Sequence[int] | None = None,
            weights: Tensor | None = None,
            domain: int | None = None,
        ) -> Tensor: ...

        # Children, which __setattr__ makes of what the constructor takes.
        @property
        def act(self) -> nn.Module | None: ...
        @act.setter
        def act(self, act: Act) -> None: ...
        @property
        def drop(self) -> nn.Module | None: ...
        @drop.setter
        def drop(self, drop: Drop) -> None: ...

    # ---- what the layer says of itself ------------------------------------------------------------------------------
    _torch_class: type[_BatchNorm] | None = None  # the stock layer, None: that of the input's rank
    eps: float = guarded("eps")
    num_features: int = guarded("num_features")

    def _beside_the_norm(self) -> str:
        """In words, what a bare BatchNorm with this layer's parameters would lack; "" where it lacks nothing."""
        own = self.__dict__
        if "order" not in own:  # still being built
            return ""
        children = [(name, getattr(self, name, None)) for name in ("act", "drop")]
        lost = [f"{name}={child!r}" for name, child in children if _children.does_something(child)]
        lost += ["the addition"] if "add" in own["order"] else []
        lost += [f"ghost_batch_size={self.ghost_batch_size}"] if self.ghost_batch_size else []
        lost += [f"domains={self.domains}"] if self.domains > 1 else []
        lost += [f"renorm={self.renorm}"] if self.renorm is not None and self.training else []
        return ", ".join(lost)

    def extra_repr(self) -> str:
        ghost = f", ghost_batch_size={self.ghost_batch_size}" if self.ghost_batch_size else ""
        flags = [f", {name}={getattr(self, name)}" for name, usual in _FLAGS.items() if getattr(self, name) != usual]
        norm = super().extra_repr()  # type: ignore[no-untyped-call]
        domains = f", domains={self.domains}" if self.domains > 1 else ""
        return f"{norm}, order={self.order!r}{ghost}{domains}{''.join(flags)}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("act", "drop"):
            value = _children.make_act(value) if name == "act" else _children.make_drop(value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in ("act", "drop"):
            setattr(self, name, None)
        else:
            super().__delattr__(name)

    # ---- modes ------------------------------------------------------------------------------------------------------
    def train(self, mode: bool = True) -> Self:
        """As :meth:`torch.nn.Module.train`, children included, for a layer by itself and for the `train()` of a model.

        A model's layer that is picked as a norm is set as one, and its children stay as they are, as with stock
        layers: `for m in model.modules(): if isinstance(m, nn.BatchNorm2d): m.eval()` freezes the statistics and leaves
        the noise on. A frozen layer keeps its statistics in any case.
        """
        # While compiling it is a model's own train(), as far as can be known.
        part = self._in_model and not torch.compiler.is_compiling() and means_norm_alone(self, sys._getframe(1))
        if part:
            self.training = mode
        else:
            super().train(mode)
        if self.frozen:
            self.training = False
        return self

    def eval(self) -> Self:
        """As `train(False)`."""
        return self.train(False)

    def freeze(self) -> Self:
        """Normalises by the running statistics from now on and does not move them, whatever `train()` says.

        Nor do `reset_running_stats()`, as torch's `update_bn` calls it, and :func:`recalibrate`. Activation and noise
        go on as the mode of the children has it; parameters keep their `requires_grad`.
        """
        self.frozen, self.training = True, False
        return self

    def unfreeze(self) -> Self:
        """Ends :meth:`freeze`; the mode is that of the next `train()` or `eval()`."""
        self.frozen = False
        return self

    def reset_running_stats(self) -> None:
        if not self.frozen:
            super().reset_running_stats()
            for statistics in self._others():
                statistics.reset_running_stats()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for statistics in self._modules.get("other_domains", ()):  # type: ignore[union-attr]
            for name, value in (("weight", 1.0), ("bias", 0.0)):
                if name in statistics._parameters:
                    nn.init.constant_(statistics._parameters[name], value)

    # ---- domains ----------------------------------------------------------------------------------------------------
    @property
    def domains(self) -> int:
        """How many sets of running statistics there are."""
        return 1 + len(self._others())

    def _others(self) -> Any:
        return self._modules.get("other_domains", ())

    def domain(self, index: int) -> _BatchNorm:
        """The stock layer of a domain, which shares its statistics and parameters: for state dicts, above all.

        `layer.domain(i).load_state_dict(bn.state_dict())` takes the `i`-th of several stock layers.

        Raises:
            ValueError: a domain that the layer does not have.
        """
        statistics = _domains.pick(self._others(), index)
        norm = self._stock_norm()
        if statistics is not None:
            if "parametrizations" in statistics._modules:
                raise ValueError("domain: expected no parametrisation of it, which the stock layer would lack")
            norm._buffers.update(statistics._buffers)
            norm._parameters.update(statistics._parameters)
        return norm

    # ---- from and to the stock layers -------------------------------------------------------------------------------
    @classmethod
    def from_torch(
        cls,
        bn: nn.Module,
        act: Act = None,
        drop: Drop = None,
        order: str = functional.DEFAULT_ORDER,
        *,
        ghost_batch_size: int | None = None,
        even_ghost_batches: bool = False,
        eval_matched_stats: bool = False,
        allow_single_value: bool = False,
        update_when_recomputed: bool = True,
        process_group: Any = None,
        renorm: tuple[float, float] | None = None,
        global_noise: bool = False,
    ) -> Self:
        """The fused layer of an existing BatchNorm and the modules around it.

        Parameters, buffers and children are shared, not copied: optimizers and references stay valid. Attributes and
        hooks of `bn` are taken over too, forward pre-hooks where the norm comes first. A layer that was compiled by
        itself (`bn.compile()`) is to be compiled again.

        Args:
            bn: an instance of the torch class that this class extends, or, for a lazy class, of the lazy one.
            act, drop, order: as in the constructor; typically the modules that stood around `bn`.
            ghost_batch_size, even_ghost_batches, eval_matched_stats, allow_single_value: as in the constructor.
            update_when_recomputed, process_group, renorm, global_noise: as in the constructor.

        Raises:
            TypeError: `bn` is of another class (or a subclass with behaviour of its own, as SyncBatchNorm).
            ValueError: `bn` has hooks that would see something else than they do now, or a forward or other attributes
                of its own that would stand in the fused layer's way.
        """
        options: dict[str, Any] = {
            "ghost_batch_size": ghost_batch_size,
            "even_ghost_batches": even_ghost_batches,
            "eval_matched_stats": eval_matched_stats,
            "allow_single_value": allow_single_value,
            "update_when_recomputed": update_when_recomputed,
            "process_group": process_group,
            "renorm": renorm,
            "global_noise": global_noise,
        }
        return cls(0, affine=False, track_running_stats=False, order=order, **options)._adopt(bn, act, drop)

    def _adopt(self, bn: nn.Module, act: Act, drop: Drop) -> Self:
        classes = [self._torch_class] if self._torch_class else [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
        if type(bn) not in classes:
            expected = " or ".join(c.__name__ for c in classes)
            lazy = f"; {_LAZY[type(bn)].__name__} takes it" if type(bn) in _LAZY else ""
            raise TypeError(f"bn: expected {expected}, but got {type(bn).__name__}{lazy}")
        like = next((t for t in (getattr(bn, n, None) for n in ("weight", "running_mean")) if t is not None), None)
        place = (None, None) if like is None else (like.device, like.dtype)
        given = act, drop
        act, drop = _children.make_act(act, *place), _children.make_drop(drop)
        for name, child in (("act", act), ("drop", drop)):
            if child is not None and name not in self.order:
                raise self._no_place(name)
        self.act, self.drop = act, drop
        self._check_hooks(bn)
        in_the_way = (_OWN | {"forward"}) & {*bn.__dict__, *bn._modules} - {*self._own_when_adopting}
        if in_the_way:
            raise ValueError(f"bn: expected no attribute of its own that is named {', '.join(sorted(in_the_way))}")
        children = self._modules
        for name, value in bn.__dict__.items():  # parameters, buffers, hooks, and what people put there
            if name not in (*self._own_when_adopting, "_compiled_call_impl"):
                self.__dict__[name] = value.copy() if name in _CONTAINERS else value
        self._modules.update(children)
        for child in (self.act, self.drop):
            if child is not None and not any(child is g for g in given):
                child.train(bn.training)
        return self

    _own_when_adopting: tuple[str, ...] = ()  # attributes that stay

    def _check_hooks(self, layer: nn.Module) -> None:
        """Raises ValueError if a hook of `layer`, to be turned into or made of this one, would see something else."""
        alone = self.act is None and self.drop is None and "add" not in self.order
        for kind, moved in (
            ("forward ", not alone and layer._forward_hooks),
            ("backward ", not alone and (layer._backward_hooks or layer._backward_pre_hooks)),
            ("forward pre-", not self.order.startswith("norm") and layer._forward_pre_hooks),
        ):
            if moved:
                raise ValueError(
                    f"{type(layer).__name__}: expected no {kind}hooks, as the fused layer takes and gives other values "
                    "than its norm; remove them first, and register them anew where they belong"
                )

    def to_torch(self) -> nn.Module:
        """The stock modules of this layer, sharing parameters, buffers and children: what `from_torch` began with.

        Returns:
            `nn.Sequential` of BatchNorm, activation and dropout in this layer's order; a small module in plain torch,
            called with the residual if there is one, for what a Sequential cannot say: "add", ghost batches,
            `eval_matched_stats`. Noises that torch has no module for become one that draws by torch's generators.
            `freeze()`, `allow_single_value`, `update_when_recomputed`, `process_group`, `global_noise` and `renorm` are
            left behind.

        Raises:
            ValueError: the layer has several domains (see :meth:`domain`), is lazy and has seen no input yet, or has
                hooks that would see something else, or a forward of its own.
        """
        if isinstance(self, _LazyNormBase):
            raise ValueError("to_torch: expected a layer that knows its size; call the model once before")
        if self.domains > 1:
            raise ValueError("to_torch: expected a layer with one domain; the stock layer of each is layer.domain(i)")
        self._check_hooks(self)
        if "forward" in self.__dict__:
            raise ValueError(f"{type(self).__name__}: expected no forward of its own, which no stock module would have")
        norm = self._stock_norm()
        return unfused(norm, self.act, self.drop, **{name: getattr(self, name) for name in _OPTIONS})

    def _stock_norm(self) -> _BatchNorm:
        stock = self._torch_class or AnyBatchNorm
        norm = stock.__new__(stock)
        beside = {*_OWN, "_compiled_call_impl"}
        norm.__dict__.update(
            {n: v.copy() if n in _CONTAINERS else v for n, v in self.__dict__.items() if n not in beside}
        )
        for name in ("act", "drop", "other_domains"):
            norm._modules.pop(name, None)
        return norm

    def __prepare_scriptable__(self) -> nn.Module:  # torch.jit.script asks
        return self.to_torch()

    # ---- the call ---------------------------------------------------------------------------------------------------
    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        seed: Seed = None,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        weights: Tensor | None = None,
        domain: int | None = None,
    ) -> Tensor:
        """(N, C, ...) to (N, C, ...): the stages of `order`.

        Args:
            residual: what "add" adds, (N, C, ...); needed exactly for an order with "add".
            seed: of the noise; int, int64 scalar tensor, or None to draw one from torch's generator.
            mask, lengths, weights: the rows that count, and how much, as
                :func:`fusednorm.functional.batch_norm_act_drop` takes them.
            domain: which of the layer's `domains` the input is of; needed exactly where there are several.

        Raises:
            ValueError: as the torch base class; a residual that is missing or not expected; a seed, or
                `eval_matched_stats`, where the dropout cannot be fused; rows as in the functional; a domain that the
                layer does not have.
        """
        if isinstance(input, torch.fx.Proxy):
            rows = {"mask": mask, "lengths": lengths, "weights": weights}
            return functional.leaf_of_graph(self, input, residual, seed=seed, **rows, domain=domain)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        before, after = reference.parse_order(self.order)
        if (residual is not None) != ("add" in after):
            expected = "a tensor" if "add" in after else "None"
            raise ValueError(f"residual: expected {expected} for order {self.order!r}")
        children: dict[str, Any] = self._modules  # as in _fused
        act, drop = children.get("act"), children.get("drop")
        if act is not None and "act" not in self.order:
            raise self._no_place("act")
        if drop is not None and "drop" not in self.order:
            raise self._no_place("drop")
        act, drop = _children.read_act(act), _children.read_drop(drop, input.dim())
        asked = _NOTHING
        if mask is not None or lengths is not None or weights is not None:
            asked = _Asked(*_rows.resolve(input, mask, lengths, weights))
        if domain is not None or "other_domains" in children:
            asked = asked._replace(domain=_domains.pick(self._others(), domain))
        if act is None or drop is None:
            return self._call_children(input, residual, seed, before, after, act, drop, asked)
        return self._fused(input, residual, seed, self.order, act, drop, self.eval_matched_stats, asked)

    def _fused(
        self,
        input: Any,
        residual: Any,
        seed: Any,
        order: str,
        act: Any,
        drop: Any,
        matched: bool,
        asked: _Asked,
        update: bool = True,
    ) -> Tensor:
        name, parameters = act
        act_weight, parameters = (parameters[0], ()) if name == "prelu" else (None, parameters)
        kind, p, granularity = drop
        buffers, vectors = self._buffers, self._parameters
        try:  # straight from where they usually are: nn.Module.__getattr__ costs a small layer more than its kernels
            mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
            weight, bias = vectors["weight"], vectors["bias"]
        except KeyError:
            mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
            weight, bias = self.weight, self.bias
        if asked.domain is not None:
            its = asked.domain
            mean, var, count = its.running_mean, its.running_var, its.num_batches_tracked
            weight, bias = getattr(its, "weight", weight), getattr(its, "bias", bias)
        training, track = self.training, self.training and self.track_running_stats and update
        group = self.process_group
        if group is not None:
            group = functional.check_process_group(group, self.ghost_batch_size) if training else None
        renorm = self._limits() if training and self.renorm is not None else None
        if (
            training
            and self.allow_single_value
            and group is None
            and mean is not None
            and input.numel() == input.shape[1]
        ):
            training = track = False
        if track and not self.update_when_recomputed and _in_backward():
            track = False
        training = training or (mean is None and var is None)
        if track and mean is None and count is not None:  # nothing to move, but batches all the same, as torch has it
            count.add_(1)
        use_running = not training or track
        momentum = 0.0 if self.momentum is None and count is None else self.momentum  # as torch has it
        if renorm is not None and not track:  # it reads what is not to move
            use_running, mean, var = True, mean.clone(), var.clone()  # type: ignore[union-attr]
        extras = functional.NO_EXTRAS
        strength = None
        if isinstance(p, Tensor):
            p, strength = functional.check_strength(p, kind, granularity)
        if not (asked.valid is None and strength is None and group is None and renorm is None):
            extras = functional.Extras(asked.valid, strength, group, renorm, self.global_noise)
        size, groups = self.ghost_batch_size, 0
        if training and size:  # the batch size of an evaluation is nobody's business: it may be symbolic
            groups = functional.ghost_batches(input.size(0), size, self.even_ghost_batches, math.prod(input.shape[2:]))
        return functional.apply(
            input,
            mean if use_running else None,
            var if use_running else None,
            count if track else None,
            weight,
            bias,
            training,
            momentum,
            functional.Chain(self.__dict__["eps"], order, name, parameters, kind, p, granularity, groups),
            seed,
            residual,
            act_weight,
            matched,
            extras,
            asked.weights,
        )

    def _limits(self) -> tuple[float, float]:
        if self.running_mean is None:
            raise ValueError("renorm: expected running statistics, towards which those of a batch are corrected")
        if self.ghost_batch_size:
            raise ValueError("ghost_batch_size: expected None with renorm, which corrects the statistics of a batch")
        limits = functional.check_renorm(self.renorm)
        assert limits is not None
        return limits

    def _call_children(
        self, input: Any, residual: Any, seed: Any, before: Any, after: Any, act: Any, drop: Any, asked: _Asked
    ) -> Tensor:
        """The stages one by one as far out as a child has to be called; what stands between is fused."""
        first, last = self._fusable(before, after, act is not None, drop is not None)
        ahead, behind = before[:first], after[last:]
        order = "-".join([*before[first:], "norm", *after[:last]])
        rows = None if asked.valid is None else asked.valid.unsqueeze(1)
        if rows is not None:  # before children see it: their derivatives would not leave a NaN alone
            input = torch.where(rows, input, 0)
            residual = residual if residual is None else torch.where(rows, residual, 0)
        called = self.drop is not None and "drop" in ahead + behind
        seedable = called and _children.seedable(self.drop, input.dim())  # type: ignore[arg-type]
        if seed is not None and called and not seedable and _children.is_live(self.drop):
            raise ValueError(f"seed: expected None, as {type(self.drop).__name__} is called and not fused")
        if self.global_noise and self.process_group is not None and called and _children.is_live(self.drop):
            raise ValueError(f"global_noise: expected False, as {type(self.drop).__name__} is called and not fused")
        noise = drop if drop is not None and not called else _children.NO_NOISE
        act = act if act is not None and "act" not in ahead + behind else _children.NO_ACT

        # Where noise is drawn outside, the running statistics learn from a pass without it.
        apart = self.eval_matched_stats and self.training and "drop" in ahead and _children.is_live(self.drop)
        if apart and self.track_running_stats:
            with torch.no_grad():
                clean = _children.without_hooks(self.act, input) if "act" in ahead and self.act is not None else input
                prologue = "-".join([*before[first:], "norm"])
                inner = act if "act" in prologue else _children.NO_ACT
                self._fused(clean, None, None, prologue, inner, noise, False, asked)
        for stage in ahead:
            child = getattr(self, stage)
            if child is not None:
                ready = input.clone() if getattr(child, "inplace", False) else input
                input = _children.call_drop(child, ready, seed) if stage == "drop" else child(ready)
        adds = "add" in order
        matched = self.eval_matched_stats and not apart
        added = residual if adds else None
        output = self._fused(input, added, seed, order, act, noise, matched, asked, update=not apart)
        for stage in behind:
            if stage == "add":
                output = output + residual
            elif stage == "drop" and self.drop is not None:
                output = _children.call_drop(self.drop, output, seed)
            elif getattr(self, stage) is not None:
                output = getattr(self, stage)(output)
        return output if rows is None else torch.where(rows, output, 0)

    @staticmethod
    def _fusable(before: Any, after: Any, act: bool, drop: bool) -> tuple[int, int]:
        """The stages around the norm that are fused, before[first:] and after[:last]: as far as children can be."""
        can = {"act": act, "drop": drop, "add": True}
        first, last = len(before), 0
        while first > 0 and can[before[first - 1]]:
            first -= 1
        while last < len(after) and can[after[last]]:
            last += 1
        return first, last

    def _no_place(self, stage: str) -> ValueError:
        return ValueError(f"{stage}: expected None, as order {self.order!r} has no {stage!r}")


def _in_backward() -> bool:
    """Whether autograd's engine is at work here: a forward is then one that activation checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# What a layer has beside its torch base class: what its stages compute, and what else it does, with the usual values.
_OPTIONS = ("order", "ghost_batch_size", "even_ghost_batches", "eval_matched_stats")
_FLAGS = {
    "even_ghost_batches": False,
    "eval_matched_stats": False,
    "allow_single_value": False,
    "update_when_recomputed": True,
    "process_group": None,
    "renorm": None,
    "global_noise": False,
    "frozen": False,
}
_OWN = {*_OPTIONS, *_FLAGS, "_in_model", "act", "drop", "other_domains"}
# What an nn.Module keeps in dictionaries of its own.
_CONTAINERS = frozenset(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))


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
        even_ghost_batches: cut the batch into groups of nearly equal size, as `x.chunk` does (TabNet), and not into
            full ones and a rest. A rest of a single value is avoided in either case.
        eval_matched_stats: in an order with "drop" before "norm", the running statistics learn the values without the
            noise, which are what evaluation sees: no variance shift (Li et al., arXiv 1801.05134) in this layer.
        allow_single_value: where a batch in training has one value per channel, of which there is no variance,
            normalise by the running statistics and leave them alone; torch's layers, and this one, raise otherwise. Not
            with a `process_group`, where the number of all values is not looked at.
        update_when_recomputed: False: a forward while autograd computes gradients, as
            :func:`torch.utils.checkpoint.checkpoint` repeats it, reentrant or not, does not move the running statistics
            again. torch's layers move them twice, and so does a compiled layer that stands in such a checkpoint.
        process_group: a group of :mod:`torch.distributed` whose processes share the statistics of a batch in training,
            or "world" for all processes; None: those of this process. On CPUs (gloo) as on GPUs (NCCL), with batches of
            any sizes, an empty one too; what stands ahead of the norm is in them. Each process draws noise of its own.
            Every process of the group has to call the layer. See :func:`convert_sync_batchnorm`.
        renorm: (r_max, d_max) of batch renormalisation (Ioffe 2017, arXiv 1702.03275): while training, the normalised
            values become xhat * r + d, with r the ratio of the batch's standard deviation to the running one, and d the
            difference of the means in units of that, limited to [1/r_max, r_max] and [-d_max, d_max]; constants in
            backward. The attribute may change at any time (a compiled layer is compiled again then): (1, 0) is batch
            norm, which the paper begins with. The running variance learns as torch's does. Activation checkpointing
            computes the correction again, from statistics that have moved, and so gradients that are not quite those
            of the output. None: no correction.
        global_noise: with a `process_group`, while training, the noise that one process would draw for the whole batch,
            the first process's samples first: at equal seeds (or with the first one's) any number of processes drop the
            same. False: each process draws its own.
        domains: how many sets of running statistics the layer has; each call says which one (`layer(x, domain=i)`).
            The first is the layer's own, :meth:`domain` gives each as a stock layer. Not of lazy layers.
        domain_affine: whether each domain has a weight and bias of its own, too.

    Raises:
        ValueError: an unknown activation, a probability outside [0, 1], an order that is none, an `act` or `drop` that
            the order has no place for.
        TypeError: a noise that is not multiplicative (alpha dropout), or an activation where `eps` stands.
    """

    _torch_class: type[_BatchNorm] = nn.BatchNorm1d


class FusedBatchNorm2d(_FusedBatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` over (N, C, H, W), and more around it. See :class:`FusedBatchNorm1d`."""

    _torch_class: type[_BatchNorm] = nn.BatchNorm2d


class FusedBatchNorm3d(_FusedBatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` over (N, C, D, H, W), and more around it. See :class:`FusedBatchNorm1d`."""

    _torch_class: type[_BatchNorm] = nn.BatchNorm3d


class _LazyFusedBatchNorm(_LazyNormBase, _FusedBatchNorm):
    """Keywords of the fused layer, around the constructor that torch's lazy layers share."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: functional.Device = None,
        dtype: torch.dtype | None = None,
        *,
        act: Act = None,
        drop: Drop = None,
        order: str = functional.DEFAULT_ORDER,
        ghost_batch_size: int | None = None,
        even_ghost_batches: bool = False,
        eval_matched_stats: bool = False,
        allow_single_value: bool = False,
        update_when_recomputed: bool = True,
        process_group: Any = None,
        renorm: tuple[float, float] | None = None,
        global_noise: bool = False,
        **newer: Unpack[_Newer],
    ) -> None:
        if isinstance(act, str) and act == "prelu":  # torch's lazy constructor hands no keywords on
            act = nn.PReLU(device=device, dtype=dtype)
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype, **newer)
        options: dict[str, Any] = {
            "order": order,
            "ghost_batch_size": ghost_batch_size,
            "even_ghost_batches": even_ghost_batches,
            "eval_matched_stats": eval_matched_stats,
            "allow_single_value": allow_single_value,
            "update_when_recomputed": update_when_recomputed,
            "process_group": process_group,
            "renorm": renorm,
            "global_noise": global_noise,
        }
        checked = _FusedBatchNorm(0, affine=False, track_running_stats=False, act=act, drop=drop, **options)
        for name in options:
            setattr(self, name, getattr(checked, name))
        self.act, self.drop = checked.act, checked.drop

    @classmethod
    def from_torch(  # type: ignore[override]
        cls, bn: nn.Module, act: Act = None, drop: Drop = None, **options: Unpack[_Options]
    ) -> Self:
        """As :meth:`FusedBatchNorm1d.from_torch`, of a lazy BatchNorm."""
        return cls(affine=False, track_running_stats=False, **options)._adopt(bn, act, drop)

    # The hooks with which a lazy module makes its parameters are bound to it.
    _own_when_adopting = ("_load_hook", "_initialize_hook", *(name for name in _CONTAINERS if "hook" in name))

    def _check_hooks(self, layer: nn.Module) -> None:
        pass


class LazyFusedBatchNorm1d(_LazyFusedBatchNorm, FusedBatchNorm1d):
    """:class:`FusedBatchNorm1d` that learns `num_features` from its first input, as torch.nn.LazyBatchNorm1d does."""

    cls_to_become: type[Any] | None = FusedBatchNorm1d
    _torch_class: type[_BatchNorm] = nn.LazyBatchNorm1d


class LazyFusedBatchNorm2d(_LazyFusedBatchNorm, FusedBatchNorm2d):
    """:class:`FusedBatchNorm2d` that learns `num_features` from its first input, as torch.nn.LazyBatchNorm2d does."""

    cls_to_become: type[Any] | None = FusedBatchNorm2d
    _torch_class: type[_BatchNorm] = nn.LazyBatchNorm2d


class LazyFusedBatchNorm3d(_LazyFusedBatchNorm, FusedBatchNorm3d):
    """:class:`FusedBatchNorm3d` that learns `num_features` from its first input, as torch.nn.LazyBatchNorm3d does."""

    cls_to_become: type[Any] | None = FusedBatchNorm3d
    _torch_class: type[_BatchNorm] = nn.LazyBatchNorm3d


_LAZY: dict[type[nn.Module], type[nn.Module]] = {
    c._torch_class: c for c in (LazyFusedBatchNorm1d, LazyFusedBatchNorm2d, LazyFusedBatchNorm3d)
}


class ICLayer(_FusedBatchNorm):
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
        num_features: int,
        p: Drop = 0.05,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: functional.Device = None,
        dtype: torch.dtype | None = None,
        **newer: Unpack[_Newer],
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, drop=p, order="norm-drop", **newer
        )

    @classmethod
    def from_torch(cls, bn: nn.Module, p: Drop = 0.05) -> Self:  # type: ignore[override]
        """The layer of an existing BatchNorm1d, 2d or 3d, whose parameters and buffers it shares.

        Raises:
            TypeError: `bn` is of another class.
        """
        return cls(0, None, affine=False, track_running_stats=False)._adopt(bn, None, p)

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input)")


def _mark(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(child, _FusedBatchNorm) and name != "_orig_mod":  # which is torch.compile's, of the module alone
        child._in_model = True


register_module_module_registration_hook(_mark)
