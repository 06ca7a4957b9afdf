"""Multiplicative noises beside torch's dropouts: modules that work alone, and as the `drop` of a fused layer.

All multiply by m of mean 1, so evaluation needs no correction. The variance of m, `alpha`, is the strength that noises
of different kinds have in common: at equal alpha they raise variances equally (Li et al., arXiv 1801.05134).
"""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from . import _operators, functional

__all__ = ["ConcreteDropout", "DropPath", "Dropout", "GaussianDropout", "UniformDropout", "at_alpha"]


class _Noise(nn.Dropout):
    """`kind` and `strength` as the functional takes them, and `granularity`.

    Dropouts to those who look for them: code that switches `nn.Dropout` or `_DropoutNd` on for Monte-Carlo sampling, or
    sets their `p`, which is here the probability of the Bernoulli noise of equal variance.
    """

    kind: str
    granularity: str
    inplace = False

    def __init__(self, granularity: str) -> None:
        nn.Module.__init__(self)
        self.granularity = granularity

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    @property
    @abstractmethod
    def strength(self) -> float:
        """As the functional takes it, in the noise's own unit."""

    @property
    @abstractmethod
    def alpha(self) -> float:
        """The variance of the multiplier."""

    @alpha.setter
    @abstractmethod
    def alpha(self, alpha: float) -> None: ...

    @property
    def p(self) -> float:
        return 1.0 if self.alpha == math.inf else self.alpha / (1 + self.alpha)

    @p.setter
    def p(self, p: float) -> None:
        p = functional.check_noise(p, "bernoulli", self.granularity)
        self.alpha = p / (1 - p) if p < 1 else math.inf

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return functional.leaf_of_graph(self, input)
        return functional.dropout(input, self.strength, self.training, noise=self.kind, granularity=self.granularity)

    def __prepare_scriptable__(self) -> nn.Module:  # torch.jit.script asks
        from ._unfused import torch_noise

        return torch_noise(self)

    def _set(self, name: str, value: Any) -> None:
        self.__dict__[name] = functional.check_noise(value, self.kind, self.granularity)


class UniformDropout(_Noise):
    """Multiplies by 1 + r, r uniform on (-beta, beta) (Uout: Li et al., arXiv 1801.05134, section 5.2).

    Args:
        beta: in [0, 1].
        granularity: a draw per "element", per "channel" of a sample, or per "sample".

    Shape: any; (N, C, ...) for "channel", (N, ...) for "sample". Output like input.

    Raises:
        ValueError: an argument outside its domain.
    """

    kind = "uniform"

    def __init__(self, beta: float = 0.1, granularity: str = "element") -> None:
        super().__init__(granularity)
        self.beta = beta

    @property
    def beta(self) -> float:
        return self.__dict__["_beta"]  # type: ignore[no-any-return]

    @beta.setter
    def beta(self, beta: float) -> None:
        self._set("_beta", beta)

    @property
    def strength(self) -> float:
        return self.beta

    @property
    def alpha(self) -> float:
        return self.beta**2 / 3

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        if alpha > 1 / 3:
            raise ValueError(f"alpha: expected at most 1/3 for UniformDropout, but got {alpha}")
        self.beta = min(1.0, math.sqrt(3 * alpha))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, granularity={self.granularity!r}"


class GaussianDropout(_Noise):
    """Multiplies by N(1, alpha) (Srivastava et al. 2014, section 10; alpha = p/(1-p) matches dropout at p).

    Args:
        alpha: the variance, 0 or more.
        granularity: a draw per "element", per "channel" of a sample, or per "sample".

    Shape: any; (N, C, ...) for "channel", (N, ...) for "sample". Output like input.

    Raises:
        ValueError: an argument outside its domain.
    """

    kind = "gaussian"

    def __init__(self, alpha: float = 1.0, granularity: str = "element") -> None:
        super().__init__(granularity)
        self.alpha = alpha

    @property
    def alpha(self) -> float:
        return self.__dict__["_alpha"]  # type: ignore[no-any-return]

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._set("_alpha", alpha)

    @property
    def strength(self) -> float:
        return self.alpha

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, granularity={self.granularity!r}"


