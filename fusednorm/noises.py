"""Multiplicative noises beside torch's dropouts: modules that work alone, and as the `drop` of a fused layer.

All multiply by m of mean 1, so evaluation needs no correction. The variance of m, `alpha`, is the strength that noises
of different kinds have in common: at equal alpha they raise variances equally (Li et al., arXiv 1801.05134).
"""

import math

from torch import nn

from . import functional


class _Noise(nn.Module):
    """`kind` and `strength` as the functional takes them, and `granularity`."""

    def forward(self, input):
        return functional.dropout(input, self.strength, self.training, noise=self.kind, granularity=self.granularity)

    def _set(self, name, value):
        functional.check_noise(value, self.kind, self.granularity)
        self.__dict__[name] = value


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

    def __init__(self, beta=0.1, granularity="element"):
        super().__init__()
        self.granularity = granularity
        self.beta = beta

    @property
    def beta(self):
        return self.__dict__["_beta"]

    @beta.setter
    def beta(self, beta):
        self._set("_beta", beta)

    strength = beta

    @property
    def alpha(self):
        return self.beta**2 / 3

    def extra_repr(self):
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

    def __init__(self, alpha=1.0, granularity="element"):
        super().__init__()
        self.granularity = granularity
        self.alpha = alpha

    @property
    def alpha(self):
        return self.__dict__["_alpha"]

    @alpha.setter
    def alpha(self, alpha):
        self._set("_alpha", alpha)

    strength = alpha

    def extra_repr(self):
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
    granularity = "sample"

    def __init__(self, p=0.5):
        super().__init__()
        self.p = p

    @property
    def p(self):
        return self.__dict__["_p"]

    @p.setter
    def p(self, p):
        self._set("_p", p)

    strength = p

    @property
    def alpha(self):
        return self.p / (1 - self.p) if self.p < 1 else math.inf

    def extra_repr(self):
        return f"p={self.p}"


def at_alpha(noise, alpha, **arguments):
    """A noise of the given class whose multiplier has variance `alpha`: the same shift of variances for every class.

        at_alpha(nn.Dropout2d, 0.25)         # p = 0.2
        at_alpha(UniformDropout, 0.25)       # beta = 0.866

    Args:
        noise: `nn.Dropout`, `nn.Dropout1d/2d/3d`, `UniformDropout`, `GaussianDropout` or `DropPath`.
        alpha: 0 or more; for `UniformDropout` at most 1/3, which no multiplier between 0 and 2 can exceed.
        arguments: others of its constructor.

    Raises:
        TypeError: another class.
        ValueError: an alpha that this class cannot have.
    """
    if not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: expected a number of 0 or more, but got {alpha!r}")
    if noise is GaussianDropout:
        return noise(float(alpha), **arguments)
    if noise is UniformDropout:
        if alpha > 1 / 3:
            raise ValueError(f"alpha: expected at most 1/3 for UniformDropout, but got {alpha}")
        return noise(min(1.0, math.sqrt(3 * alpha)), **arguments)
    if noise in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, DropPath):
        return noise(alpha / (1 + alpha), **arguments)
    raise TypeError(f"noise: expected a class of dropout, but got {noise!r}")
