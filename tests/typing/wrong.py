"""Wrong arguments, all of which mypy and pyright have to flag: a comment that silences nothing is an error. Not run."""

from torch import Tensor, nn

from fusednorm import FusedBatchNorm2d as Fused2d
from fusednorm import (
    ICLayer,
    UniformDropout,
    at_alpha,
    fold,
    fuse,
    keep_act_keys,
    noise,
    recalibrate,
    restore_running_var,
    unfuse,
)
from fusednorm import LazyFusedBatchNorm2d as Lazy2d
from fusednorm.analysis import alpha_of, measure_variance_shift, variance_shift
from fusednorm.functional import batch_norm_act_drop, dropout
from fusednorm.reference import parse_order, resolve_activation


def layers(x: Tensor, layer: Fused2d, norm: nn.BatchNorm2d) -> None:
    Fused2d("8")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, "relu")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, act=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, act=["elu", 1.0])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, act=nn.ReLU)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, drop="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, drop=nn.Dropout)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, order=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, order=("norm", "act"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, ghost_batch_size=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, even_ghost_batches=2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, eval_matched_stats=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, dropout=0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Fused2d(8, bias="no")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, dtype="float32")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d(8, device=0.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    ICLayer(8, drop=0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    ICLayer(8, "0.1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Lazy2d(act=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Lazy2d(dropout=0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    layer(x, seed="a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    layer(x, seed=0.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    layer(x, 1.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    layer(x, x, 7)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    layer(x, residue=x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    layer([x])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    layer()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    layer.act = 3  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    layer.drop = "x"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    layer.order = None  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    Fused2d.from_torch(nn.BatchNorm2d)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d.from_torch(norm, act=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fused2d.from_torch(norm, dropout=0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    ICLayer.from_torch(norm, act="relu")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Lazy2d.from_torch(norm, orders="norm")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    keep_act_keys(nn.Identity(), 0, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def noises(x: Tensor) -> None:
    noise((6, 8), 0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    noise((6, 8), 0.5, seed="a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    noise((6, 8), 0.5, seed=7, kind=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    noise((6, 8), 0.5, seed=7, granularity=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    noise((6, 8), 0.5, seed=7, dtype=float)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    noise(6, 0.5, seed=7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UniformDropout("0.1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UniformDropout(0.1, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UniformDropout(p=0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    UniformDropout().alpha = "a"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    UniformDropout()(x, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    at_alpha(nn.ReLU, 0.25)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    at_alpha(nn.Dropout(), 0.25)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    at_alpha(nn.Dropout2d, "0.25")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def functions(x: Tensor) -> None:
    batch_norm_act_drop(x, None, None, act=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    batch_norm_act_drop(x, None, None, act=nn.ReLU())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    batch_norm_act_drop(x, None, None, p="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    batch_norm_act_drop(x, None, None, order=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    batch_norm_act_drop(x, None, None, momentum=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    batch_norm_act_drop(x, None, None, drop=0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    batch_norm_act_drop(x, None, None, residual=0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    batch_norm_act_drop(x, 0.0, 1.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    batch_norm_act_drop(x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    dropout(x, 0.5, True, "uniform")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    dropout(x, 0.5, noise=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    dropout(0.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    batch_norm_act_drop(x, None, None, seed=0.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    resolve_activation(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    parse_order(("norm",))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def shifts(x: Tensor, model: nn.Module, norm: nn.BatchNorm2d) -> None:
    alpha_of(0.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    alpha_of(("uniform", "0.1"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    alpha_of(nn.Dropout)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    variance_shift(0.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    variance_shift(nn.Dropout(), layer=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    variance_shift(nn.Dropout(), mean="0")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    variance_shift(nn.Dropout(), granularity=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    measure_variance_shift(x, [x])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    measure_variance_shift(model, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    recalibrate(x, [x])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    recalibrate(model, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    recalibrate(model, [x], "running")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    recalibrate(model, [x], normalize="sample")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    recalibrate(model, [x], passes=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    recalibrate(model, [x], layers=norm)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    recalibrate(model, [x], forward=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    restore_running_var(nn.ReLU())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    restore_running_var(norm, 0.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    restore_running_var(norm, shift="0.5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def whole_models(x: Tensor, model: nn.Module) -> None:
    fuse(x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fuse(model, include=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fuse(model, exclude=lambda name: True)  # type: ignore[arg-type,misc]  # pyright: ignore[reportArgumentType]
    fuse(model, inputs=x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fuse(model, small="no")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unfuse([model])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fold(model, inplace="no")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
