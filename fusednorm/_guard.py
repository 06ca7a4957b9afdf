"""What a call means is sometimes said by the code that makes it alone; all that looks at callers is here.

Tools are kept from taking a fused layer for a bare BatchNorm and losing its activation and noise in silence. Code that
rebuilds, freezes or folds a BatchNorm by isinstance (convert_sync_batchnorm, FrozenBatchNorm2d, fuse_conv_bn_eval,
BatchNorm to GroupNorm) has one thing in common: one function reads `eps` or `num_features`, and names the running
statistics or the norm that it builds instead. Such a reader gets a sentence, all others the value.

And modes: stock layers have the noise in a module of its own, so that `bn.eval()` is the norm's alone.
"""

import dis
import re
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch

# In a function that reads eps or num_features, names that tell what for.
_REBUILDS = re.compile(r"running_(mean|var)|\w*(Group|Instance|Layer|Sync|Frozen|RMS|Ghost)\w*Norm\w*")
# In a function that sets modes, names that tell of a norm.
_NORMS = re.compile(
    r"(?i)\w*batch_?norm\w*|(\w+_)?bns?\d*(_\w+)?|(\w+_)?norms?\d*|norm_\w+|running_(mean|var)|track_running_stats"
)


def guarded(name: str) -> Any:
    """A property over the layer's own `name` that a function which rebuilds the layer as something else cannot read."""

    def get(self: Any) -> Any:
        try:
            value = self.__dict__[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None
        if not torch.compiler.is_compiling() and (lost := self._beside_the_norm()):
            _check_reader(self, name, lost, sys._getframe(1))
        return value

    def set(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, set)


def means_norm_alone(layer: Any, frame: FrameType | None) -> bool:
    """Whether train() or eval() of a layer in a model, called from `frame`, is to leave its children as they are.

    It is where the calling function names a norm, as `isinstance(m, nn.BatchNorm2d)` does, or picks this layer by hand.
    A loop that names none goes over modules of all kinds, as nn.Module.train does, and means the whole layer.
    """
    while frame is not None and frame.f_locals.get("self") is layer:
        frame = frame.f_back
    loops = False
    while frame is not None:
        code = frame.f_code
        inner = [
            c for c in code.co_consts if isinstance(c, CodeType)
        ]  # the condition may be a lambda or a comprehension
        if any(_names(c, _NORMS, c.co_varnames) for c in (code, *inner)):
            return True
        loops = loops or dis.opmap["FOR_ITER"] in code.co_code[::2]
        if code.co_name not in ("<listcomp>", "<setcomp>", "<genexpr>"):
            break
        frame = frame.f_back
    return not loops


def _check_reader(layer: Any, name: str, lost: str, frame: FrameType) -> None:
    code = frame.f_code
    if frame.f_globals.get("__name__", "").startswith("fusednorm.") or frame.f_locals.get("self") is layer:
        return
    if _names(code, _REBUILDS):
        raise RuntimeError(
            f"{code.co_name}() in {frame.f_globals.get('__name__')} takes a fusednorm {type(layer).__name__} for a "
            f"bare BatchNorm (it reads {name} to rebuild or fold it), and would lose {lost}. Give it the stock layers "
            "instead: replace the layer by layer.to_torch() before"
        )


def _names(code: CodeType, pattern: re.Pattern[str], variables: tuple[str, ...] = ()) -> bool:
    """Whether a word of the code, or one of these variables of it, is of that pattern."""
    return any(pattern.fullmatch(word) for word in (*code.co_names, *_strings(code.co_consts), *variables))


def _strings(constants: tuple[Any, ...]) -> Iterator[str]:
    for c in constants:
        if isinstance(c, str) and c.isidentifier():
            yield c
        elif isinstance(c, tuple):
            yield from _strings(c)