class DropPath(_Noise):
    """Drops whole samples with probability p and scales the others by 1/(1-p) (stochastic depth: Huang et al. 2016).

    Args:
        p: in [0, 1].

    Shape: (N, ...). Output like input.

    Raises:
        ValueError: p outside [0, 1].
    """

    kind = "bernoulli"

    def __init__(self, p: float = 0.5) -> None:
        super().__init__("sample")
        self.p = p

    @property
    def p(self) -> float:
        return self.__dict__["_p"]  # type: ignore[no-any-return]

    @p.setter
    def p(self, p: float) -> None:
        self._set("_p", p)

    @property
    def strength(self) -> float:
        return self.p

    @property  # type: ignore[misc]  # no setter: p is what it has
    def alpha(self) -> float:
        return self.p / (1 - self.p) if self.p < 1 else math.inf

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Dropout(nn.Dropout):
    """:class:`torch.nn.Dropout` with the noise of this package, in one pass each way and with nothing saved.

    Args:
        p: in [0, 1]. A scalar tensor becomes a buffer (not of the state dict), which kernels read: to assign to `p`, or
            to write into it, compiles nothing again and waits for no device.
        inplace: write the result over the input, which torch's own does then.

    Shape: any. Output like input. What is no float of 16, 32 or 64 bits goes to torch.

    Raises:
        ValueError: p outside [0, 1].
    """

    def __init__(self, p: float | Tensor = 0.5, inplace: bool = False) -> None:
        value = 0.5 if isinstance(p, Tensor) and p.is_meta else functional.check_noise(p)
        super().__init__(value, inplace)
        if isinstance(p, Tensor):
            del self.p
            dtype = p.dtype if p.is_floating_point() else torch.get_default_dtype()
            self.register_buffer("p", p.detach().reshape(()).to(dtype, copy=True), persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "p" and "p" in self.__dict__.get("_buffers", ()) and not isinstance(value, Tensor):
            self._buffers["p"].fill_(functional.check_noise(value))  # type: ignore[union-attr]
        else:
            super().__setattr__(name, value)

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return functional.leaf_of_graph(self, input)
        if self.inplace or input.dtype not in functional.DTYPES:
            return super().forward(input)
        return functional.dropout(input, self.p, self.training)

    def to_torch(self) -> nn.Dropout:
        """The stock module."""
        return nn.Dropout(float(self.p), self.inplace).train(self.training)

    __prepare_scriptable__ = to_torch  # torch.jit.script asks


class ConcreteDropout(nn.Dropout):
    """Dropout whose probability is learned: by the relaxed noise of Gal, Hron & Kendall (2017, arXiv 1705.07832).

    While training it multiplies by (1 - z) / (1 - p), z = sigmoid((logit p + logit u) / temperature) with u uniform on
    (0, 1) for each element: dropping nearly, so that p gets a gradient. It is called by a fused layer, not fused.

    Args:
        p: in (0, 1), where it begins.
        temperature: above 0; the paper's 0.1. The lower, the closer to dropping.

    Shape: any. Output like input.

    Raises:
        ValueError: an argument outside its domain.
    """

    inplace = False

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def __init__(
        self,
        p: float = 0.1,
        temperature: float = 0.1,
        device: functional.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if not 0 < functional.check_noise(p) < 1:
            raise ValueError(f"p: expected a probability between 0 and 1, but got {p}")
        value = functional.as_number(temperature)
        if value is None or not 0 < value < math.inf:
            raise ValueError(f"temperature: expected a number above 0, but got {temperature!r}")
        self.temperature = value
        self.logit_p = nn.Parameter(torch.tensor(math.log(p / (1 - p)), device=device, dtype=dtype))

    @property
    def p(self) -> Any:  # a tensor
        return self.logit_p.sigmoid()

    @p.setter
    def p(self, p: float) -> None:
        value = functional.check_noise(p)
        if not 0 < value < 1:
            raise ValueError(f"p: expected a probability between 0 and 1, which ConcreteDropout learns, but got {p}")
        with torch.no_grad():
            self.logit_p.fill_(math.log(value / (1 - value)))

    def entropy(self) -> Tensor:
        """-(p log p + (1 - p) log(1 - p)), in nats: what the paper's objective rewards, times the features dropped."""
        return nn.functional.binary_cross_entropy_with_logits(self.logit_p, self.p)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return functional.leaf_of_graph(self, input)
        if not self.training:
            return input
        u = torch.rand_like(input, dtype=_operators.opmath(input)).clamp(1e-6, 1 - 1e-6)
        logit = self.logit_p.to(u.dtype)
        kept = torch.sigmoid(-(logit + u.logit()) / self.temperature)
        return (input * kept * (1 + logit.exp())).to(input.dtype)  # 1 / (1 - p)

    def extra_repr(self) -> str:
        p = "" if self.logit_p.is_meta else f"p={float(self.p.detach()):.3g}, "
        return f"{p}temperature={self.temperature}"


_AnyNoise = TypeVar("_AnyNoise", bound=_DropoutNd)


def at_alpha(noise: type[_AnyNoise], alpha: float, **arguments: Any) -> _AnyNoise:
    """A noise of the given class whose multiplier has variance `alpha`: the same shift of variances for every class::

        at_alpha(nn.Dropout2d, 0.25)         # p = 0.2
        at_alpha(UniformDropout, 0.25)       # beta = 0.866

    Args:
        noise: `nn.Dropout`, `nn.Dropout1d/2d/3d`, `Dropout`, `UniformDropout`, `GaussianDropout` or `DropPath`.
        alpha: 0 or more; for `UniformDropout` at most 1/3, which no multiplier between 0 and 2 can exceed.
        arguments: others of its constructor.

    Raises:
        TypeError: another class.
        ValueError: an alpha that this class cannot have.
    """
    value = functional.as_number(alpha)
    if value is None or not 0 <= value < math.inf:
        raise ValueError(f"alpha: expected a number of 0 or more, but got {alpha!r}")
    if noise in (UniformDropout, GaussianDropout):
        module = noise(**arguments)
        module.alpha = value  # type: ignore[assignment]
        return module
    if noise in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, Dropout, DropPath):
        return noise(value / (1 + value), **arguments)
    raise TypeError(f"noise: expected a class of dropout, but got {noise!r}")
