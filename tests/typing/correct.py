"""Every public name used as users do, with the types that they see: for mypy and pyright, and run by test_typing.py."""

from typing import assert_type

import torch
from torch import Tensor, nn

import fusednorm
from fusednorm import (
    ConcreteDropout,
    Dropout,
    DropPath,
    FusedBatchNorm1d,
    FusedBatchNorm2d,
    FusedBatchNorm3d,
    GaussianDropout,
    ICLayer,
    LazyFusedBatchNorm1d,
    LazyFusedBatchNorm2d,
    LazyFusedBatchNorm3d,
    UniformDropout,
    analysis,
    at_alpha,
    backend,
    convert_sync_batchnorm,
    fold,
    functional,
    fuse,
    keep_act_keys,
    noise,
    predict,
    recalibrate,
    recalibration,
    reference,
    restore_running_var,
    uncertainty,
    unfuse,
)
from fusednorm.analysis import VarianceShift, alpha_of, measure_variance_shift, variance_shift
from fusednorm.convert import Report

x2, x4, x5 = torch.randn(6, 8), torch.randn(6, 8, 5, 5), torch.randn(6, 8, 3, 3, 3)
seed = torch.zeros((), dtype=torch.int64)
assert_type(fusednorm.__version__, str)

# ---- layers ----------------------------------------------------------------------------------------------------------
layer = FusedBatchNorm2d(8, act="relu", drop=0.1)
assert_type(layer, FusedBatchNorm2d)
assert_type(layer(x4), Tensor)
assert_type(layer(x4, seed=7), Tensor)
assert_type(layer(x4, seed=seed), Tensor)
assert_type(layer.forward(x4), Tensor)
assert_type(layer.train(), FusedBatchNorm2d)
assert_type(layer.train(False).eval(), FusedBatchNorm2d)
assert_type(layer.freeze(), FusedBatchNorm2d)
assert_type(layer.unfreeze(), FusedBatchNorm2d)
assert_type(layer.to_torch(), nn.Module)
assert_type((layer.eps, layer.num_features), tuple[float, int])
assert_type((layer.act, layer.drop), tuple[nn.Module | None, nn.Module | None])
assert_type((layer.order, layer.ghost_batch_size), tuple[str, int | None])
assert_type((layer.frozen, layer.even_ghost_batches, layer.eval_matched_stats), tuple[bool, bool, bool])
layer.act, layer.drop = ("leaky_relu", 0.2), 0.5
layer.act, layer.drop = nn.ELU(), UniformDropout(0.2)
layer.act, layer.drop = None, None

residual = FusedBatchNorm2d(8, 1e-3, None, True, False, "cpu", torch.float64, bias=False, order="norm-add")
assert_type(residual(x4.double(), x4.double(), seed=None), Tensor)
ghosts = FusedBatchNorm1d(8, act=nn.GELU("tanh"), drop=nn.Dropout(0.1), ghost_batch_size=3, even_ghost_batches=True)
assert_type(ghosts(x2), Tensor)
matched = FusedBatchNorm3d(8, act="prelu", drop=DropPath(0.1), order="act-drop-norm", eval_matched_stats=True)
assert_type(matched(x5), Tensor)
assert_type(ICLayer(8, p=0.05, eps=1e-3)(x2), Tensor)
assert_type(ICLayer(8, nn.Dropout(0.1)).train(), ICLayer)
assert_type(LazyFusedBatchNorm1d(act="relu")(x2), Tensor)
assert_type(LazyFusedBatchNorm2d(drop=0.1, order="drop-norm")(x4), Tensor)
assert_type(LazyFusedBatchNorm3d(ghost_batch_size=2, bias=True)(x5), Tensor)

