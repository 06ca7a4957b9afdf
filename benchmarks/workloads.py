"""What is timed: layers that real models run, with their shapes, activations and drop probabilities.

The rows come from published code (named in `source`): speech, graphs, point clouds, images, EEG, tabular heads. A size
is cut where the unfused layers would need more than 4 GB for one training step; `note` then says so, in every result.
The third group is counted, not picked: census.json has the layers of public models as `make census` finds them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: there is one of each
class Workload:
    name: str
    shape: tuple[int, ...]  # (N, C) or (N, C, spatial sizes)
    p: float
    act: str | tuple | None = "relu"  # a name, (name, *parameters), or None
    dtype: torch.dtype = torch.float32  # of the activations; parameters and buffers stay float32, as under autocast
    channels_last: bool = False  # only the strides change: C becomes innermost
    granularity: str = "element"
    noise: str = "bernoulli"  # p is its strength: probability, beta or alpha
    order: str = "norm-act-drop"  # or "drop": the noise alone
    norm: dict = field(default_factory=dict)  # further arguments of the BatchNorm
    inplace: tuple[str, ...] = ()  # stages that the unfused layers run in place
    source: str = ""
    note: str = ""

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def layout(self) -> str:
        if len(self.shape) == 2:
            return "rows"
        return "channels-last" if self.channels_last else "channels-first"

    @property
    def label(self) -> str:
        act = self.act[0] if isinstance(self.act, tuple) else self.act or "no act"
        drop = "" if self.granularity == "element" else f", per-{self.granularity} drop"
        drop += "" if self.noise == "bernoulli" else f", {self.noise} noise"
        drop += "" if self.order == "norm-act-drop" else f", {self.order}"
        size = ", ".join(map(str, self.shape))
        return f"({size}) {str(self.dtype).removeprefix('torch.')} {self.layout}, {act}{drop}"

    @property
    def adds(self) -> bool:
        return "add" in self.order

    def randn(self, seed: int, device="cpu") -> torch.Tensor:
        """Standard normal tensor of this shape, dtype and layout."""
        kind = {"dtype": self.dtype, "device": device, "generator": torch.Generator(device).manual_seed(seed)}
        if not self.channels_last or len(self.shape) == 2:
            return torch.randn(self.shape, **kind)
        n, c, *spatial = self.shape
        rows = torch.randn((n, *spatial, c), **kind)
        return rows.movedim(-1, 1)


KERAS = {"eps": 1e-3, "momentum": 0.01}
HALF = torch.bfloat16

# One residual stage of an ImageNet CNN in every dtype and layout, a wide and a tiny matrix, and a long sequence.
HEADLINE = (
    Workload("cnn_f32", (64, 64, 56, 56), 0.1, source="ResNet stage 1 at batch 64"),
    Workload("cnn_f32_last", (64, 64, 56, 56), 0.1, channels_last=True, source="ResNet stage 1 at batch 64"),
    Workload("cnn_bf16", (64, 64, 56, 56), 0.1, dtype=HALF, source="ResNet stage 1 at batch 64"),
    Workload("cnn_bf16_last", (64, 64, 56, 56), 0.1, dtype=HALF, channels_last=True, source="ResNet stage 1, batch 64"),
    Workload("dense", (8192, 1024), 0.5, source="MLP layer on 8192 rows"),
    Workload("tacotron2_postnet", (64, 512, 800), 0.5, "tanh", source="NVIDIA/tacotron2 Postnet"),
    Workload("pointnet_head", (24, 512), 0.4, source="Pointnet_Pointnet2_pytorch pointnet2_cls_ssg"),
)

MODELS = (
    Workload("jasper_b5", (32, 768, 835), 0.3, norm={"eps": 1e-3}, source="NVIDIA/NeMo jasper_10x5dr block 5"),
    Workload("ogbn_arxiv", (169343, 256), 0.5, source="snap-stanford/ogb nodeproppred/arxiv, full batch"),
    Workload(
        "mag_mlp",
        (190000, 512),
        0.5,
        source="snap-stanford/ogb lsc/mag240m mlp",
        note="rows halved from 380000: eager would need more than 4 GB",
    ),
    Workload("pcqm_mlp", (256, 1600), 0.2, source="snap-stanford/ogb lsc/pcqm4m-v2 main_mlpfp"),
    Workload("wrn_s1", (128, 160, 32, 32), 0.3, source="WideResNet-pytorch WRN-28-10 stage 1"),
    Workload("wrn_s2", (128, 320, 16, 16), 0.3, source="WideResNet-pytorch WRN-28-10 stage 2"),
    Workload("wrn_s3", (128, 640, 8, 8), 0.3, source="WideResNet-pytorch WRN-28-10 stage 3"),
    Workload("pointnet_seg", (16, 128, 4096), 0.5, source="Pointnet_Pointnet2_pytorch pointnet2_sem_seg"),
    Workload("fastai_head", (64, 1024), 0.25, None, source="fastai create_head: BatchNorm1d, Dropout"),
    Workload(
        "crdnn_dnn",
        (16, 512, 500),
        0.15,
        "leaky_relu",
        channels_last=True,
        source="speechbrain CRDNN DNN_Block: (N, C, L) with C innermost",
    ),
    Workload(
        "erfnet",
        (6, 128, 64, 128),
        0.3,
        None,
        granularity="channel",
        norm={"eps": 1e-3},
        source="erfnet_pytorch non_bottleneck_1d: bn2, Dropout2d",
    ),
    Workload("eegsym", (64, 8, 2, 5, 384), 0.25, "elu", norm=KERAS, source="braindecode EEGSym InceptionBlock"),
    Workload("densenet_b2", (64, 256, 28, 28), 0.0, source="torchvision DenseNet norm, relu (no drop)"),
    Workload("efficientnet_head", (64, 1280, 7, 7), 0.0, "silu", source="EfficientNet-B0 head norm, silu (no drop)"),
)

# The headline layer at batches that fit the caches, where oneDNN is at its best.
BATCHES = (
    Workload("cnn_f32_last_16", (16, 64, 56, 56), 0.0, channels_last=True, source="ResNet stage 1 at batch 16"),
    Workload("cnn_bf16_16", (16, 64, 56, 56), 0.0, dtype=HALF, source="ResNet stage 1 at batch 16"),
    Workload("cnn_f32_4", (4, 64, 56, 56), 0.0, source="ResNet stage 1 at batch 4"),
)

# The headline layer in other orders and with other noises; the first row of each layout is what they are compared with.
ORDERS = (
    "norm-act-drop",
    "norm-drop-act",
    "act-norm-drop",
    "drop-norm-act",
    "act-drop-norm",
    "drop-act-norm",
    "norm-act-drop-add",
    "norm-add-act",
    "norm-add-act-drop",
    "norm-drop-add-act",
    "act-norm-drop-add",
)
NOISES = (
    ("uniform", 0.5, "element", "norm-act-drop"),
    ("uniform", 0.5, "element", "drop-norm-act"),
    ("gaussian", 0.1, "element", "norm-act-drop"),
    ("gaussian", 0.1, "element", "drop-norm-act"),
    ("bernoulli", 0.1, "channel", "norm-act-drop"),
    ("bernoulli", 0.1, "sample", "norm-drop-add-act"),
    ("bernoulli", 0.1, "element", "drop"),
    ("uniform", 0.5, "element", "drop"),
    ("gaussian", 0.1, "element", "drop"),
    ("bernoulli", 0.1, "sample", "drop"),
)
FAMILY = tuple(
    Workload(
        f"{order}{'' if noise == 'bernoulli' else '_' + noise}{'' if granularity == 'element' else '_' + granularity}"
        f"{'_last' if last else ''}",
        (64, 64, 56, 56),
        p,
        None if order == "drop" else "relu",
        channels_last=last,
        granularity=granularity,
        noise=noise,
        order=order,
    )
    for last in (False, True)
    for noise, p, granularity, order in (*(("bernoulli", 0.1, "element", order) for order in ORDERS), *NOISES)
)


def _counted(entry: dict) -> Workload:
    """A row of census.json."""
    name, *parameters = entry["act"] or ("",)
    last = entry["layout"] == "channels-last"
    size = "x".join(map(str, entry["shape"]))
    act = "-".join((name, *(f"{value:g}" for value in parameters)))
    parts = "census", size, entry["order"], act, entry["granularity"].replace("element", ""), "last" * last
    models = ", ".join(entry["models"])
    return Workload(
        "_".join(filter(None, parts)),
        tuple(entry["shape"]),
        entry["p"],
        (name, *parameters) if parameters else name or None,
        channels_last=last,
        granularity=entry["granularity"],
        order=entry["order"],
        inplace=tuple(entry["inplace"]),
        source=f"{models}: {entry['count']} calls in all models of the census",
    )


CENSUS = tuple(map(_counted, json.loads(Path(__file__).with_name("census.json").read_text())))

WORKLOADS = HEADLINE + MODELS + BATCHES + FAMILY  # of a run that names none
BY_NAME = {workload.name: workload for workload in WORKLOADS + CENSUS}

MODES = ("forward", "backward", "both", "eval")
COLD = "both_cold"  # "both" with other data in the caches before each step
CENSUS_MODES = ("both", "eval")


def rows(
    only=(),
    modes=(),
    quick: bool = False,
    own_p: bool = False,
    family: bool = False,
    census: bool = False,
    cold: bool = False,
) -> list[tuple[Workload, float, str]]:
    """The rows of a run, as (workload, p, mode), all rows of one (workload, p) side by side.

    No `modes` are the usual ones; `only` names workloads of any group. `quick` keeps the headline workloads,
    forward+backward, at their own p, and one row at p = 0; `own_p` leaves out p = 0; `family` keeps the orders and
    noises, which are forward+backward at their own p in any case. Evaluation does not depend on p (nothing is dropped),
    so it is one row per workload. `census` is that group instead of the others, at its own p only. `cold` adds that
    mode for the headline and for the census.
    """
    unknown = set(only) - set(BY_NAME)
    if unknown:
        known = ", ".join(workload.name for workload in WORKLOADS)
        raise ValueError(f"unknown workload {', '.join(sorted(unknown))}; there are: {known}, and those of the census")
    picked = []
    for workload in (*WORKLOADS, *CENSUS):
        counted = workload in CENSUS
        if workload.name not in only if only else counted != census:
            continue
        if family and workload not in FAMILY or quick and not only and not census and workload not in HEADLINE:
            continue
        wanted = {*(modes or (CENSUS_MODES if counted else MODES)), *[COLD] * cold}
        if workload in FAMILY or quick:
            wanted &= {"both", COLD}
        if workload not in HEADLINE and not counted:
            wanted -= {COLD}
        alone = counted or own_p or workload in FAMILY or quick and workload.name != "cnn_f32"
        for p in (workload.p,) if alone else dict.fromkeys((workload.p, 0.0)):
            at_own = wanted if p == workload.p else wanted - {"eval", COLD}
            picked += [(workload, p, mode) for mode in (*MODES, COLD) if mode in at_own]
    return picked
