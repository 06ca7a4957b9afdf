"""Whether a chain is worth fusing: where a tensor is small, what a call costs counts as much as its memory.

Measured once for each chain and shape, on this machine: the stock modules and the fused call take turns.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

Small: TypeAlias = Literal["measure", "always", "never"]
SMALL: Small = "measure"
_AT_MOST = 2**20  # values: beyond, the fused call has not been found slower in training
_SECONDS = 0.01  # of a measurement, but for the least number of turns
_TURNS = 7, 40

_known: dict[Hashable, tuple[float, float]] = {}  # milliseconds of stock, and of ours


def check_small(small: Any, argument: str = "small") -> Small:
    """Returns `small`, or raises ValueError unless it is one of the choices."""
    if small not in get_args(Small):
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, get_args(Small)))}, but got {small!r}")
    return small  # type: ignore[no-any-return]


class Like(NamedTuple):
    """What a tensor is, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Like":
        """Of a real tensor or a fake one, whose sizes may be symbols: those are what they are in the example."""
        strides = tensor.stride() if tensor.layout == torch.strided else ()
        numbers = [[n if isinstance(n, int) else n.node.hint for n in of] for of in (tensor.shape, strides)]
        return cls(tuple(numbers[0]), tuple(numbers[1]), tensor.dtype, tensor.device)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def filled(self, requires_grad: bool) -> Tensor:
        """Random values in such a tensor, which are positive in a vector: it may be a variance."""
        known = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        values = torch.empty_like(known, device=self.device)  # whose places do not overlap, as those of `known` may
        values = values.normal_() if len(self.shape) > 1 else values.uniform_(0.5, 1.5)
        return values.requires_grad_(requires_grad)


def why_not(
    small: Small, key: Hashable, like: Like, training: bool, make: Callable[[], tuple[Any, Any, Sequence[Tensor]]]
) -> str | None:
    """The reason to leave a chain as it is, None: there is none.

    Args:
        small: "measure"; "always": nothing is too small; "never": small ones are left without a measurement.
        key: what says all about the chain, but for the tensor.
        like: the chain's input.
        training: measure a backward, too.
        make: gives the stock chain, the fused one, and the tensors that both are called with.
    """
    if small == "always" or None in (*like.shape, *like.stride):  # a size that depends on data
        return None
    if not 0 < like.numel <= _AT_MOST or like.device.type == "meta":
        return None
    if small == "never":
        return f"it is small: {like.numel} values, and up to {_AT_MOST} are left as they are"
    case = key, like, training, torch.get_num_threads()
    if case not in _known:
        with _by_itself():
            _known[case] = _measured(*make(), training)
    stock, ours = _known[case]
    shape = ", ".join(map(str, like.shape))
    return f"stock is faster for ({shape}): {stock:.3f} ms against {ours:.3f}" if ours > stock else None


@contextmanager
def _by_itself() -> Iterator[None]:
    """Nothing of what goes on around a measurement reaches into it, nor the other way round."""
    flag = torch.compiler._is_compiling_flag  # which is on while a backend of torch.compile is called
    torch.compiler._is_compiling_flag = False
    try:
        with torch.random.fork_rng(), torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.enable_grad():
            yield
    finally:
        torch.compiler._is_compiling_flag = flag


def _measured(stock: Any, ours: Any, tensors: Sequence[Tensor], training: bool) -> tuple[float, float]:
    device = tensors[0].device
    leaves = [tensor for tensor in tensors if tensor.requires_grad]

    def seconds(function: Any) -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(training):
            output = function(*tensors)
        if training:
            torch.autograd.grad(output, leaves, torch.ones_like(output))
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    for function in (stock, ours, stock, ours):
        seconds(function)
    taken: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(taken) < _TURNS[0] or (len(taken) < _TURNS[1] and time.perf_counter() - start < _SECONDS):
        taken.append((seconds(stock), seconds(ours)))
    first, second = (statistics.median(times) * 1e3 for times in zip(*taken, strict=True))
    return first, second