norm, relu, dropout = nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
assert_type(FusedBatchNorm1d.from_torch(nn.BatchNorm1d(8)), FusedBatchNorm1d)
assert_type(FusedBatchNorm2d.from_torch(norm, act=relu, drop=dropout, ghost_batch_size=2), FusedBatchNorm2d)
assert_type(FusedBatchNorm3d.from_torch(nn.BatchNorm3d(8), "relu", 0.1, "act-norm-drop"), FusedBatchNorm3d)
assert_type(ICLayer.from_torch(norm, p=dropout), ICLayer)
assert_type(LazyFusedBatchNorm1d.from_torch(nn.LazyBatchNorm1d(), order="act-norm"), LazyFusedBatchNorm1d)

net = nn.Sequential(FusedBatchNorm2d(8, act=nn.PReLU()), nn.Identity())
keep_act_keys(net, "0", "1")

# ---- noises ----------------------------------------------------------------------------------------------------------
uniform, gaussian, path = UniformDropout(0.2, "channel"), GaussianDropout(alpha=0.5), DropPath(p=0.1)
assert_type(uniform(x4), Tensor)
assert_type(gaussian(x4), Tensor)
assert_type(path(x4), Tensor)
assert_type((uniform.beta, gaussian.alpha, path.p), tuple[float, float, float])
uniform.beta, gaussian.alpha, path.p, uniform.p = 0.3, 1.0, 0.2, 0.1
assert_type((uniform.strength, uniform.kind, uniform.granularity), tuple[float, str, str])
assert_type(at_alpha(nn.Dropout2d, 0.25), nn.Dropout2d)
assert_type(at_alpha(UniformDropout, 0.25, granularity="channel"), UniformDropout)
assert_type(noise((6, 8), 0.5, seed=seed), Tensor)
assert_type(noise([6, 8, 5], 0.5, seed=7, kind="gaussian", device="cpu", dtype=torch.float64), Tensor)
assert_type(noise(x4.shape, 0.5, seed=7, granularity="channel"), Tensor)

# ---- functions -------------------------------------------------------------------------------------------------------
mean, var = torch.zeros(8), torch.ones(8)
assert_type(functional.activations(), tuple[str, ...])
assert_type(functional.dropout(x4, 0.5, True, noise="uniform", granularity="sample", seed=7), Tensor)
assert_type(functional.batch_norm_act_drop(x4, None, None, training=True, act="relu", p=0.1), Tensor)
y = functional.batch_norm_act_drop(
    *(x4, mean, var, torch.ones(8), torch.zeros(8), True),
    act=("leaky_relu", 0.2),
    p=0.1,
    order="norm-act-drop-add",
    residual=x4,
    ghost_batch_size=3,
    seed=7,
)
assert_type(y, Tensor)
assert_type(functional.batch_norm_act_drop(x4, mean, var, act=("prelu", torch.ones(8))), Tensor)

assert_type(reference.batch_norm_act_drop(x4, mean, var, act=("gelu", "tanh"), noise=x4), Tensor)
assert_type(reference.resolve_activation("elu"), tuple[str, tuple[float | Tensor, ...]])
assert_type(reference.activation("elu", x4, 0.5), Tensor)
assert_type(reference.parse_order("act-norm"), tuple[tuple[str, ...], tuple[str, ...]])
assert_type(reference.run_stages(("act", "drop", "add"), x4, "relu", torch.relu, x4), Tensor)
assert_type(reference.moments(x4), tuple[Tensor, Tensor])
assert_type(reference.ghosts(x4, 2)[0], Tensor)
assert_type(reference.per_channel(reference.in_opmath(mean), x4), Tensor)

# ---- the variance shift ----------------------------------------------------------------------------------------------
model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), FusedBatchNorm1d(8, drop=0.1, order="drop-norm"))
batches = [(x2, "a label"), (x2 + 1, "another")]
assert_type(alpha_of(nn.Dropout(0.5)), float)
assert_type(alpha_of(("uniform", 0.1)), float)
assert_type(variance_shift(nn.Dropout(0.5)), Tensor)
assert_type(variance_shift(nn.Dropout2d(0.5), x4, nn.Conv2d(8, 4, 3)), Tensor)
assert_type(variance_shift(("gaussian", 1), layer=nn.Linear(2, 1), mean=[0.0, 1.0], cov=torch.eye(2)), Tensor)
assert_type(analysis.variances(nn.Dropout(0.5), x4, granularity="sample"), tuple[Tensor, Tensor])
shifts = measure_variance_shift(model, batches, device="cpu", progress=False)
assert_type(shifts, dict[str, VarianceShift])
shift = shifts["2"]
assert_type((shift.training, shift.evaluation, shift.running), tuple[Tensor, Tensor, Tensor])
assert_type((shift.ratio, shift.ratio_to_running, shift.shift), tuple[Tensor, Tensor, float])

layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
assert_type(recalibrate(model, iter(batches), progress=False), dict[str, Tensor])
assert_type(recalibrate(model, batches, normalize="running", passes=2, layers=layers), dict[str, Tensor])
assert_type(recalibration.recalibrate(model, [x2], forward=lambda x: model(x), progress=False), dict[str, Tensor])
assert_type(restore_running_var(norm, dropout), Tensor)
assert_type(restore_running_var(layers[0]), Tensor)
assert_type(restore_running_var(norm, ("uniform", 0.1), nn.Linear(8, 8), mean=mean, var=1.0), Tensor)
assert_type(recalibration.restore_running_var(norm, shift=0.9), Tensor)

assert_type(convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(8))), nn.Module)
assert_type(FusedBatchNorm1d(8, process_group="world", global_noise=True)(x2), Tensor)
x3, lengths = torch.randn(6, 8, 5), torch.tensor([5, 4, 3, 2, 1, 0])
assert_type(FusedBatchNorm1d(8)(x3, mask=x3[:, 0] > 0, weights=x3[:, 0].abs()), Tensor)
assert_type(FusedBatchNorm1d(8, renorm=(3, 5))(x3, lengths=lengths), Tensor)
assert_type(functional.batch_norm_act_drop(x3, None, None, training=True, lengths=[5] * 6, p=torch.tensor(0.5)), Tensor)
assert_type(FusedBatchNorm1d(8, domains=2, domain_affine=True)(x2, domain=1), Tensor)
assert_type(FusedBatchNorm1d(8, domains=2).domains, int)
assert_type(FusedBatchNorm1d(8, domains=2).domain(1).num_features, int)
assert_type(Dropout(torch.tensor(0.5))(x2), Tensor)
assert_type(ConcreteDropout(0.1)(x2), Tensor)
assert_type(ConcreteDropout(0.1).entropy(), Tensor)
noisy = nn.Sequential(FusedBatchNorm1d(8, drop=0.5, allow_single_value=True, update_when_recomputed=False))
bank = uncertainty.batch_statistics(noisy, [x2, x2 + 1], progress=False)
assert_type(bank, dict[str, tuple[Tensor, Tensor]])
assert_type(uncertainty.effective_batch_size(bank), float)
prediction = predict(noisy, x2, 4, seed=0, statistics=bank)
assert_type(prediction, uncertainty.Prediction)
assert_type((prediction.mean, prediction.entropy), tuple[Tensor, Tensor | None])
assert_type(predict(noisy, x2, 4, output=None, statistics=8, noises=[noisy[0]]).variance, Tensor)

fused = fuse(model, x2, include="*", exclude=["7", "8"])
assert_type(fused, nn.Module)
assert_type(fuse(fused, (x2,), include=lambda name, bn: "head" not in name), nn.Module)
assert_type(fuse(fused, {"input": x2}, inplace=True), nn.Module)
assert_type(fuse(fused, x2, small="always", dropouts=True), nn.Module)
assert_type(Dropout(0.5)(x2), Tensor)
assert_type(Dropout(0.5).to_torch(), nn.Dropout)
report = Report()
converted = fuse(nn.Sequential(nn.BatchNorm1d(8)))
torch.compile(converted, backend=backend, options={"report": report.add})  # pyright: ignore[reportUnknownMemberType]
assert_type(report.to_json(), str)
assert_type(fold(unfuse(fused).eval(), x2), nn.Module)
